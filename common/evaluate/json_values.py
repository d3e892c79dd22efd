"""Answers as JSON: parsed strictly, taken apart into fields, compared value by value.

A document is the multiset of its fields, as Donut counts it (arXiv:2111.15664): nested names are joined
by dots, and the items of a list all have the list's name, so that their order doesn't matter. Unlike there, an empty
object or list is a value too, or nothing would say that it is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

Field = tuple[str, Hashable]  # the dotted name, and a value that compares as JSON does

DEEPEST = 100  # levels; some models open brackets without end


def parse(text: str) -> Any:
    """Return the JSON object or list that a text is, None where it is none (a bare word or number counts as none)."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a number of thousands of digits is a plain ValueError
        return None
    return value if isinstance(value, dict | list) and _depth(value) <= DEEPEST else None


def same(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are equal; 1 and 1.0 are, 1 and true are not, as they are in Python."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def fields(value: Any) -> Counter[Field]:
    """Count the fields of a document; none for what is no object or list."""
    return Counter(_fields(value, "")) if isinstance(value, dict | list) else Counter()


def lookup(value: Any, name: str) -> tuple[bool, Any]:
    """Find a field by its name, or by names joined by dots; returns whether it is there, and its value."""
    if isinstance(value, dict) and name in value:
        return True, value[name]
    first, dot, rest = name.partition(".")
    return lookup(value[first], rest) if dot and isinstance(value, dict) and first in value else (False, None)


def _fields(value: Any, name: str) -> Iterator[Field]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _fields(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        for item in value:
            yield from _fields(item, name)
    else:
        yield name, _comparable(value)


def _comparable(value: Any) -> Hashable:
    """Return what is equal for equal JSON values without anything in them."""
    if isinstance(value, dict | list):
        return type(value).__name__, None
    return "bool" if isinstance(value, bool) else "", value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON's")
