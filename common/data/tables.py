"""Records from Arrow tables: Parquet files, folders of `save_to_disk`, data sets on the Hugging Face Hub.

pyarrow and datasets are optional and imported here alone, when a path asks for them. Rows come as Arrow gives them,
a batch at a time, so nothing is decoded that an example doesn't hold (images, audio). Arrow gives every object all
keys that any of its neighbours has, null where it has none; these nulls are left out again. The cost: a null that
was written on purpose, within an argument of a tool call, is left out too.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

from common.data.sources import SPLIT_NAMES, DataFile, parse_hub, read_query, split_query
from common.errors import TwintuneError, UserError

BATCH_ROWS = 256


def read_table(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (item number from 1, row); raises UserError for a missing package and for what can't be read."""
    pyarrow = optional("pyarrow", file.path)
    try:
        number = 0
        for batch in _parquet(file) if file.kind == "parquet" else _datasets(file):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: _without_nulls(value) for name, value in row.items()}
    except TwintuneError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = "can't be read as Parquet" if file.kind == "parquet" else "can't be read"
        raise UserError(f"{file.path}: {what} ({first_line(error)}); copy or write it again") from None
    except Exception as error:  # datasets and what it loads raise many kinds, of several libraries
        if file.kind == "parquet":
            raise
        raise UserError(f"{file.path}: can't be read ({first_line(error)}); see that `datasets` can read it") from None


def optional(module: str, path: str) -> Any:
    """Import a package that only some data needs; raises UserError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UserError(
            f"{path}: reading it needs the package {name} ({error}); install it: pip install 'twintune[data]'"
        ) from None


def first_line(error: BaseException) -> str:
    """Shorten what another library says to one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _parquet(file: DataFile) -> Iterator[Any]:
    with optional("pyarrow.parquet", file.path).ParquetFile(file.path) as parquet:
        yield from parquet.iter_batches(batch_size=BATCH_ROWS)


def _datasets(file: DataFile) -> Iterator[Any]:
    datasets = optional("datasets", file.path)
    data = _load_saved(datasets, file) if file.kind == "saved" else _load_hub(datasets, file)
    return data.with_format("arrow").iter(batch_size=BATCH_ROWS)


def _load_saved(datasets: Any, file: DataFile) -> Any:
    folder = split_query(file.path)[0]
    wanted = read_query(file.path, ("split",)).get("split")
    name, begin, end = _slice(wanted, file.path) if wanted else ("", "", "")
    data = datasets.load_from_disk(folder)
    if isinstance(data, datasets.DatasetDict):
        name = name or _split_of(list(data), file)
        if name not in data:
            raise UserError(f"{file.path}: has no split {name!r}; expected one of {', '.join(data)}")
        data = data[name]
    elif name and str(data.split or name) != name:
        raise UserError(f"{file.path}: has no split {name!r}; it holds {data.split} alone")
    if not begin and not end:
        return data
    first, last, _ = slice(_rows(begin, len(data)), _rows(end, len(data))).indices(len(data))
    return data.select(range(first, max(first, last)))


def _load_hub(datasets: Any, file: DataFile) -> Any:
    """Open a data set of the Hub; where it is streamed a slice is counted off here, as datasets can't."""
    hub = parse_hub(file.path)
    wanted = hub.split or file.split
    name, begin, end = _slice(wanted, file.path) if hub.streaming else (wanted, "", "")
    if not re.fullmatch(r"\d*", begin + end):
        raise UserError(f"{file.path}: a streamed split has no known length; expected a slice as {name}[:1000]")
    try:
        data = datasets.load_dataset(
            hub.repository, hub.name, split=name, revision=hub.revision, streaming=hub.streaming
        )
    except Exception as error:  # requests that fail, unknown names, gates: of several libraries, without a common base
        raise UserError(
            f"{file.path}: can't be loaded ({first_line(error)}); check the name, the split ({wanted}) and the "
            "connection; for a gated one accept its terms on its page and run `hf auth login`"
        ) from None
    if begin:
        data = data.skip(int(begin))
    return data.take(max(0, int(end) - int(begin or 0))) if end else data


def _split_of(names: list[str], file: DataFile) -> str:
    found = [name for name in SPLIT_NAMES[file.split] if name in names]
    if not found:
        raise UserError(
            f"{file.path}: has no {file.split} split; its splits are {', '.join(names)}: add ?split={names[0]}"
            if names
            else f"{file.path}: has no splits"
        )
    return found[0]


def _slice(split: str, path: str) -> tuple[str, str, str]:
    """Take `train[5:10%]` apart into name, begin, end; either end may be empty."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise UserError(f"{path}: found split={split}; expected a name, or a slice as train[:1000] or train[:10%]")
    return match[1], match[2] or "", match[3] or ""


def _rows(bound: str, length: int) -> int | None:
    if not bound:
        return None
    return round(int(bound[:-1]) * length / 100) if bound.endswith("%") else int(bound)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value] if value and isinstance(value[0], dict | list) else value
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value
