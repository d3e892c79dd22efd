"""Talking with a model: `speaker` answers, `conversation` remembers, `terminal` reads lines and keys, `chat` is it."""
