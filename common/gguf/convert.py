"""Write a GGUF's model as a Hugging Face folder that both engines load."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from common.base.tensor_files import STORED, TensorSpec, encode, safetensors_header
from common.errors import UserError
from common.files import new_folder, refuse_occupied
from common.gguf.source import GgufModel, open_gguf_model


def convert_gguf(source: Path, output: Path, dtype: str = "float16") -> None:
    """Write the model of a GGUF file as a Hugging Face folder that appears whole, or not at all.

    Raises UserError for a source that is damaged or that the folder can't represent, for an `output` that
    already holds files, and for a full disk.
    """
    if dtype not in STORED:
        raise UserError(f"dtype: {dtype!r} is unknown; expected one of {', '.join(STORED)}; choose one of them")
    refuse_occupied(output)
    model = open_gguf_model(source)
    config = {**model.config, "dtype": dtype, "torch_dtype": dtype}
    num_bytes = sum(math.prod(shape) for shape in model.shapes.values()) * STORED[dtype][1]
    with new_folder(output, num_bytes) as folder:
        for name, content in {**model.files, "config.json": json.dumps(config, indent=2).encode()}.items():
            (folder / name).write_bytes(content)
        with (folder / "model.safetensors").open("wb") as file:
            file.writelines(_safetensors(model, dtype))


def _safetensors(model: GgufModel, dtype: str) -> Iterator[bytes]:
    yield safetensors_header([TensorSpec(name, shape, dtype) for name, shape in model.shapes.items()])
    for name in model.shapes:
        try:
            for block in model.blocks(name):
                yield encode(block, dtype)
        except OverflowError as error:
            raise UserError(f"{model.path}: tensor {name} {error}") from error
