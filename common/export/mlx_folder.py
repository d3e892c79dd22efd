"""An adapter as mlx-lm keeps it: adapters.safetensors and its own adapter_config.json, in a folder `mlx/` of their own.

mlx-lm puts LoRA into the last n layers, the same modules in each, with one rank and one factor. So ranks are made
one with zeros, factors go into B, and a layer that lacks a module which another has gets zeros. Its matrices are
PEFT's transposed: a (in, r), b (r, out). The folder is apart because PEFT's file has the same name, and because
SGLang loads every safetensors file that lies beside an adapter's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.adapters.adapter import CONFIG_NAME
from common.base.tensor_files import TensorSpec, write_safetensors
from common.engine import Engine
from common.errors import UserError
from common.export.adapt import layer_of, one_rank, refuse, with_zeros
from common.export.adapter import Adapter
from common.export.source import Source

WEIGHTS = "adapters.safetensors"
FOLDER = "mlx"


def write_mlx(folder: Path, adapter: Adapter, source: Source, engine: Engine, dtype: str) -> None:
    """Write the two files into `folder`; raises UserError for what mlx-lm has no place for."""
    refuse(adapter, "an mlx-lm adapter")
    adapter = one_rank(_filled(adapter, source, engine))
    part = next(iter(adapter.parts.values()))
    config = {
        "fine_tune_type": "dora" if adapter.is_dora else "lora",
        "model": source.base_name,
        "num_layers": _layers(source.model_config()) - _first_layer(adapter),
        "lora_parameters": {
            "rank": part.rank,
            "scale": part.scale,
            "dropout": adapter.lora.lora_dropout,
            "keys": sorted({_key(module) for module in adapter.parts}),
        },
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    tensors = {}
    for module, part in adapter.parts.items():
        tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"] = part.a.T, part.b.T
        if part.magnitude is not None:
            tensors[f"{module}.m"] = part.magnitude
    specs = [TensorSpec(name, tensor.shape, dtype) for name, tensor in tensors.items()]
    write_safetensors(folder / WEIGHTS, specs, tensors.values())


def _filled(adapter: Adapter, source: Source, engine: Engine) -> Adapter:
    """Add zeros where a layer from the first adapted one on lacks a module that another layer has."""
    first, keys = _first_layer(adapter), {_key(module) for module in adapter.parts}
    places = ((module, layer_of(module)) for module in source.matrices())
    return with_zeros(adapter, [module for module, at in places if at and at[0] >= first and at[1] in keys], engine)


def _first_layer(adapter: Adapter) -> int:
    return min((at[0] for module in adapter.parts if (at := layer_of(module))), default=0)


def _key(module: str) -> str:
    """Name a module as mlx-lm's `keys` do: within its layer, or whole where it is in none."""
    at = layer_of(module)
    return at[1] if at else module


def _layers(config: dict[str, Any]) -> int:
    text = config.get("text_config") or config
    if not isinstance(text.get("num_hidden_layers"), int):
        raise UserError("config.json of the base names no num_hidden_layers, by which mlx-lm counts layers")
    return int(text["num_hidden_layers"])
