"""Tokenised data on disk: written once, a chunk at a time, then mapped into memory by every later start.

A store is a folder named by a fingerprint of everything its tokens depend on, so it is never stale and never asked
whether it is. It appears by one rename. The cost: nobody deletes old ones; the folder is `$TWINTUNE_CACHE`, else
`~/.cache/twintune`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.data.sources import DataFile, split_query
from common.data.tokenise import DataReport, Recipe
from common.data.tokens import Chunk, Digest, Places, TokenDataset, starts_of
from common.engine import Array
from common.files import cache_folder, new_folder

FORMAT = 1  # of a store, and of what is done to the tokens in it: count up, and old stores are not found
ARRAYS = {
    **{"token_ids": np.int32, "loss_mask": np.bool_},
    **{"lengths": np.int32, "loss_lengths": np.int32, "files": np.int32, "lines": np.int64},
}
MAPPED = ("token_ids", "loss_mask")


def store_folder(recipe: Recipe, tokenizer_files: Sequence[Path]) -> Path:
    """Return where the store of a recipe is, or will be."""
    digest = hashlib.sha256()
    for file in tokenizer_files:
        digest.update(_content(file).encode())
    for data in recipe.files:
        digest.update(f"{data.kind}:{_identity(data)}".encode())
    config = recipe.config().model_dump(include={"format", "columns", "train_on", "truncation", "on_error"})
    digest.update(json.dumps([FORMAT, recipe.max_seq_length, config], sort_keys=True).encode())
    return cache_folder() / "data" / digest.hexdigest()[:32]


class StoreWriter:
    """Append chunks to the files of a store."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ARRAYS}
        self._digest = Digest()
        self._highest = -1

    def add(self, chunk: Chunk) -> None:
        """Append one chunk."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(getattr(chunk, name)).data)
        self._digest.add(chunk)
        if len(chunk.token_ids):
            self._highest = max(self._highest, int(chunk.token_ids.max()))

    def finish(self, report: DataReport) -> None:
        """Write what the arrays don't say."""
        for file in self._files.values():
            file.flush()
        summary = {
            "digest": self._digest.hexdigest(),
            "highest_token": self._highest,
            "report": dataclasses.asdict(report),
        }
        (self._folder / "store.json").write_text(json.dumps(summary), encoding="utf-8")


@contextlib.contextmanager
def new_store(folder: Path) -> Iterator[StoreWriter]:
    """Yield the writer of a store, which appears when the context ends well; raises UserError for a full disk."""
    with new_folder(folder, replace=True) as temporary, contextlib.ExitStack() as stack:
        yield StoreWriter(temporary, stack)


def open_store(folder: Path, labels: Sequence[str]) -> tuple[TokenDataset, DataReport] | None:
    """Map a store into memory; returns None where there is none."""
    try:
        summary = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    arrays = {name: _read(folder / f"{name}.bin", dtype, name in MAPPED) for name, dtype in ARRAYS.items()}
    dataset = TokenDataset(
        token_ids=arrays["token_ids"],
        loss_mask=arrays["loss_mask"],
        starts=starts_of(arrays["lengths"]),
        lengths=arrays["lengths"],
        loss_lengths=arrays["loss_lengths"],
        places=Places(labels, arrays["files"], arrays["lines"]),
        highest_token=summary["highest_token"],
        digest=summary["digest"],
    )
    return dataset, DataReport(**summary["report"])


def _read(path: Path, dtype: type, mapped: bool) -> Array:
    if mapped and path.stat().st_size:  # a file of nothing can't be mapped
        return np.memmap(path, dtype, mode="r")
    return np.fromfile(path, dtype)


def _identity(data: DataFile) -> str:
    """Return what a source's records depend on: the bytes of a file, the fingerprints of a saved data set."""
    path = Path(split_query(data.path)[0])
    if path.is_file():
        return _content(path)
    return data.path + "".join(state.read_text() for state in sorted(path.rglob("state.json")))


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
