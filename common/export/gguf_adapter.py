"""A LoRA adapter as llama.cpp and Ollama load it: one GGUF file, and a Modelfile that names it.

llama.cpp multiplies B A by one alpha over each tensor's own rank, so factors that differ go into B. Where a graph
wants the rows of q and k in another order, B's rows are; A's are not, as they only meet the input.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, Keys
from gguf.quants import quantize

from common.config import LoraConfig
from common.errors import UserError
from common.export.adapt import one_alpha, refuse
from common.export.adapter import Adapter, Part
from common.export.source import Source
from common.gguf.file import read_gguf
from common.gguf.names import GgufNames, gguf_names
from common.lora import HEAD

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MODELFILE = """\
# ollama create NAME -f Modelfile
# FROM has to name the very base that the adapter was trained on, {base}: this folder, its GGUF, or Ollama's name of it.
FROM {folder}
ADAPTER ./{adapter}
"""


def adapter_file(dtype: str) -> str:
    """Name the file."""
    return f"adapter-{TYPES[dtype].lower()}.gguf"


def write_gguf_adapter(folder: Path, adapter: Adapter, source: Source, dtype: str) -> None:
    """Write the file and the Modelfile; raises UserError for what llama.cpp has no place for."""
    names = gguf_names(source.model_config())
    _refuse(adapter, names)
    adapter = one_alpha(adapter)
    name = adapter_file(dtype)
    writer = GGUFWriter(folder / name, names.architecture.name)
    writer.add_type("adapter")
    writer.add_name(f"{source.base_name} LoRA")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.lora.lora_alpha)
    kind = GGMLQuantizationType[TYPES[dtype]]
    for module, part in adapter.parts.items():
        tensor = names.name(f"{module}.weight")
        for suffix, values in (("lora_a", part.a), ("lora_b", names.to_gguf(tensor, part.b))):
            writer.add_tensor(f"{tensor}.{suffix}", quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = MODELFILE.format(base=source.base_name, folder=source.base.resolve(), adapter=name)
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def read_gguf_adapter(path: Path, source: Source) -> Adapter:
    """Read the file back as llama.cpp does, into PEFT's names and order."""
    gguf = read_gguf(path)
    alpha = gguf.metadata[Keys.Adapter.LORA_ALPHA]
    tensors = {name: tensor.read() for name, tensor in gguf.tensors.items()}
    names = gguf_names(source.model_config())
    modules = {names.name(f"{module}.weight"): module for module in source.adapter.parts}
    parts = {}
    for name in {tensor.rpartition(".")[0] for tensor in tensors}:
        a, b = tensors[f"{name}.lora_a"], names.from_gguf(name, tensors[f"{name}.lora_b"])
        parts[modules[name]] = Part(a, b, alpha / len(a))
    return Adapter(LoraConfig(), parts, {})


def _refuse(adapter: Adapter, names: GgufNames) -> None:
    refuse(adapter, "a llama.cpp adapter", dora=False, instead="merged-gguf")
    if HEAD in adapter.parts and names.config.get("tie_word_embeddings"):
        raise UserError(
            "a llama.cpp adapter can't hold LoRA on the head of a model whose head is its embedding; "
            "write the whole model instead: --to merged-gguf"
        )
