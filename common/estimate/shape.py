"""The shape of a base model, from config.json and the headers of its safetensors files: no weight is read or fetched.

Linear modules come from the headers, so that an adapter is counted as it will be made; the widths of a layer's
activations come from config.json, whose names all dense decoders share. A model with layers of other kinds (experts,
recurrence) is counted as a dense one of its active width, and one that is quantised in its files as it lies there; both
say so: `certain` is False, and nothing is refused for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.base.hub import read_headers
from common.base.weights import read_header, read_model_config, weight_files
from common.errors import UserError

TOWERS = ("vision", "visual", "audio", "multi_modal_projector")
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embeddings")
PACKED_DTYPES = ("U32", "U8", "I8", "I32")

Headers = Mapping[str, Mapping[str, Any]]  # name of a tensor -> dtype, shape


@dataclass(frozen=True)
class ModelShape:
    """Hold what memory depends on, in elements."""

    layers: int
    hidden: int
    intermediate: int  # width of the MLP, of all experts that a token meets
    heads: int
    queries: int  # width of all query heads
    keys: int  # width of all key heads
    vocabulary: int
    linear: Mapping[str, tuple[int, int]]  # the text model's linear modules, (out, in), the head among them
    other: int  # elements that are in no linear module of a layer: embeddings, head, norms, towers, stacked experts
    stored: int = 0  # bytes of weights that are quantised in the files already
    tied: bool = True
    certain: bool = True  # whether it is a dense decoder in full precision, all that the formulas are of

    @property
    def quantisable(self) -> int:
        """Count the elements of the layers' linear modules."""
        return sum(math.prod(shape) for name, shape in self.linear.items() if not is_head(name))


def is_head(name: str) -> bool:
    """Tell whether a linear module is the output head."""
    return name.rsplit(".", 1)[-1] == "lm_head"


def read_shape(name: str, revision: str | None = None) -> ModelShape:
    """Read the shape of a local folder, or of a model on the Hub by range requests.

    Raises UserError where the model can't be found or its config lacks a width.
    """
    local = Path(name).expanduser()
    if not local.is_dir():
        return shape_of(name, *read_headers(name, revision))
    headers = {key: entry for path in weight_files(local) for key, entry in read_header(path).items()}
    return shape_of(name, read_model_config(local), headers)


def shape_of(name: str, config: Mapping[str, Any], headers: Headers) -> ModelShape:
    """Put the shape together from a config.json and the headers of all weights."""
    text = {**config, **(config.get("text_config") or {})}
    try:
        layers, hidden = int(text["num_hidden_layers"]), int(text["hidden_size"])
        heads, vocabulary = int(text["num_attention_heads"]), int(text["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: config.json gives no usable {error}; expected that of a decoder model") from None
    head = int(text.get("head_dim") or hidden // heads)
    experts = int(text.get("num_experts_per_tok") or 0)
    inner = int(text.get("intermediate_size") or 4 * hidden)
    if experts:
        inner = experts * int(text.get("moe_intermediate_size") or inner)
        inner += int(text.get("shared_expert_intermediate_size") or 0)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)))
    linear, other, stored = _sorted_weights(config, headers, tied)
    kinds = set(text.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        queries=heads * head,
        keys=int(text.get("num_key_value_heads") or heads) * head,
        vocabulary=vocabulary,
        linear=linear,
        other=other,
        stored=stored,
        tied=tied,
        certain=not (experts or kinds or stored or "vision_config" in config or "num_local_experts" in text),
    )


def _sorted_weights(
    config: Mapping[str, Any], headers: Headers, tied: bool
) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Return the linear modules, the elements of all else, and the bytes of what is quantised already."""
    bits = (config.get("quantization") or {}).get("bits", 8)  # mlx-lm's, whose words hold 32 / bits weights
    linear: dict[str, tuple[int, int]] = {}
    other = stored = 0
    for key, entry in headers.items():
        name, shape = key.removesuffix(".weight"), tuple(entry["shape"])
        last = name.rsplit(".", 1)[-1]
        if last == "lm_head" and tied and key.endswith(".weight"):
            continue  # the embedding's matrix once more
        is_packed = entry["dtype"] in PACKED_DTYPES
        stored += _stored_bytes(entry) if is_packed else 0
        is_linear = key.endswith(".weight") and len(shape) == 2 and last not in EMBEDDINGS
        if is_linear and not any(tower in name for tower in TOWERS) and ".experts." not in name:
            linear[name] = (shape[0], shape[1] * 32 // bits) if entry["dtype"] == "U32" else (shape[0], shape[1])
        if not is_packed and (name not in linear or is_head(name)):
            other += math.prod(shape)
    return linear, other, stored


def _stored_bytes(entry: Mapping[str, Any]) -> int:
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
    return math.prod(entry["shape"]) * sizes.get(entry["dtype"], 1)
