"""twintune_conversion.json: what a folder was made of and how, and while it is being made, how far that came.

It is the base's fingerprint: each file that was read with its sha256, the Hub's revision where the path tells one, the
options and the versions. The same file makes a conversion resumable: source and options must be what they were.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.convert.source import RECORD, Source
from common.errors import UserError
from common.files import write_text

LIBRARIES = ("numpy", "gguf", "mlx", "mlx-lm", "transformers", "bitsandbytes")
BLOCK_BYTES = 1 << 22


def fingerprint_files(
    paths: Sequence[Path], known: Mapping[str, Any], advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Return size, time and sha256 of files, by name; a sum that is `known` of one unchanged since is taken over."""
    found = {}
    for path in paths:
        stat = path.stat()
        entry: dict[str, Any] = {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        before = known.get(path.name) or {}
        if entry == {key: before.get(key) for key in entry}:
            advance(stat.st_size)
            entry["sha256"] = before["sha256"]
        else:
            entry["sha256"] = _sha256(path, advance)
        found[path.name] = entry
    return found


def new_record(source: Source, files: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a conversion that begins."""
    return {
        "source": {"path": str(source.path), "kind": source.kind, **hub_revision(source.path), "files": dict(files)},
        "options": dict(options),
        "versions": versions(),
        "shards": [],
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List what makes a begun conversion another than the one asked for."""
    before, after = old["options"], new["options"]
    found = [f"{key}: {before.get(key)} -> {value}" for key, value in after.items() if before.get(key) != value]
    found += ["versions changed"] * (old["versions"] != new["versions"])
    sums = [{name: entry["sha256"] for name, entry in record["source"]["files"].items()} for record in (old, new)]
    return found + [
        f"{name} changed" for name in sorted({*sums[0], *sums[1]}) if sums[0].get(name) != sums[1].get(name)
    ]


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a folder; None where there is none. Raises UserError for one that can't be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(record["options"], dict) and isinstance(record["source"]["files"], dict)
        return dict(record)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path}: no record of a conversion; remove the folder, or name another --output") from None


def save_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace the record of a folder."""
    write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def hub_revision(path: Path) -> dict[str, str]:
    """Return the Hub's repository and commit of a folder or file in its cache, by the path; nothing of any other."""
    parts = path.absolute().parts
    for index, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[index + 1] == "snapshots":
            return {"repository": part.removeprefix("models--").replace("--", "/"), "revision": parts[index + 2]}
    return {}


def versions() -> dict[str, str]:
    """Return the versions of twintune and of the libraries that may take part."""
    found = {}
    for name in ("twintune", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(BLOCK_BYTES):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()
