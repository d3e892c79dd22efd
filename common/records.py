"""From data files to examples: every line either becomes an `Example` or an error that names file and line.

Reading and meaning are apart: this file knows JSON lines and the names of fields, `chat.py` turns an example
into tokens. All bad lines of a file are collected before the run is refused, so that one look mends them all.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from common.config import DataConfig

SHOWN_ERRORS = 20
ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = {"chat": ("messages",), "prompt_completion": ("prompt", "completion"), "text": ("text",)}
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Example:
    """Hold one training example in one of three forms, and where it came from.

    Either `messages` (chat), or `prompt` and `completion`, or `text` alone.
    """

    source: str  # file:line
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    tools: tuple[Any, ...] | None = None


class RecordError(Exception):
    """Say why one line is no example; the reader adds the place."""


def read_examples(paths: str | Sequence[str], data: DataConfig, skipped: list[str]) -> list[Example]:
    """Read all examples of the files in order.

    Bad lines end the run with one UserError that lists them, or with `data.on_error: skip` are appended to
    `skipped`. An empty file is an error in either case.
    """
    examples: list[Example] = []
    errors: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        before = len(examples) + len(errors)
        for source, value in _read_values(Path(path), errors):
            try:
                examples.append(to_example(value, source, data))
            except RecordError as error:
                errors.append(f"{source}: {error}")
        if len(examples) + len(errors) == before:
            raise UserError(f"{path}: the file holds no examples; expected one JSON object a line")
    if errors and data.on_error == "stop":
        raise UserError(summarise(errors) + "\nmend them, or leave them out with data.on_error: skip")
    skipped.extend(errors)
    if not examples:
        raise UserError(f"{paths}: no usable example is left:\n" + summarise(errors))
    return examples


def summarise(errors: Sequence[str]) -> str:
    """Join the first errors, one a line, and count the rest."""
    more = len(errors) - SHOWN_ERRORS
    return "\n".join(errors[:SHOWN_ERRORS]) + (f"\n... and {more} more" if more > 0 else "")


def to_example(value: Any, source: str, data: DataConfig) -> Example:
    """Turn one decoded JSON value into an example; raises RecordError that says what is missing."""
    if not isinstance(value, dict):
        raise RecordError(f'found {_kind(value)}; expected an object such as {{"messages": [...]}}')
    form = _form(value, data)
    fields = [data.columns.get(name, name) for name in FIELDS[form]]
    missing = [name for name in fields if name not in value]
    if missing:
        raise RecordError(f"has no {' and '.join(map(repr, missing))}; its keys are {', '.join(value) or 'none'}")
    if form == "chat":
        tools = value.get(data.columns.get("tools", "tools"))
        if tools is not None and not isinstance(tools, list):
            raise RecordError(f"'tools' is {_kind(tools)}; expected a list of JSON schemas")
        return Example(source, messages=_messages(value[fields[0]]), tools=tuple(tools) if tools else None)
    texts = [
        _text(value[name], name, may_be_empty=meaning == "prompt")
        for meaning, name in zip(FIELDS[form], fields, strict=True)
    ]
    if form == "text":
        return Example(source, text=texts[0])
    return Example(source, prompt=texts[0], completion=texts[1])


def _read_values(path: Path, errors: list[str]) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; data.train, data.validation and data.test name files on this machine")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            if ".jsonl" in path.suffixes:
                yield from _json_lines(path, file, errors)
            else:
                yield from _json_array(path, file.read())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: a damaged gzip file ({error}); compress or copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the file and its permissions") from None


def _json_lines(path: Path, lines: Iterable[bytes], errors: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig").rstrip()
            if text:
                yield f"{path}:{number}", json.loads(text)
        except UnicodeDecodeError as error:
            errors.append(f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
            found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            errors.append(f"{path}:{number}: no JSON: {found}; expected one JSON object a line")


def _json_array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        text = content.decode("utf-8-sig")
        values = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON: {error}; one object a line belongs in a file named .jsonl") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: found {_kind(values)}; expected a list of examples [{{...}}, ...]")
    for number, value in enumerate(values, start=1):
        yield f"{path}#{number}", value


def _form(value: Mapping[str, Any], data: DataConfig) -> str:
    if data.format != "auto":
        return data.format
    for form, fields in FIELDS.items():
        if data.columns.get(fields[0], fields[0]) in value:
            return form
    expected = "'messages', 'prompt' and 'completion', or 'text'"
    raise RecordError(f"has none of {expected}; its keys are {', '.join(value) or 'none'}: name yours in data.columns")


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise RecordError(f'\'messages\' is {_kind(value)}; expected a list of {{"role", "content"}}')
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RecordError(f"message {number} is {_kind(message)} without role and content")
        if message["role"] not in ROLES:
            raise RecordError(f"message {number} has the role {message['role']!r}; expected {', '.join(ROLES)}")
        if not isinstance(message["content"], str) and not message.get("tool_calls"):
            raise RecordError(f"message {number} has {_kind(message['content'])} as content; expected a text")
    answers = [message for message in value if message["role"] == "assistant"]
    if not answers:
        raise RecordError("has no answer: no message has the role 'assistant'")
    for message in answers:
        if not (message["content"] or "").strip() and not message.get("tool_calls"):
            raise RecordError("has an empty answer; remove the example or write one")
    return tuple(value)


def _text(value: Any, name: str, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name!r} is {_kind(value)}; expected a text")
    if not may_be_empty and not value.strip():
        raise RecordError(f"{name!r} is empty; there is nothing to learn from it")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")
