"""A run in its folder: how it starts, what it saves and records, how it ends."""
