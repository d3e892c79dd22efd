"""A GGUF file as a Hugging Face model: its config, its tokenizer's files, and its tensors by Hugging Face's names.

Torch and transformers don't have to be there. Weights are dequantised a block of rows at a time, so memory stays flat
whatever the model. The cost of a quantised source remains: what comes out is what its quantisation left of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.engine import Array
from common.errors import UserError
from common.gguf.config import model_config, model_type_of
from common.gguf.file import GgufFile, read_gguf
from common.gguf.layouts import tensor_shapes
from common.gguf.names import GgufNames, gguf_names
from common.gguf.rope import TENSORS as ROPE_TENSORS
from common.gguf.tokenizer import tokenizer_files
from common.gguf.vocabulary import read_vocabulary

# Numbers dequantised at once: 16 MB of float32, little against any model, enough for NumPy's full speed.
BLOCK_NUMBERS = 4 << 20


@dataclass(frozen=True)
class GgufModel:
    """Hold what a Hugging Face folder of a GGUF's model has: config.json without a dtype, shapes, other files."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, bytes]
    _gguf: GgufFile
    _names: GgufNames

    def blocks(self, name: str) -> Iterator[Array]:
        """Yield a tensor as float32 in blocks of whole rows (rows, ...), one after another.

        Raises UserError for a quantisation that `gguf` can't undo.
        """
        target = self._names.name(name)
        source = self._gguf.tensors[target]
        if len(source.shape) == 1:
            yield self._names.from_gguf(target, source.read())
            return
        order = self._names.order(target, source.num_rows)
        step = max(1, BLOCK_NUMBERS // source.shape[-1])
        for start in range(0, source.num_rows, step):
            stop = min(start + step, source.num_rows)
            if order is None:
                yield source.rows(start, stop)
            else:  # rows change places within their head alone, so that few more are read than are wanted
                wanted = order[start:stop]
                first = wanted.min()
                yield source.rows(first, wanted.max() + 1)[wanted - first]


def open_gguf_model(path: Path) -> GgufModel:
    """Open a GGUF file; no weight is read yet.

    Raises UserError for a file that is damaged, and for a model, a tokenizer or a tensor that a Hugging Face folder
    can't represent.
    """
    gguf = read_gguf(path)
    if (kind := gguf.metadata.get("general.type", "model")) != "model":
        raise gguf.refusal(f"holds no model but general.type {kind!r}", "a model")
    model_type_of(gguf)  # a stranger's vocabulary is not to be called damaged
    vocabulary = read_vocabulary(gguf.metadata, path)
    config = model_config(gguf, vocabulary)
    names = gguf_names(config)
    texts = tokenizer_files(vocabulary, config["max_position_embeddings"])
    texts["generation_config.json"] = json.dumps(vocabulary.generation_config(), indent=2)
    files = {name: text.encode() for name, text in texts.items()}
    return GgufModel(path, config, _shapes(gguf, config, names), files, gguf, names)


def _shapes(gguf: GgufFile, config: Mapping[str, Any], names: GgufNames) -> dict[str, tuple[int, ...]]:
    """List the tensors; raises UserError for one that is missing, has another shape, or has no Hugging Face name."""
    architecture = names.architecture
    biased = {**architecture.biased}
    for option, modules in architecture.optional_biases.items():
        biased |= modules if config[option] else {}
    shapes = dict(tensor_shapes(config, architecture.layout, biased, config["tie_word_embeddings"]))
    expected = {names.name(name): shape for name, shape in shapes.items()}
    for name in gguf.tensors.keys() - expected.keys() - ROPE_TENSORS:
        raise gguf.refusal(f"tensor {name} has no Hugging Face name", f"the tensors of a {config['model_type']} alone")
    for name, shape in expected.items():
        source = gguf.tensors.get(name)
        if source is None or source.shape != shape:
            found = "missing" if source is None else f"of shape {source.shape}"
            raise UserError(f"{gguf.path}: tensor {name} is {found}; expected {shape}; take another file of this model")
    return shapes
