"""A folder as transformers and bitsandbytes save one that they quantised, and load again as it is.

Which modules are packed is transformers' to say, by the torch engine; how is common/base/four_bit.py's and
eight_bit.py's, so that the same bytes come out on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.base.tensor_files import STORED, decode, encode
from common.base.tensors import Tensors
from common.convert.eight_bit_weights import EightBitWeights
from common.convert.four_bit_weights import FourBitWeights
from common.convert.source import Source
from common.convert.target import (
    Bounded,
    Chunk,
    Group,
    encode_floats,
    float_group,
    found_floats,
    main_dtype,
    plain_config,
    stored_dtype,
)
from common.engine import Array, packable_modules
from common.errors import UserError


class BitsandbytesTarget:
    """Write linear layers in NF4, FP4 or LLM.int8, and the rest in a dtype."""

    layout = "pt"

    def __init__(self, source: Source, dtype: str | None, quant_type: str, double: bool) -> None:
        """Ask transformers which modules are packed; raises UserError where the checkpoint names them otherwise."""
        self._source, self.stored = source, quant_type
        self._dtype = dtype = dtype or main_dtype(source)
        self._form = EightBitWeights(dtype) if quant_type == "int8" else FourBitWeights(quant_type, double, dtype)
        self._packed = {f"{module}.weight" for module in packable_modules(source.config, source.path)}
        if lost := sorted(self._packed - source.shapes.keys()):
            raise UserError(
                f"{source.path}: has no tensor {lost[0]} (and {len(lost) - 1} more of those to pack): transformers "
                "stacks or renames this model's tensors on loading, which packed ones don't allow; use --to hf"
            )
        self.groups = [
            Group(name, self._form.tensors(name, shape)) if name in self._packed else float_group(name, dtype, shape)
            for name, shape in source.shapes.items()
        ]
        packing = quantization_config(quant_type, double, dtype)
        self.config = {**plain_config(source.config, dtype), "quantization_config": packing}

    def encode(self, group: Group) -> Iterator[Chunk]:
        """Compute the bytes of a group, a block of rows after the other."""
        name, blocks = group.weight, self._source.blocks(group.weight)
        if name not in self._packed:
            return encode_floats(group, blocks)
        rounded = (_rounded(block, self._dtype) for block in blocks)
        return self._form.encode(name, self._source.shapes[name], rounded)

    def wanted(self, group: Group) -> Iterator[Array]:
        """Read the source's tensor."""
        return self._source.blocks(group.weight)

    def found(self, group: Group, written: Tensors) -> Iterator[Bounded]:
        """Read the written tensor and unpack it."""
        name = group.weight
        if name not in self._packed:
            return found_floats(group, written, stored_dtype(self._source, name))
        return self._form.found(name, self._source.shapes[name], written)


def quantization_config(quant_type: str, double: bool, dtype: str) -> dict[str, Any]:
    """Return what transformers writes into the config.json of a model that bitsandbytes packed."""
    four = quant_type != "int8"
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": quant_type if four else "fp4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }


def _rounded(block: Array, dtype: str) -> Array:
    """Round float32 numbers to a dtype, as transformers casts a weight before it is packed."""
    return decode(encode(block, dtype), STORED[dtype][0]).reshape(block.shape)
