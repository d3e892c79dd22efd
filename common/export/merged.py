"""A merged model as a Hugging Face folder: shards, index, config, tokenizer; transformers and mlx-lm both load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from common.base.shards import SHARD_BYTES, dealt, write_index
from common.base.tensor_files import TensorSpec, write_safetensors
from common.base.weights import rope_in_both_forms
from common.export.merge import MergedModel
from common.export.source import Source

COPIED = ("generation_config.json",)
PACKED_KEYS = ("quantization_config", "quantization")


def write_merged(folder: Path, model: MergedModel, source: Source, dtype: str | None) -> list[TensorSpec]:
    """Write the merged model; returns what was written. Raises OverflowError where a weight doesn't fit its dtype."""
    specs = model.specs(dtype)
    shards = dealt(specs, SHARD_BYTES)
    names = {file: [spec.name for spec in shard] for file, shard in shards.items()}
    write_index(folder, names, sum(spec.num_bytes for spec in specs))
    for file, shard in shards.items():
        write_safetensors(folder / file, shard, model.values(shard))
    config = merged_config(source.model_config(), model, specs)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    source.copy_tokenizer(folder)
    for name in COPIED:
        if (source.base / name).is_file():
            shutil.copyfile(source.base / name, folder / name)
    return specs


def merged_config(config: dict[str, Any], model: MergedModel, specs: list[TensorSpec]) -> dict[str, Any]:
    """Return the base's config.json for the merged weights: unpacked, RoPE in both forms, the dtype they have."""
    merged = {key: value for key, value in config.items() if key not in PACKED_KEYS} | rope_in_both_forms(config)
    stored = [spec.dtype for spec in specs]
    dtype = max(set(stored), key=stored.count)
    merged |= {"dtype": dtype, "torch_dtype": dtype}
    rows = next((spec.shape[0] for spec in specs if spec.name.endswith("embed_tokens.weight")), None)
    if rows and "vocab_size" in merged:
        merged["vocab_size"] = rows
    if model.unties:
        merged["tie_word_embeddings"] = False
    return merged
