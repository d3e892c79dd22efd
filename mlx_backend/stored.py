"""Weights that a checkpoint holds in bitsandbytes' 4 bits, taken as they are.

mlx-lm builds a model, lets it rename a checkpoint's tensors (`sanitize`) and then demands that names and parameters
match. A subclass of the model's class steps in at the renaming, the one place between the two: it puts layers for
packed weights into the model and gives their scales the names of those layers' parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.base.four_bit import WeightDescription, described_modules
from mlx_backend.frozen import FourBitLinear
from mlx_backend.lora import module_at
from mlx_backend.names import followed_classes
from mlx_backend.nf4 import Format, Scales

SCALES = ("absmax", "nested_absmax", "nested_quant_map")  # after `<module>.weight.`; the offset is in the description


def classes_for_packed(dtype: mx.Dtype) -> Callable[[dict[str, Any]], tuple[type[nn.Module], type]]:
    """Return what load_model takes as `get_model_classes`: followed ones that take bitsandbytes' weights, too."""

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        model_class, arguments = followed_classes(config)

        def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            stored = _take_stored(weights)
            return _put_in(self, model_class.sanitize(self, weights), stored, dtype)

        return type(model_class.__name__, (model_class,), {"sanitize": sanitize}), arguments

    return classes


def _take_stored(weights: dict[str, mx.array]) -> dict[int, tuple[mx.array, Scales, Format]]:
    """Take the 4-bit weights' scales and descriptions out of a checkpoint's tensors; by the identity of the codes.

    mlx-lm may rename the tensors in between, but not what they are.
    """
    stored = {}
    for module, description in described_modules(weights).items():
        about = WeightDescription.parse(weights.pop(description))
        weights.pop(f"{module}.weight.quant_map")  # the code book, which the type says
        codes = weights[f"{module}.weight"] = weights[f"{module}.weight"].view(mx.uint8)
        parts = [weights.pop(f"{module}.weight.{name}", None) for name in SCALES]
        offset = None if about.nested_offset is None else mx.array(about.nested_offset, mx.float32)
        stored[id(codes)] = codes, Scales(*parts, offset), Format(about.quant_type, about.shape, about.block)
    return stored


def _put_in(
    model: nn.Module,
    weights: dict[str, mx.array],
    stored: Mapping[int, tuple[mx.array, Scales, Format]],
    dtype: mx.Dtype,
) -> dict[str, mx.array]:
    """Give a model layers for stored 4-bit weights, and their scales the names of those layers' parameters."""
    paths = {id(array): name.removesuffix(".weight") for name, array in weights.items()}
    weights = dict(weights)
    for key, (codes, scales, form) in stored.items():
        if key not in paths:
            raise ValueError("mlx-lm cuts or stacks weights of this architecture, which packed ones don't allow")
        parent, _, name = paths[key].rpartition(".")
        inside = module_at(model, parent)
        inside[name] = FourBitLinear(codes, scales, form, dtype, inside[name].get("bias"))
        weights |= {f"{paths[key]}.{part}": array for part, array in vars(scales).items() if array is not None}
    return weights
