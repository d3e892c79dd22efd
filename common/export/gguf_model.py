"""A whole model as one GGUF file, written tensor by tensor, and read back into a Hugging Face folder.

Matrices are stored in the dtype asked for, vectors always in float32, as llama.cpp wants them. Q8_0 packs 32 numbers
of a row together; a matrix whose rows are no multiple of 32 long stays in float16.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape, quantize

from common.base.tensor_files import TensorSpec, write_safetensors
from common.base.weights import rope_in_both_forms
from common.engine import Array
from common.export.gguf_metadata import add_metadata, model_metadata
from common.gguf.file import read_gguf
from common.gguf.names import gguf_names
from common.gguf.rope import frequency_factors

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
MODELFILE = """\
# ollama create NAME -f Modelfile
FROM ./{model}
"""


def model_file(dtype: str) -> str:
    """Name the file."""
    return f"model-{TYPES[dtype].lower()}.gguf"


def write_gguf_model(
    folder: Path,
    config: Mapping[str, Any],
    vocabulary: Mapping[str, Any],
    specs: list[TensorSpec],
    values: Iterable[Array],
    dtype: str,
    title: str,
) -> None:
    """Write float32 `values`, named and shaped by `specs`, with settings, vocabulary and a Modelfile.

    Raises UserError for a model or tokenizer that llama.cpp can't express.
    """
    names = gguf_names(config)
    metadata = {**model_metadata(names, title, dtype), **vocabulary}
    tensors = [(names.name(spec.name), spec.shape, _kind(spec.shape, dtype)) for spec in specs]
    factors = frequency_factors(config)
    writer = GGUFWriter(folder / model_file(dtype), names.architecture.name)
    writer.add_type("model")
    add_metadata(writer, metadata)
    tensors += [(name, array.shape, GGMLQuantizationType.F32) for name, array in factors.items()]
    for name, shape, kind in tensors:
        _announce(writer, name, shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, _, kind), array in zip(tensors, chain(values, factors.values()), strict=True):
        ordered = array if name in factors else names.to_gguf(name, array)
        writer.write_tensor_data(quantize(np.ascontiguousarray(ordered), kind))
    writer.close()
    (folder / "Modelfile").write_text(MODELFILE.format(model=model_file(dtype)), encoding="utf-8")


def read_gguf_model(path: Path, folder: Path, config: Mapping[str, Any], tensors: Iterable[str], dtype: str) -> None:
    """Write the tensors of a GGUF as a Hugging Face folder for an engine to open, under the names of `tensors`."""
    names = gguf_names(config)
    stored = read_gguf(path).tensors
    sources = {name: stored[names.name(name)] for name in tensors}
    specs = [TensorSpec(name, source.shape, dtype) for name, source in sources.items()]
    values = (names.from_gguf(source.name, source.read()) for source in sources.values())
    write_safetensors(folder / "model.safetensors", specs, values)
    text = json.dumps({**config, **rope_in_both_forms(dict(config))})
    (folder / "config.json").write_text(text, encoding="utf-8")


def _kind(shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[TYPES[dtype]]
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
    stored = shape if plain else quant_shape_to_byte_shape(shape, kind)
    dtype = np.dtype(plain or np.uint8)
    writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=kind)
