"""The weights of base and adapter as one, tensor by tensor, in float32: W + scale B A, and DoRA's magnitudes.

What the base stores as floats is read from its files, which are exact. What it, or the run, holds in fewer bits
comes dequantised from the engine, so that the adapter meets the weights it was trained on; rounding the sum to those
bits again would round a small adapter away.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from common.base.tensor_files import TensorSpec
from common.base.tensors import default_dtype, model_tensors
from common.engine import Array, Engine
from common.errors import UserError
from common.export.adapter import Adapter, Part
from common.export.source import Source
from common.lora import HEAD

EMBEDDING = "model.embed_tokens"
# What lies beside a packed `<module>.weight` and means nothing without it, of MLX and bitsandbytes.
PACKING = (".scales", ".biases", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax")
PACKING_INSIDE = (".weight.quant_state.", ".weight.nested_quant_map", ".SCB", ".weight_format")


def merged_weight(weight: Array, part: Part) -> Array:
    """Return the float32 weight (out, in) that computes what base and adapter do together (DoRA: arXiv:2402.09353)."""
    tuned = weight + np.float32(part.scale) * (part.b @ part.a)
    if part.magnitude is None:
        return tuned
    return tuned * (part.magnitude / np.linalg.norm(tuned, axis=1))[:, None]


class MergedModel:
    """Know the tensors of the merged model and compute each when asked."""

    def __init__(self, adapter: Adapter, source: Source, engine: Engine) -> None:
        """Look at the base's headers; raises UserError where a module of the adapter has no tensor there."""
        self._adapter = adapter
        self._engine = engine
        self._base = model_tensors(source.base)
        self._packed = source.quantised
        self._default = default_dtype(source.model_config(), self._base)
        self.unties = f"{HEAD}.weight" not in self._base and HEAD in {*adapter.parts, *adapter.saved}
        lost = [module for module in (*adapter.parts, *adapter.saved) if not self._has(module)]
        if lost:
            raise UserError(
                f"{source.base}: the checkpoint has no tensor {lost[0]}.weight (and {len(lost) - 1} more that the "
                "adapter changes): the engine names modules otherwise, so they can't be merged here"
            )

    def specs(self, dtype: str | None) -> list[TensorSpec]:
        """List the tensors to write, in a dtype or else in those of the base."""
        names = [name for name in self._base if not is_packing(name)]
        head = [f"{HEAD}.weight"] if self.unties else []
        return [TensorSpec(name, self._shape(name), dtype or self._dtype(name)) for name in (*names, *head)]

    def values(self, specs: list[TensorSpec]) -> Iterator[Array]:
        """Compute the float32 values of tensors, one after the other."""
        for spec in specs:
            yield self.value(spec.name)

    def value(self, name: str) -> Array:
        """Compute one tensor as float32."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._adapter.saved:
            return self._adapter.saved[module]
        part = self._adapter.parts.get(module) if name.endswith(".weight") else None
        weight = self._frozen(name, module)
        return merged_weight(weight, part) if part else weight

    def _has(self, module: str) -> bool:
        return f"{module}.weight" in self._base or (module == HEAD and self.unties)

    def _frozen(self, name: str, module: str) -> Array:
        if name not in self._base:  # a head that is the embedding until something changes it
            return self._frozen(f"{EMBEDDING}.weight", EMBEDDING)
        if self._is_packed(name):
            return self._engine.base_weight(module)
        return self._base.read(name)

    def _is_packed(self, name: str) -> bool:
        if not self._base.is_float(name):
            return True
        by_run = self._packed and ".layers." in name and len(self._base.shape(name)) == 2
        return by_run and name.endswith(".weight")

    def _shape(self, name: str) -> tuple[int, ...]:
        module = name.removesuffix(".weight")
        if module in self._adapter.saved:
            return self._adapter.saved[module].shape
        if name not in self._base:
            return self._shape(f"{EMBEDDING}.weight")
        return self._base.shape(name) if self._base.is_float(name) else self._engine.base_weight(module).shape

    def _dtype(self, name: str) -> str:
        return self._base.dtype(name) if name in self._base and self._base.is_float(name) else self._default


def is_packing(name: str) -> bool:
    """Tell whether a tensor is part of how another one is packed."""
    return name.endswith(PACKING) or any(inside in name for inside in PACKING_INSIDE)
