"""Weights in several files, as Hugging Face names and lists them: model-00001-of-00003.safetensors and an index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

SHARD_BYTES = 5_000_000_000  # what Hugging Face writes
INDEX = "model.safetensors.index.json"


class Sized(Protocol):
    """Be anything that takes room in a file."""

    @property
    def num_bytes(self) -> int:
        """Count the bytes that it takes."""


Item = TypeVar("Item", bound=Sized)


def dealt(items: Iterable[Item], limit: int) -> dict[str, list[Item]]:
    """Deal items, in order, to files of at most `limit` bytes, a larger one to a file of its own; by file name."""
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_index(folder: Path, tensors: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write the index of the tensors' names by file; a model of one file has none."""
    if len(tensors) > 1:
        names = {name: file for file, inside in tensors.items() for name in inside}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
