"""Where a conversion reads from: a model under Hugging Face's names, as blocks of float32 rows, whatever packed it.

All kinds look alike here, so that each target is written once. What a kind can't give under those names is refused when
it is opened, before anything is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.base.hub import PATTERNS, resolve_model
from common.base.quantized import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, MLX, stored_format
from common.base.shards import INDEX
from common.base.tensors import Tensors
from common.base.weights import read_metadata, read_model_config, weight_files
from common.engine import Array
from common.errors import UserError

RECORD = "twintune_conversion.json"
PACKED_KEYS = ("quantization", "quantization_config")


class Source(Protocol):
    """Give a model: names and shapes as Hugging Face has them, its config, its other files, its weights."""

    @property
    def path(self) -> Path:
        """Give the folder or file."""

    @property
    def kind(self) -> str:
        """Say what it is, as a person would."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Give config.json without what says how weights are packed."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Give the shape of each tensor."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Give what each tensor is stored as, or was before it was packed."""

    @property
    def packed(self) -> Collection[str]:
        """Name the tensors that are unpacked in float32, and are of a dtype only once they are rounded to it."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Give tokenizer, template and generation_config.json."""

    @property
    def inputs(self) -> Sequence[Path]:
        """List all files that are read."""

    def blocks(self, name: str) -> Iterator[Array]:
        """Read a tensor as float32, a block of rows after the other."""


@dataclass(frozen=True)
class FolderSource:
    """Give a model folder whose weights are stored as floats: Hugging Face's own, or MLX's of a layout that is that."""

    path: Path
    kind: str
    config: dict[str, Any]
    tensors: Tensors
    files: Mapping[str, bytes]
    inputs: Sequence[Path]
    is_mlx: bool  # its names and layouts are mlx-lm's, which may be others
    packed: Collection[str] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Give the shapes."""
        return {name: self.tensors.shape(name) for name in self.tensors}

    @property
    def dtypes(self) -> dict[str, str]:
        """Give what each tensor is stored as."""
        return {name: self.tensors.dtype(name) for name in self.tensors}

    def blocks(self, name: str) -> Iterator[Array]:
        """Read a tensor as float32, a block of rows after the other."""
        return self.tensors.blocks(name)


def open_source(model: str) -> Source:
    """Open a model folder, a model of the Hub, or a GGUF file; nothing but headers is read.

    Raises UserError for what is not there, and for what can't be read as floats under known names.
    """
    path = Path(model).expanduser()
    if path.is_file() or path.suffix == ".gguf":
        from common.convert.from_gguf import GgufSource

        return GgufSource(path)
    path = resolve_model(model)
    config = read_model_config(path)
    stored = stored_format(config)
    folder = open_folder(path, config)
    if stored in (BITSANDBYTES_4BIT, BITSANDBYTES_8BIT):
        from common.convert.from_bitsandbytes import BitsandbytesSource

        return BitsandbytesSource(folder, config)
    if stored == MLX:
        from common.convert.from_mlx import MlxSource

        return MlxSource(folder, config)
    if stored:
        raise UserError(
            f"{path}: its weights are packed by {stored}, which convert can't read; expected floats, bitsandbytes' or "
            "MLX's formats, or a GGUF file; take the model that it was made from"
        )
    for name in folder.tensors:
        if not folder.tensors.is_float(name):
            raise UserError(
                f"{folder.tensors.path(name)}: {name} is stored as {folder.tensors[name]['dtype']}; expected F64, F32, "
                "F16 or BF16; take another release of this model"
            )
    return folder


def open_folder(path: Path, config: Mapping[str, Any]) -> FolderSource:
    """Read the headers and the small files of a model folder."""
    weights = weight_files(path)
    patterns = [pattern for pattern in (*PATTERNS, "*.py") if not pattern.endswith(".safetensors")]
    others = [each for pattern in patterns for each in sorted(path.glob(pattern)) if each.name != RECORD]
    files = {each.name: each.read_bytes() for each in others if each.name not in ("config.json", INDEX)}
    plain = {key: value for key, value in config.items() if key not in PACKED_KEYS}
    is_mlx = any(read_metadata(each).get("format") == "mlx" for each in weights)
    kind = "MLX folder" if is_mlx else "Hugging Face folder"
    return FolderSource(path, kind, plain, Tensors(weights), files, [*weights, *others], is_mlx)
