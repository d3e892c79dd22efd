"""Tokens that a text must not hold, or the model reads the end of a turn where somebody wrote about one.

A chat template pastes contents between its special tokens, and a tokenizer takes a special token in a content for the
real one. Others let that pass in silence: the model then learns turns that nobody took. Here such an example is
refused. The cost: data that speaks of its own model's tokens (`<s>` is one of Mistral's) must write them otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from common.data.records import RecordError

# Marks of reasoning may be special tokens, and yet stand in contents: templates look for them there.
THOUGHTS = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"})


class TokenTexts:
    """Find the texts of some tokens in other texts."""

    def __init__(self, tokens: Iterable[str]) -> None:
        texts = sorted(filter(None, tokens), key=len, reverse=True)  # the longest is found first
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._beginnings = {text[0] for text in texts}

    def first_in(self, text: str) -> str | None:
        """Return the first token in a text, if any."""
        for character in self._beginnings:  # of which most texts have none: a pattern is far slower
            if character in text:
                found = self._pattern.search(text)
                return found.group() if found else None
        return None

    def at_start_of(self, text: str) -> str:
        """Return the token that a text begins with; "" without one."""
        found = self._pattern.match(text)
        return found.group() if found else ""

    def last_in(self, text: str) -> int:
        """Return where the last token in a text ends; 0 without one."""
        return max((found.end() for found in self._pattern.finditer(text)), default=0)


def refuse_control_tokens(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, control: TokenTexts
) -> None:
    """Raise RecordError for a message or a tool that holds one of the tokens anywhere but in its role."""
    for number, message in enumerate(messages, start=1):
        if len(message) == 2 and isinstance(content := message["content"], str):
            found = control.first_in(content)
        else:
            texts = _texts([(name, value) for name, value in message.items() if name != "role"])
            found = next(filter(None, map(control.first_in, texts)), None)
        if found:
            raise _refusal(f"message {number}", found)
    if tools and (found := next(filter(None, map(control.first_in, _texts(tools))), None)):
        raise _refusal("a tool", found)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.items()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _refusal(where: str, token: str) -> RecordError:
    return RecordError(
        f"{where} holds {token!r}, which the model reads as a special token and not as text; take it out, or write it "
        f"otherwise, such as {token[0] + ' ' + token[1:]!r}"
    )
