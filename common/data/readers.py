"""From paths to located raw records, streaming: which files are meant, and one record after the other.

It knows kinds of files and nothing of what a record means (`records.py`). A JSON line leaves here as bytes, so that
whoever tokenises it, perhaps another process, also pays for decoding it; no file but a `.json` list is ever held
whole. The cost: a bad line is a record like any other until `decode` refuses it, and a `.json` list is bounded.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.data.sources import DataFile, list_files, no_examples
from common.data.tables import read_table
from common.errors import UserError

__all__ = ["DataFile", "Raw", "RecordError", "decode", "label", "list_files", "place", "read_raw"]

MAX_LINE_BYTES = 32 * 2**20  # a context of a million tokens is about 4 MB
MAX_LIST_BYTES = 2**30
_BOM = b"\xef\xbb\xbf"
_NO_TEXT = {
    b"\xff\xfe": "not UTF-8 text (it begins like UTF-16); save it as UTF-8",
    b"\xfe\xff": "not UTF-8 text (it begins like UTF-16); save it as UTF-8",
    b"\x1f\x8b": "compressed with gzip; add .gz to its name",
    b"PK\x03\x04": "a zip archive or spreadsheet; unpack it, or save it as .csv in UTF-8",
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"version https://git-lfs": "a Git LFS pointer instead of the data; run git lfs pull",
}


class RecordError(Exception):
    """Say why one record is no example; whoever knows the place adds it."""


class Raw(NamedTuple):
    """Hold one record and its place; a named tuple because that is cheap to pickle."""

    file: int  # index into the list of files
    line: int  # from 1: the line of .jsonl and .csv, the item of anything else
    payload: Any  # bytes: a JSON line to decode; RecordError: why there is no value; else the value


def read_raw(files: Sequence[DataFile]) -> Iterator[Raw]:
    """Yield the records of all files in order; raises UserError for a file that can't be read or holds none."""
    for index, file in enumerate(files):
        line = 0
        for line, payload in _payloads(file):
            yield Raw(index, line, payload)
        if not line:
            raise UserError(no_examples(file.path, file.kind))


def decode(raw: Raw) -> Any:
    """Return the value of a record; raises RecordError where it is no UTF-8 or no JSON."""
    if type(raw.payload) is bytes:
        return _json_line(raw.payload)
    if isinstance(raw.payload, RecordError):
        raise raw.payload
    return raw.payload


def place(files: Sequence[DataFile], raw: Raw) -> str:
    """Say where a record stands: `path:line` of lines and rows, `path#number` of items."""
    return f"{label(files[raw.file])}{raw.line}"


def label(file: DataFile) -> str:
    """Return what stands before the number of a record in its place."""
    return f"{file.path}{':' if file.kind in ('jsonl', 'csv', 'tsv') else '#'}"


def _payloads(file: DataFile) -> Iterator[tuple[int, Any]]:
    """Yield (line or item number, payload) of one source, with its reading errors made one UserError."""
    if file.kind in ("parquet", "saved", "hub"):
        yield from read_table(file)
        return
    path = Path(file.path)
    try:
        with _open(path) as stream:
            _check_head(stream, path)
            if file.kind == "jsonl":
                yield from _json_lines(stream)
            elif file.kind == "json":
                yield from _json_list(stream, path)
            else:
                yield from _csv_rows(stream, path, "," if file.kind == "csv" else "\t")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: a damaged gzip file ({error}); compress or copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the file and its permissions") from None


def _open(path: Path) -> Any:  # a binary stream that can peek, for which typing has no name
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _check_head(stream: Any, path: Path) -> None:
    head = stream.peek(32)
    found = next((text for start, text in _NO_TEXT.items() if head.startswith(start)), None)
    if found:
        raise UserError(f"{path}: {found}")


def _next_line(stream: IO[bytes]) -> bytes:
    """Return the next line, b"" at the end; raises RecordError past one that is too long, and is then behind it."""
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) <= MAX_LINE_BYTES:
        return line
    while line and not line.endswith(b"\n"):
        line = stream.readline(2**20)
    raise RecordError(
        f"a line of more than {MAX_LINE_BYTES // 2**20} MiB; expected one example; "
        "split it, or check that the lines end in newlines"
    )


def _json_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | RecordError]]:
    number = 0
    while True:
        number += 1
        try:
            line = _next_line(stream)
        except RecordError as error:
            yield number, error
            continue
        if not line:
            return
        line = line.rstrip()
        if line[:3] == _BOM:  # also within: files that were joined keep theirs
            line = line[3:].lstrip()
        if line:
            yield number, line


def _json_line(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        if b"\0" in line:
            raise RecordError("holds NUL bytes, as UTF-16 or a damaged file does; save it as UTF-8") from None
        found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RecordError(f"no JSON: {found}; expected one JSON object a line") from None


def _json_list(stream: IO[bytes], path: Path) -> Iterator[tuple[int, Any]]:
    content = stream.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise UserError(
            f"{path}: more than {MAX_LIST_BYTES // 2**20} MiB, and a list has to be read whole; "
            "write one object a line into a file named .jsonl"
        )
    try:
        text = content.decode("utf-8-sig")
        values = _DECODER.decode(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: no JSON: {error}; expected a list [{{...}}, ...]; "
            "one object a line belongs in a file named .jsonl"
        ) from None
    if not isinstance(values, list):
        name = {dict: "an object", str: "a text", type(None): "null"}.get(type(values), "a number, true or false")
        raise UserError(f"{path}: found {name}; expected a list of examples [{{...}}, ...]")
    yield from enumerate(values, start=1)


class _TextLines:
    """Iterate over lines as text, counting them, and survive a line that is refused, which a generator would not."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.number = 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        self.number += 1
        line = _next_line(self.stream)
        if not line:
            raise StopIteration
        line = line[3:] if self.number == 1 and line[:3] == _BOM else line
        return line.decode("utf-8", "surrogateescape")  # so that a row with bad bytes is still one row


def _csv_rows(stream: IO[bytes], path: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, str] | RecordError]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the whole process's, but csv has no other; its default is 128 KiB
    lines = _TextLines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        number = lines.number + 1
        try:
            row = next(reader, None)
            if row is None:
                return
            if row and header:
                _check_row(row)
                yield number, _named(row, header)
            elif row:
                _check_row(row)
                header = _checked_header(row, delimiter)
        except (csv.Error, RecordError) as error:
            text = f"no row: {error}; a quote within quotes is doubled" if isinstance(error, csv.Error) else f"{error}"
            if not header:
                raise UserError(f"{path}:{number}: {text}") from None
            yield number, RecordError(text)


def _check_row(row: list[str]) -> None:
    """Raise RecordError for what is no text: bytes that are not UTF-8, NULs."""
    joined = "".join(row)
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        byte = ord(joined[error.start]) - 0xDC00
        raise RecordError(f"not UTF-8 text (found the byte 0x{byte:02x}); save it as UTF-8") from None
    if "\0" in joined:
        raise RecordError("holds NUL bytes, as UTF-16 or a damaged file does; save it as UTF-8")


def _checked_header(row: list[str], delimiter: str) -> list[str]:
    other = next((mark for mark in ";\t,|" if len(row) == 1 and mark != delimiter and mark in row[0]), None)
    if other:
        raise RecordError(
            f"the header {row[0][:80]!r} is one column; expected {delimiter!r} between columns; "
            + ("name the file .tsv" if other == "\t" else "save it with commas")
        )
    twice = {name for name in row if name and row.count(name) > 1}
    if twice:
        raise RecordError(f"the header names {', '.join(sorted(twice))[:80]} twice; give each column its own name")
    return row


def _named(row: list[str], header: list[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise RecordError(
            f"has {len(row)} cells; the header names {len(header)} columns; put quotes around cells that hold commas"
        )
    return dict(zip(header, row, strict=True))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; of two equal keys JSON parsers keep either, so neither is taken."""
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice[:40]!r} twice")
    return value


def _constant(name: str) -> None:
    """Read NaN, which pandas writes for a missing value, as null; raises ValueError for Infinity."""
    if name != "NaN":
        raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
