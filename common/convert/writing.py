"""A target's weights on the disk, shard by shard: each appears whole by one rename, and stays if the next one fails.

Within a shard tensors lie with the largest numbers first, as safetensors has them, for readers that map them; their
bytes come in another order and are put in their places.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from common.base.shards import write_index
from common.base.tensor_files import header_of
from common.convert.target import Chunk, Group, Target
from common.errors import UserError
from common.files import sync, write_text

Advance = Callable[[int], None]  # is told of further bytes


def write_weights(
    folder: Path,
    target: Target,
    shards: Mapping[str, Sequence[Group]],
    finished: Collection[str] = (),
    on_shard: Callable[[str], None] = lambda name: None,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write the shards that are not finished, and the index.

    Raises UserError for a number that its dtype can't hold.
    """
    for name, groups in shards.items():
        if name not in finished:
            write_shard(folder / name, target, groups, advance)
            on_shard(name)
    names = {file: [tensor.name for group in groups for tensor in group.tensors] for file, groups in shards.items()}
    write_index(folder, names, sum(group.num_bytes for group in target.groups))


def write_shard(path: Path, target: Target, groups: Sequence[Group], advance: Advance) -> None:
    """Write one file beside its place and rename it."""
    tensors = [tensor for group in groups for tensor in group.tensors]
    tensors.sort(key=lambda tensor: (-tensor.item_bytes, tensor.name))
    header = header_of(((each.name, each.dtype, each.shape, each.num_bytes) for each in tensors), target.layout)
    places, offset = {}, len(header)
    for tensor in tensors:
        places[tensor.name] = offset
        offset += tensor.num_bytes
    ends = {tensor.name: places[tensor.name] + tensor.num_bytes for tensor in tensors}
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for group in groups:
                for name, data in _bytes_of(group, target):
                    file.seek(places[name])
                    file.write(data)
                    places[name] += len(data)
                    advance(len(data))
            file.flush()
            os.fsync(file.fileno())
        assert places == ends, "a tensor came out with another size than was planned"
        temporary.rename(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes_of(group: Group, target: Target) -> Iterator[Chunk]:
    try:
        yield from target.encode(group)
    except OverflowError as error:
        raise UserError(f"tensor {group.weight} {error}") from None


def write_config(folder: Path, target: Target) -> None:
    """Write config.json, with which a folder becomes a model."""
    write_text(folder / "config.json", json.dumps(dict(target.config), indent=2) + "\n")
