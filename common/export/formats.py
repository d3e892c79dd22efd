"""The formats of `--to`: for each, what writes it, in which dtype, and how an engine opens what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from common.base.shards import SHARD_BYTES, dealt
from common.convert.request import quantization_of
from common.convert.source import open_source
from common.convert.writing import write_config, write_weights
from common.engine import Engine, mlx_target
from common.errors import UserError
from common.export.adapter import Adapter, read_tuned
from common.export.gguf_adapter import adapter_file, read_gguf_adapter, write_gguf_adapter
from common.export.gguf_model import model_file, read_gguf_model, write_gguf_model
from common.export.gguf_vocabulary import vocabulary_metadata
from common.export.merge import MergedModel
from common.export.merged import merged_config, write_merged
from common.export.mlx_folder import write_mlx
from common.export.peft_folder import write_peft
from common.export.readers import Format
from common.export.source import Source


@dataclass(frozen=True)
class Written:
    """Say what a written export holds, the dtype it is stored in, and how an engine opens it."""

    what: Literal["adapter", "weights"]
    stored: str
    open: Callable[[], Engine]


def check_dtype(to: Format, dtype: str | None) -> None:
    """Raise UserError for a dtype that a format doesn't have."""
    if dtype == "q8_0" and to != "merged-gguf":
        raise UserError(f"--dtype q8_0: is for --to merged-gguf; --to {to} takes float32, bfloat16 or float16")


def write(folder: Path, to: Format, adapter: Adapter, source: Source, engine: Engine, dtype: str | None) -> Written:
    """Write one format: adapters in float32 unless told, merged folders as the base is, merged GGUFs in float16."""
    if to == "merged":
        return _write_merged(folder, MergedModel(adapter, source, engine), source, dtype)
    if to == "merged-gguf":
        return _write_merged_gguf(
            folder, MergedModel(adapter, source, engine), source, dtype or "float16", engine.dtype
        )
    dtype = dtype or "float32"
    if to == "peft":
        write_peft(folder, adapter, source, engine, dtype)
        return Written("adapter", dtype, lambda: source.open(read_tuned(folder)))
    if to == "mlx":
        write_mlx(folder, adapter, source, engine, dtype)
        return Written("adapter", dtype, lambda: source.open(read_tuned(folder)))
    write_gguf_adapter(folder, adapter, source, dtype)
    return Written("adapter", dtype, lambda: source.open(read_gguf_adapter(folder / adapter_file(dtype), source)))


def quantise(folder: Path, bits: int, source: Source) -> Written:
    """Put a merged model that lies in `folder` into MLX's format of so many bits, in its place."""
    target = mlx_target(open_source(str(folder)), quantization_of(bits, None, None, []), None)
    with TemporaryDirectory(prefix=".twintune-", dir=folder.parent) as packed:
        write_weights(Path(packed), target, dealt(target.groups, SHARD_BYTES))
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        for path in Path(packed).iterdir():
            path.replace(folder / path.name)
    write_config(folder, target)
    return Written("weights", f"{bits} bits", lambda: source.open_for_mlx(folder))


def _write_merged(folder: Path, model: MergedModel, source: Source, dtype: str | None) -> Written:
    stored = [spec.dtype for spec in write_merged(folder, model, source, dtype)]
    return Written("weights", max(set(stored), key=stored.count), lambda: source.open_model(folder))


def _write_merged_gguf(folder: Path, model: MergedModel, source: Source, dtype: str, computed: str) -> Written:
    specs = model.specs(None)
    config = merged_config(source.model_config(), model, specs)
    vocabulary = vocabulary_metadata(source.tokenizer, source.stops(), config["vocab_size"])
    write_gguf_model(folder, config, vocabulary, specs, model.values(specs), dtype, source.base_name)

    def reopened() -> Engine:
        with TemporaryDirectory(prefix=".twintune-", dir=folder.parent) as read_back:
            path, names = folder / model_file(dtype), [spec.name for spec in specs]
            read_gguf_model(path, Path(read_back), config, names, computed)
            return source.open_model(Path(read_back))

    return Written("weights", dtype, reopened)
