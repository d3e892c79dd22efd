"""Model folders as mlx-lm's converter makes them, written weight by weight.

A parameter that is one of the checkpoint's tensors, or a stack of them (experts), is read, rounded and packed some rows
at a time. What mlx-lm makes in another way (shifted norms, parts of a tensor) is computed by its own code, whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from common.base.tensor_files import encode
from common.base.tensors import Tensors, row_blocks
from common.config import QuantizationConfig
from common.convert.source import Source
from common.convert.target import (
    NAMES,
    ROUNDING,
    Bounded,
    Chunk,
    Group,
    StoredTensor,
    encode_floats,
    found_floats,
    main_dtype,
    plain_config,
    stored_dtype,
)
from common.engine import Array
from mlx_backend.blueprint import lay_out, quantize_as_asked, refuse_dropped, words_for_mlx_lm
from mlx_backend.dialect import refuse_unlike

DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}
# How far a number may be from what it was, in scales of its group. Affine codes reach a step too short where the
# offset was moved to a whole code; the small floats are half a step of their largest (6, 448) apart.
STEPS = {"affine": 1.0, "mxfp4": 1.0, "mxfp8": 16.0, "nvfp4": 1.0}
SMALLEST_SCALE = 3 * 2.0**-9  # below it nvfp4's own scales are rounded by more than a group's numbers are


def dequantize(parts: Sequence[Array], form: Mapping[str, Any]) -> Array:
    """Unpack rows in one of MLX's formats, codes, scales and biases where it has them, to float32."""
    arrays = [mx.array(np.ascontiguousarray(part)) for part in parts]
    return np.array(mx.dequantize(*arrays, **form, dtype=mx.float32))


class MlxTarget:
    """Write what mlx-lm's own converter would."""

    layout = "mlx"

    def __init__(self, source: Source, quantization: QuantizationConfig, dtype: str | None) -> None:
        """Plan the folder; raises UserError for a model that mlx-lm lacks, or computes or represents otherwise."""
        refuse_unlike(source.path, source.config, max_seq_length=1)
        model, self._origins = lay_out(source)
        refuse_dropped(source, model, self._origins)
        self._source = source
        before = {path: NAMES[DTYPES[array.dtype]] for path, array in tree_flatten(model.parameters())}
        is_cast = getattr(model, "cast_predicate", lambda path: True)
        self._dtypes = {path: dtype if dtype and is_cast(path) else own for path, own in before.items()}
        self._before = before | {path: stored_dtype(source, parts[0]) for path, parts in self._origins.items()}
        self.stored = dtype or main_dtype(source)
        self.config = {**plain_config(source.config, self.stored), **words_for_mlx_lm(source.config)}
        _cast(model, self._dtypes)
        if quantization.way:
            packing = quantize_as_asked(model, quantization, source)
            self.stored = f"{packing['bits']} bits"
            self.config |= {"quantization": packing, "quantization_config": packing}
        self._forms = {f"{path}.weight": _form(module) for path, module in model.named_modules() if "scales" in module}
        self.groups = _groups(dict(tree_flatten(model.parameters())), self._forms)
        self._made: dict[str, dict[str, mx.array]] = {}

    def encode(self, group: Group) -> Iterator[Chunk]:
        """Compute the bytes of a group, a block of rows after the other."""
        blocks, form = self._blocks(group.weight, "encode"), self._forms.get(group.weight)
        if form is None:
            yield from encode_floats(group, blocks)
            return
        dtype = self._dtypes[group.weight]
        for block in blocks:
            numbers = np.frombuffer(encode(block, dtype), "<u4" if dtype == "float32" else "<u2").reshape(block.shape)
            parts = mx.quantize(mx.array(numbers).view(getattr(mx, dtype)), **form)
            for tensor, part in zip(group.tensors, parts, strict=True):
                yield tensor.name, np.array(part.view(mx.uint8)).tobytes()
        mx.clear_cache()

    def wanted(self, group: Group) -> Iterator[Array]:
        """Read the source's tensors, or compute what mlx-lm makes of them."""
        return self._blocks(group.weight, "wanted")

    def found(self, group: Group, written: Tensors) -> Iterator[Bounded]:
        """Read the written tensor, and unpack it where it is packed."""
        form = self._forms.get(group.weight)
        if form is None:
            return found_floats(group, written, self._before[group.weight])
        return self._unpacked(group, form, written)

    def _unpacked(self, group: Group, form: Mapping[str, Any], written: Tensors) -> Iterator[Bounded]:
        """Unpack a weight; scales and offsets, too, were rounded to the dtype."""
        names = [tensor.name for tensor in group.tensors]
        slack = 2 * ROUNDING[self._dtypes[group.weight]]
        *rows, packed = written.shape(names[0])
        for start, stop in row_blocks((*rows, packed * 32 // form["bits"])):
            parts = [written.rows(name, start, stop) for name in names]
            bounds = _scales(parts[1], form["mode"]) * (STEPS[form["mode"]] + slack * 2.0 ** form["bits"])
            if form["mode"] == "affine":
                bounds += np.abs(parts[2]) * slack
            numbers = dequantize(parts, form)
            yield numbers, np.repeat(bounds, form["group_size"], axis=-1) + np.abs(numbers) * slack

    def _blocks(self, path: str, use: str) -> Iterator[Array]:
        """Read a parameter, or compute it; once for each use, as what is computed stays in its array till that goes."""
        if path in self._origins:
            for name in self._origins[path]:
                yield from self._source.blocks(name)
            return
        if use not in self._made:
            parameters = tree_flatten(lay_out(self._source)[0].parameters())
            self._made[use] = {name: array for name, array in parameters if name not in self._origins}
        value = self._made[use].pop(path)
        mx.eval(value)
        for start, stop in row_blocks(value.shape):
            yield np.array(value[start:stop].astype(mx.float32))


def _cast(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Put arrays of other dtypes in a model's place, unread: what is packed takes its dtype from them."""
    shapes = [(path, array.shape) for path, array in tree_flatten(model.parameters())]
    model.load_weights([(path, mx.zeros(shape, getattr(mx, dtypes[path]))) for path, shape in shapes])


def _form(module: nn.Module) -> dict[str, Any]:
    return {"bits": module.bits, "group_size": module.group_size, "mode": module.mode}


def _groups(parameters: Mapping[str, mx.array], forms: Mapping[str, object]) -> list[Group]:
    """Put codes, scales and biases of a packed weight together; any other parameter is a group of its own."""
    parts = {path: [f"{path.removesuffix('.weight')}.{part}" for part in ("scales", "biases")] for path in forms}
    inside = {name for names in parts.values() for name in names}
    groups = []
    for path in parameters:
        if path not in inside:
            names = [path, *(name for name in parts.get(path, ()) if name in parameters)]
            tensors = [StoredTensor(name, DTYPES[parameters[name].dtype], parameters[name].shape) for name in names]
            groups.append(Group(path, tuple(tensors)))
    return groups


def _scales(stored: Array, mode: str) -> Array:
    """Return the sizes of the scales that a mode's bytes mean, float32."""
    if mode in ("mxfp4", "mxfp8"):
        return np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
    if mode == "nvfp4":
        return np.maximum(np.array(mx.from_fp8(mx.array(stored), mx.float32)), np.float32(SMALLEST_SCALE))
    return np.abs(stored)
