"""What llama.cpp calls the tensors of a model, and where it keeps their rows: the names are the `gguf` package's table.

Some graphs of llama.cpp rotate neighbouring rows of a head together, Hugging Face row i with row i + head_dim / 2, so
the rows of q and k are stored in another order (convert_hf_to_gguf.py, `LlamaModel.permute`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import TensorNameMap, get_tensor_name_map

from common.engine import Array
from common.errors import UserError
from common.gguf.architectures import ARCHITECTURES, Architecture

HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


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

    def order(self, name: str, num_rows: int) -> Array | None:
        """Return the row of a GGUF tensor for each row of Hugging Face's (num_rows,); None where they are the same."""
        option = HEADS.get(name.split(".")[-2]) if self.architecture.permuted else None
        if option is None:
            return None
        heads = self.config.get(option) or self.config["num_attention_heads"]
        return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def to_gguf(self, name: str, values: Array) -> Array:
        """Return values (out, ...) as the tensor of that GGUF name holds them."""
        order = self.order(name, len(values))
        return self.shifted(name, values if order is None else values[np.argsort(order)], 1)

    def from_gguf(self, name: str, values: Array) -> Array:
        """Undo `to_gguf`."""
        order = self.order(name, len(values))
        return self.shifted(name, values if order is None else values[order], -1)

    def shifted(self, name: str, values: Array, sign: int) -> Array:
        """Add what llama.cpp expects to have been added to a norm's weight, or take it away."""
        return values + np.float32(sign * self.architecture.norm_offset) if name.endswith("norm.weight") else values


def gguf_names(config: Mapping[str, Any]) -> GgufNames:
    """Return the names for a model by its config.json; raises UserError for an architecture not in the table."""
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise UserError(
            f"model_type {config['model_type']}: not exported to GGUF here, only {', '.join(ARCHITECTURES)}; write "
            "--to merged and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    return GgufNames(architecture, config, get_tensor_name_map(architecture.graph, config["num_hidden_layers"]))
