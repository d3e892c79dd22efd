"""Convert a GGUF file into a Hugging Face model folder that both engines load.

Owns the way in for people who only have a GGUF, with NumPy, `gguf` and `tokenizers` alone: torch and
transformers don't have to be there. Weights stream a block of rows at a time, so memory stays flat whatever
the model. The cost of a quantised source remains: the folder holds what its quantisation left of the weights.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from common.base.gguf_tokenizer import Vocabulary, read_vocabulary, tokenizer_files
from common.base.tensor_files import STORED, TensorSpec, encode, safetensors_header
from common.errors import UserError
from common.files import new_folder, refuse_occupied

ARCHITECTURES = ("llama",)
# Settings of the llama architecture that we carry over or that change nothing.
_KNOWN_SETTINGS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.finetuned", "tensor_data_layout"),
}
_ROPE_FACTORS = "rope_freqs.weight"
# GGUF name: (Hugging Face name, shape)
NamedShapes = dict[str, tuple[str, tuple[int, ...]]]
# Elements dequantised at once: 16 MB of float32, little against any model, enough for NumPy's full speed.
_BLOCK_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class GgufFile:
    """Hold an opened GGUF: its metadata and its tensors by name, mapped and not yet read."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    def setting(self, key: str, default: object = None) -> Any:
        """Read `llama.<key>`."""
        return self.metadata.get(f"llama.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Read a number `llama.<key>`; raises `UserError` where it is missing, 0, or differs by layer."""
        value = self.setting(key, default)
        if not isinstance(value, int | float) or value <= 0:
            raise self.refusal(f"llama.{key} is {value!r}", "one number above 0 for all layers")
        return value

    def refusal(self, found: str, expected: str) -> UserError:
        """Make the error for a model that a Hugging Face Llama can't express."""
        return UserError(f"{self.path}: {found}; expected {expected}; take the model's Hugging Face folder")


@dataclass(frozen=True)
class TensorPlan:
    """Describe one tensor to write: its name and shape, its source, and the source's row for each row."""

    name: str
    shape: tuple[int, ...]
    source: ReaderTensor
    rows: np.ndarray


def convert_gguf(source: Path, output: Path, dtype: str = "float16") -> None:
    """Write the model of a GGUF file as a Hugging Face folder that appears whole, or not at all.

    Raises `UserError` for a source that is damaged or that the folder can't represent, for an `output` that
    already holds files, and for a full disk.
    """
    if dtype not in STORED:
        raise UserError(f"dtype: {dtype!r} is unknown; expected one of {', '.join(STORED)}; choose one of them")
    refuse_occupied(output)
    gguf = open_gguf(source)
    vocabulary = read_vocabulary(gguf.metadata, source)
    config = model_config(gguf, vocabulary, dtype)
    plans = plan_tensors(gguf, config)
    texts = tokenizer_files(vocabulary, config["max_position_embeddings"])
    texts["config.json"] = json.dumps(config, indent=2)
    texts["generation_config.json"] = json.dumps(generation_config(vocabulary), indent=2)
    num_bytes = sum(math.prod(plan.shape) for plan in plans) * STORED[dtype][1]
    with new_folder(output, num_bytes) as folder:
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        with (folder / "model.safetensors").open("wb") as file:
            file.writelines(_safetensors(plans, dtype, source))


def open_gguf(path: Path) -> GgufFile:
    """Read a GGUF's metadata and map its tensors into memory.

    Raises `UserError` for a file that is no GGUF, is cut short, is one part of several, or is of an
    architecture that we have no Hugging Face layout for.
    """
    _check_start(path)
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(
            f"{path}: the file ends early or is damaged ({error}); it has {path.stat().st_size:,} bytes; "
            "expected all of its metadata and tensors; download it again"
        ) from error
    gguf = GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if (architecture := metadata.get("general.architecture")) not in ARCHITECTURES:
        raise gguf.refusal(f"the architecture is {architecture!r}", " or ".join(ARCHITECTURES))
    if (parts := metadata.get("split.count", 1)) > 1:
        raise UserError(f"{path}: is one of {parts} parts; expected a whole model; join with llama-gguf-split")
    return gguf


def _check_start(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a GGUF file; check the path") from error
    if start[:4] != b"GGUF":
        raise UserError(f"{path}: starts with {start[:4]!r}; expected b'GGUF'; name a GGUF file")
    if (version := int.from_bytes(start[4:], "little")) not in (2, 3):
        raise UserError(
            f"{path}: GGUF version {version}; expected little-endian version 2 or 3; convert the model again "
            "with a current llama.cpp"
        )


def model_config(gguf: GgufFile, vocabulary: Vocabulary, dtype: str) -> dict[str, Any]:
    """Build `config.json` for transformers 4 and 5 and for mlx-lm.

    Raises `UserError` for a setting that is missing or that a Hugging Face Llama doesn't have.
    """
    for key, value in gguf.metadata.items():
        # An unknown setting may change what the model computes (experts, a window): refuse, never ignore.
        if key.startswith("llama.") and key.removeprefix("llama.") not in _KNOWN_SETTINGS and value:
            raise gguf.refusal(f"{key} is {value!r}", "a plain Llama, which has no such setting")
    hidden, heads = gguf.number("embedding_length"), gguf.number("attention.head_count")
    head_dim = gguf.number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := gguf.number(key, head_dim)) != head_dim:
            raise gguf.refusal(f"llama.{key} is {found}", f"the size of a head, {head_dim}")
    embedding = gguf.tensors.get("token_embd.weight")
    rows = len(vocabulary.tokens) if embedding is None else _shape(embedding)[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": gguf.number("feed_forward_length"),
        "num_hidden_layers": gguf.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": gguf.number("context_length"),
        "rms_norm_eps": _decimal(gguf.number("attention.layer_norm_rms_epsilon")),
        **_rope(gguf, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Build `generation_config.json`: generation ends at any token that ends a turn."""
    stops = list(vocabulary.stops) if len(vocabulary.stops) > 1 else vocabulary.eos
    return {"bos_token_id": vocabulary.bos, "eos_token_id": stops, "pad_token_id": vocabulary.pad}


def _rope(gguf: GgufFile, head_dim: int) -> dict[str, Any]:
    theta = _decimal(gguf.number("rope.freq_base", 10000.0))
    scaling = rope_scaling(gguf, theta, head_dim)
    # transformers 5 reads rope_parameters; transformers 4 and mlx-lm read the other two, and where they are
    # missing mlx-lm takes a theta of 10000 without a word.
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def rope_scaling(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Find the `rope_scaling` that a GGUF's settings and frequency factors amount to; None for plain RoPE.

    A GGUF of Llama 3.1 or later has only the number by which each frequency is divided: (head_dim / 2).
    Compute those numbers from the settings that all these models share, and take the settings if they agree.
    Raises `UserError` for any other scaling.
    """
    kind = gguf.setting("rope.scaling.type", "linear")
    factor = gguf.setting("rope.scaling.factor", gguf.setting("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise gguf.refusal(f"llama.rope.scaling.type is {kind!r}", "none or linear")
    linear = {"rope_type": "linear", "factor": _decimal(factor)} if kind == "linear" and factor != 1 else None
    if _ROPE_FACTORS not in gguf.tensors:
        return linear
    found = gguf.tensors[_ROPE_FACTORS].data
    llama3 = {
        "rope_type": "llama3",
        "factor": round(float(found.max()), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = llama3_factors(llama3, theta, head_dim)
    # llama.cpp computes them in float32: 1e-4 is far above its rounding, far below another setting's effect.
    if linear or found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise gguf.refusal(f"{_ROPE_FACTORS} has a scaling that differs from Llama 3's", "factors 1 and 4, 8192")
    return llama3


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Compute the number by which Llama 3's scaling divides each RoPE frequency: (head_dim / 2)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _decimal(value: float) -> float:
    # The shortest decimal that names this float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value)))


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    # A GGUF counts dimensions from the fastest: a matrix of (rows, columns) says (columns, rows).
    return tuple(int(size) for size in reversed(tensor.shape))


def plan_tensors(gguf: GgufFile, config: dict[str, Any]) -> list[TensorPlan]:
    """Pair every tensor of the Hugging Face model with its source.

    Raises `UserError` for a tensor that is missing, has another shape, or has no Hugging Face name.
    """
    expected = _expected_tensors(config)
    for name in gguf.tensors.keys() - expected.keys() - {_ROPE_FACTORS}:
        raise gguf.refusal(f"tensor {name} has no Hugging Face name", "the tensors of a Llama alone")
    plans = []
    for name, (target, shape) in expected.items():
        source = gguf.tensors.get(name)
        if source is None or _shape(source) != shape:
            found = "missing" if source is None else f"of shape {_shape(source)}"
            raise UserError(f"{gguf.path}: tensor {name} is {found}; expected {shape}; take another file of this model")
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        rows = unpermuted_rows(shape[0], config[heads]) if heads else np.arange(shape[0])
        plans.append(TensorPlan(target, shape, source, rows))
    return plans


def unpermuted_rows(num_rows: int, heads: int) -> np.ndarray:
    """List the GGUF's row for each row of a Hugging Face q or k projection: (num_rows,).

    llama.cpp rotates neighbouring rows of a head together, Hugging Face row i with row i + head_dim / 2.
    """
    return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _expected_tensors(config: dict[str, Any]) -> NamedShapes:
    """Map each GGUF tensor of a Llama to its Hugging Face name and shape."""
    vocabulary, hidden, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    attention: NamedShapes = {
        "attn_q": ("self_attn.q_proj", (queries, hidden)),
        "attn_k": ("self_attn.k_proj", (keys, hidden)),
        "attn_v": ("self_attn.v_proj", (keys, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, queries)),
    }
    mlp: NamedShapes = {
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }
    norms: NamedShapes = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
    }
    biased = {**(attention if config["attention_bias"] else {}), **(mlp if config["mlp_bias"] else {})}
    expected: NamedShapes = {}
    expected["token_embd.weight"] = ("model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        for part, (target, shape) in {**attention, **mlp, **norms}.items():
            expected[f"blk.{layer}.{part}.weight"] = (f"model.layers.{layer}.{target}.weight", shape)
            if part in biased:
                expected[f"blk.{layer}.{part}.bias"] = (f"model.layers.{layer}.{target}.bias", shape[:1])
    expected["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        expected["output.weight"] = ("lm_head.weight", (vocabulary, hidden))
    return expected


def tensor_blocks(plan: TensorPlan, dtype: str, where: Path) -> Iterator[bytes]:
    """Dequantise a tensor a block of rows at a time and encode it as `dtype`, row-major.

    Raises `UserError` for a quantisation that `gguf` can't undo and for values that `dtype` can't hold.
    """
    kind = plan.source.tensor_type
    step = max(1, _BLOCK_ELEMENTS // math.prod(plan.shape[1:]))
    try:
        data = plan.source.data.reshape(plan.shape[0], -1)
        for start in range(0, plan.shape[0], step):
            # Quantisation runs along a row, so the rows change places while they are still small.
            rows = data[plan.rows[start : start + step]]
            yield encode(dequantize(np.asarray(rows), kind), dtype)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"{where}: tensor {plan.source.name} is stored as {kind.name}; expected a type that gguf "
            "can turn into floats; take another quantisation of this model, such as Q8_0"
        ) from error
    except OverflowError as error:
        raise UserError(f"{where}: tensor {plan.source.name} {error}") from error


def _safetensors(plans: list[TensorPlan], dtype: str, where: Path) -> Iterator[bytes]:
    yield safetensors_header([TensorSpec(plan.name, plan.shape, dtype) for plan in plans])
    for plan in plans:
        yield from tensor_blocks(plan, dtype, where)
