"""What llama.cpp calls a model's parts, and where it keeps their rows.

The names are the `gguf` package's own table. What that table doesn't hold is here, one line an architecture: which
graph of llama.cpp a model_type runs on, and whether that graph turns neighbouring rows of q and k together, so that
they have to be stored in another order (llama.cpp, convert_hf_to_gguf.py, `LlamaModel.permute`). An architecture that
the tests have not run in llama.cpp is not listed, and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from common.base.gguf import unpermuted_rows
from common.engine import Array
from common.errors import UserError

HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


@dataclass(frozen=True)
class Architecture:
    """Say how llama.cpp holds a kind of model."""

    graph: MODEL_ARCH
    permuted: bool = False  # rows of q and k
    norm_offset: float = 0.0  # what llama.cpp expects to have been added to a norm's weight

    @property
    def name(self) -> str:
        """Give `general.architecture`."""
        return MODEL_ARCH_NAMES[self.graph]


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, norm_offset=1.0),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, norm_offset=1.0),
}


@dataclass(frozen=True)
class GgufNames:
    """Name the tensors of one model, and order and shift their values as llama.cpp wants them."""

    architecture: Architecture
    config: Mapping[str, Any]
    table: TensorNameMap

    def name(self, tensor: str) -> str:
        """Return llama.cpp's name of `model.layers.0.mlp.up_proj.weight`; raises UserError where it has none."""
        found = self.table.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"llama.cpp has no place for {tensor} in its {self.architecture.name} models")
        return found

    def rows(self, name: str, count: int) -> Array | None:
        """Return which Hugging Face row stands at each row of a GGUF tensor; None where the order is the same."""
        option = HEADS.get(name.split(".")[-2]) if self.architecture.permuted else None
        if option is None:
            return None
        heads = self.config.get(option) or self.config["num_attention_heads"]
        return np.argsort(unpermuted_rows(count, heads))

    def to_gguf(self, name: str, values: Array) -> Array:
        """Return values (out, ...) as the tensor of that GGUF name holds them."""
        if name.endswith("norm.weight"):
            return values + np.float32(self.architecture.norm_offset)
        rows = self.rows(name, len(values))
        return values if rows is None else values[rows]

    def from_gguf(self, name: str, values: Array) -> Array:
        """Undo `to_gguf`."""
        if name.endswith("norm.weight"):
            return values - np.float32(self.architecture.norm_offset)
        rows = self.rows(name, len(values))
        return values if rows is None else values[np.argsort(rows)]


def gguf_names(config: Mapping[str, Any]) -> GgufNames:
    """Return the names for a model by its config.json; raises UserError for an architecture not in the table."""
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise UserError(
            f"model_type {config['model_type']}: not exported to GGUF here, only {', '.join(ARCHITECTURES)}; write "
            "--to merged and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    return GgufNames(architecture, config, get_tensor_name_map(architecture.graph, config["num_hidden_layers"]))
