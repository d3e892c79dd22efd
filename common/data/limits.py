"""A budget for one rendering of a chat template: how much it may make, how often it may repeat, how long it may take.

Sizes are computed before a value is made, so memory is bounded as well as time. Work is counted, not timed, so that
a conversation is refused on every machine or on none; the clock only stops what the count can't see. The cost is
counting: about a microsecond a message.
"""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Iterable, Iterator, Sized
from functools import reduce
from typing import Any

from jinja2.filters import FILTERS
from jinja2.runtime import Undefined
from markupsafe import Markup

from common.data.records import RecordError

MAX_RENDERED_CHARACTERS = 20_000_000
MAX_WORK = 4_000_000  # loop rounds, calls, values made; a value counts once more every 64 characters
MAX_SECONDS = 10.0  # for what the count can't see, such as searching a long text again and again
MAX_DIGITS = 4000  # of a whole number; powers reach hours of work in three characters
CHECKED_EVERY = 100  # units of work between two looks at the clock
PADS = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*?(\d{4}|\*)")
PADS_BRACES = re.compile(r"\{[^{}]*(\d{4}|\{)")


class Limits:
    """Count the work of one rendering and refuse what would grow or run without end; raises RecordError."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a rendering with a full budget."""
        self._left = self._next_check = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, work: int) -> None:
        """Take from the budget."""
        self._left -= work
        if self._left < self._next_check:
            self._next_check = self._left - CHECKED_EVERY
            if self._left < 0 or time.monotonic() > self._deadline:
                raise RecordError(
                    "the chat template does not come to an end with this conversation: stopped after "
                    f"{MAX_WORK:,} operations or {MAX_SECONDS:g} seconds; check the model's chat_template"
                )

    def bound(self, size: int) -> None:
        """Refuse an output of this size."""
        if size > MAX_RENDERED_CHARACTERS:
            raise RecordError(
                f"the chat template makes {size:,} characters of this conversation; at most "
                f"{MAX_RENDERED_CHARACTERS:,}; shorten the conversation or check the model's chat_template"
            )

    def fit(self, size: int) -> None:
        """Count a text or list of this size, or refuse it before it is made."""
        self.bound(size)
        self.spend(1 + (size >> 6))

    def rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        """Count the rounds of a loop."""
        for value in values:
            self.spend(1)
            yield value

    def value(self, value: Any) -> Any:
        """Count a value that a call or a filter made."""
        if isinstance(value, (list, tuple, dict)):
            self._measure(value)
        else:
            self.fit(len(value) if isinstance(value, str) else 1)
        return value

    def text(self, value: Any) -> str:
        """Turn a value into text, as Jinja prints it."""
        if type(value) is str:
            return value
        return str(self.value(value))

    def concat(self, pieces: Iterable[Any]) -> str:
        """Join texts, as `~` and a block do."""
        texts = [self.text(piece) for piece in pieces]
        self.fit(sum(map(len, texts)))
        return "".join(texts)

    def add(self, values: tuple[Any, ...]) -> Any:
        """Compute `a + b + ...` from the left."""
        kinds = set(map(type, values))
        if kinds == {str}:
            self.fit(sum(map(len, values)))
            return "".join(values)
        if Markup in kinds:  # escapes what is added to it
            self.fit(sum(5 * len(value) for value in values if isinstance(value, str)))
        return self.value(reduce(operator.add, values))

    def multiply(self, values: tuple[Any, Any]) -> Any:
        """Compute `a * b`."""
        for value, times in (values, values[::-1]):
            if isinstance(value, Sized) and not isinstance(value, Undefined) and isinstance(times, int):
                self.fit(len(value) * times)
        return self.value(self._number(operator.mul(*values)))

    def power(self, values: tuple[Any, Any]) -> Any:
        """Compute `a ** b`."""
        base, exponent = values
        if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > 3 * MAX_DIGITS:
            raise RecordError(f"the chat template makes a number of more than {MAX_DIGITS:,} digits; check it")
        return self._number(operator.pow(base, exponent))

    def modulo(self, values: tuple[Any, Any]) -> Any:
        """Compute `a % b`, also of a text with places to fill."""
        if isinstance(values[0], str):
            self.width(values[0], PADS)
        return self.value(operator.mod(*values))

    def width(self, pattern: str, pads: re.Pattern[str]) -> None:
        """Refuse a pattern such as "%999999999d" or "{:{n}}", which pads to any length."""
        if pads.search(pattern.replace("{{", "")):
            raise RecordError("the chat template pads a text to a width of thousands; check the model's chat_template")

    def before_call(self, called: Any, args: tuple[Any, ...]) -> None:
        """Work out how large the result of a text's method will be."""
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            if called.__name__ == "replace" and len(args) > 1:
                self._fit_replaced(owner, *args[:2])
            elif called.__name__ == "join" and args and isinstance(args[0], Sized):
                self.fit(len(owner) * len(args[0]))

    def filter_replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        """Put one text in place of another, at most `count` times."""
        self._fit_replaced(text := self.text(text), old := self.text(old), new := self.text(new))
        return text.replace(old, new, -1 if count is None else count)

    def filter_indent(self, text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        """Indent lines as Jinja's filter does."""
        text, wide = self.text(text), len(width) if isinstance(width, str) else int(width)
        self.fit(len(text) + (text.count("\n") + 1) * wide)
        return FILTERS["indent"](text, width, first, blank)

    def filter_format(self, pattern: Any, *args: Any, **kwargs: Any) -> str:
        """Fill a pattern as Jinja's filter does."""
        self.width(pattern := self.text(pattern), PADS)
        return self.value(FILTERS["format"](pattern, *args, **kwargs))

    def filter_round(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        """Round as Jinja's filter does."""
        return FILTERS["round"](value, max(-20, min(20, int(precision))), method)

    def _fit_replaced(self, text: Any, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.fit(len(text) + (text.count(old) if old else len(text) + 1) * max(0, len(new) - len(old)))

    def _number(self, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > 3 * MAX_DIGITS:
            raise RecordError(f"the chat template makes a number of more than {MAX_DIGITS:,} digits; check it")
        return value

    def _measure(self, value: Any) -> None:
        """Count all that hangs in a list; lists that hold one list twice double with each level."""
        waiting, size = [value], 0
        while waiting:
            item = waiting.pop()
            if isinstance(item, (list, tuple, dict)):
                self.spend(1 + len(item))
                waiting.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, str):
                size += len(item)
                self.fit(size)
