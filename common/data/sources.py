"""What a path in the config means: a file, the file of a split in a folder, a saved data set, one on the Hub.

Nothing is opened here but to look whether it is there, so that all paths of a run are checked before any is read.
The cost: whether a data set of the Hub exists shows only when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import UserError

if TYPE_CHECKING:
    from common.config import WeightedPath

Split = Literal["train", "validation", "test"]
Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "saved", "hub"]

SUFFIXES: dict[str, Kind] = {
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"},
    **{".jsonl.gz": "jsonl", ".ndjson.gz": "jsonl", ".json.gz": "json", ".csv.gz": "csv", ".tsv.gz": "tsv"},
    ".parquet": "parquet",
}
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_EXPECTED: dict[Kind, str] = {
    **{"csv": "a header line, then rows", "tsv": "a header line, then rows"},
    **{"jsonl": "one JSON object a line", "json": "a list of objects"},
}
HUB_FORM = "hf://datasets/OWNER/NAME[@revision][?split=train[:10%]&name=CONFIG&streaming=true]"


@dataclass(frozen=True, slots=True)
class DataFile:
    """Name one source of records: a file, a folder that `save_to_disk` wrote, or a data set on the Hub."""

    path: str  # as messages show it, with its ?split=...
    kind: Kind
    weight: float = 1.0  # how often an epoch sees its examples
    split: Split = "train"  # what is meant where the path itself names no split


@dataclass(frozen=True, slots=True)
class HubData:
    """Hold what a `hf://datasets/` path says."""

    repository: str
    revision: str | None = None
    name: str | None = None
    split: str | None = None
    streaming: bool = False


def list_files(paths: str | Sequence[str | WeightedPath], split: Split = "train") -> list[DataFile]:
    """Find what each path means for a split; raises UserError for what is missing, unknown, ambiguous or empty."""
    return [file for item in ([paths] if isinstance(paths, str) else paths) for file in _resolve(item, split)]


def parse_hub(path: str) -> HubData:
    """Read a path `hf://datasets/OWNER/NAME...`; raises UserError where it is none."""
    match = re.fullmatch(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)(?:@([^?]+))?", split_query(path)[0])
    if not match:
        raise UserError(f"{path}: no data set; expected {HUB_FORM}; download single files and name them")
    query = read_query(path, ("split", "name", "streaming"))
    streaming = query.get("streaming", "false").lower()
    if streaming not in ("true", "false"):
        raise UserError(f"{path}: found streaming={streaming}; expected true or false")
    return HubData(match[1], match[2], query.get("name"), query.get("split"), streaming == "true")


def split_query(path: str) -> tuple[str, str]:
    """Cut a path at its question mark, unless a file of that very name is there."""
    if "?" not in path or (not path.startswith("hf://") and Path(path).exists()):
        return path, ""
    before, _, query = path.partition("?")
    return before, query


def is_saved(folder: Path) -> bool:
    """Tell whether datasets' `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def no_examples(path: str, kind: Kind) -> str:
    """Say that a source is empty, and what belongs in it."""
    return f"{path}: the file holds no examples; expected {_EXPECTED.get(kind, 'at least one row')}"


def _resolve(item: str | WeightedPath, split: Split) -> Iterator[DataFile]:
    text, weight = (item, 1.0) if isinstance(item, str) else (item.path, item.weight)
    if text.startswith("hf://"):
        parse_hub(text)
        yield DataFile(text, "hub", weight, split)
    elif (folder := Path(split_query(text)[0])).is_dir():
        if is_saved(folder):
            yield DataFile(text, "saved", weight, split)
        elif text != split_query(text)[0]:
            raise UserError(
                f"{text}: ?split= needs a folder that datasets' save_to_disk wrote; name a file of {folder}"
            )
        else:
            yield from (DataFile(str(path), _kind(path), weight, split) for path in _in_folder(folder, split))
    elif not Path(text).is_file():
        raise UserError(
            f"{text}: no such file; expected a file or folder on this machine, or hf://datasets/OWNER/NAME; "
            "a relative path starts at the working directory"
        )
    else:
        if not Path(text).stat().st_size:
            raise UserError(no_examples(text, _kind(Path(text))))
        yield DataFile(text, _kind(Path(text)), weight, split)


def _in_folder(folder: Path, split: Split) -> list[Path]:
    """Return the file of a split in a folder, or its shards `train-00000-of-00002.parquet` in order."""
    kinds = "|".join(map(re.escape, SUFFIXES))
    pattern = re.compile(rf"({'|'.join(SPLIT_NAMES[split])})(-\d+-of-\d+)?({kinds})")
    found = {path: match for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))}
    if not found:
        names = f"{SPLIT_NAMES[split][0]}.jsonl (or {', '.join(list(SUFFIXES)[1:])})"
        raise UserError(f"{folder}: the folder holds no {split} file; expected {names}; add it, or name a file")
    if len({(match[1], match[2] is None, match[3]) for match in found.values()}) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: which is the {split} file: {names}? expected one; name it in the config")
    return list(found)


def _kind(path: Path) -> Kind:
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


def read_query(path: str, known: tuple[str, ...]) -> dict[str, str]:
    """Read `key=value&...` as it stands: a percent sign is a percent sign."""
    query: dict[str, str] = {}
    for part in filter(None, split_query(path)[1].split("&")):
        key, _, value = part.partition("=")
        if key not in known or not value or key in query:
            raise UserError(
                f"{path}: found {part!r}; expected {' and '.join(f'{name}=...' for name in known)}, each once"
            )
        query[key] = value
    return query
