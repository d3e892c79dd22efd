"""Rotary embeddings: Hugging Face's `rope_parameters` and `rope_scaling`, and llama.cpp's settings, both ways.

A GGUF of Llama 3.1 or later has no setting of its scaling, only a tensor of the number by which each frequency is
divided. Those numbers are computed from the settings that all these models share, and the settings are taken if they
agree. LongRoPE's two lists of such numbers are tensors too, and stand in config.json as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.base.weights import rope_in_both_forms
from common.engine import Array
from common.errors import UserError
from common.gguf.architectures import Architecture, head_size
from common.gguf.file import GgufFile, shortest

FACTORS = "rope_freqs.weight"
LISTS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
TENSORS = {FACTORS, *LISTS.values()}
THETA, LOCAL_THETA, ROTATED = "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"
KIND, FACTOR, ORIGINAL = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
OLD_FACTOR, ATTENTION_FACTOR = "rope.scale_linear", "rope.scaling.attn_factor"
# The last changes nothing.
SETTINGS = {THETA, ROTATED, KIND, FACTOR, OLD_FACTOR, ORIGINAL, ATTENTION_FACTOR, "rope.scaling.finetuned"}
DEFAULT_THETA = 10000.0  # both sides'
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What llama.cpp's YaRN computes with, where a GGUF says no more than factor and length.
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}


def rope_settings(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return llama.cpp's settings of a model's RoPE; raises UserError for a scaling that its graph doesn't have."""
    by_layer = config.get("rope_parameters") or {}
    if "full_attention" in by_layer:  # Gemma 3: one for windows, one for all
        scaling = by_layer["full_attention"]
        theta, local = scaling["rope_theta"], {LOCAL_THETA: float(by_layer["sliding_attention"]["rope_theta"])}
    else:
        rope = rope_in_both_forms(dict(config))
        theta, local, scaling = rope.get("rope_theta", DEFAULT_THETA), {}, rope.get("rope_scaling") or {}
    if (kind := _kind(scaling)) not in architecture.rope_kinds:
        raise UserError(
            f"rope_scaling: {kind} is not exported to GGUF for {config['model_type']}; write --to merged, and convert "
            "that folder"
        )
    rotated = int(head_size(config) * rotated_part(config))
    return {THETA: float(theta), **local, ROTATED: rotated, **_scaling_settings(scaling, config)}


def _scaling_settings(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a scaling; what is divided by lists of numbers is a tensor: `frequency_factors`."""
    longest = config["max_position_embeddings"]
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = original or longest
    settings: dict[str, Any] = {}
    usual: dict[str, Any] = {"attention_factor": None}  # of what no setting says
    match _kind(scaling):
        case "linear":
            settings = {KIND: "linear", FACTOR: float(scaling["factor"])}
        case "yarn":
            settings = {KIND: "yarn", FACTOR: float(scaling["factor"]), ORIGINAL: original}
            usual |= YARN
        case "longrope":
            settings = {ORIGINAL: original, ATTENTION_FACTOR: _attention_factor(longest, original)}
            usual["factor"] = longest / original
    unusual = {key: scaling[key] for key in usual.keys() & scaling.keys() if scaling[key] not in (None, usual[key])}
    if unusual:
        raise UserError(f"rope_scaling: a GGUF has no place for {unusual}; write --to merged, and convert that folder")
    return settings


def _attention_factor(longest: int, original: int) -> float:
    """Compute by how much LongRoPE's attention grows with the text (Ding 2024; both sides compute it so)."""
    return math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original else 1.0


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def rotated_part(config: Mapping[str, Any]) -> float:
    """Return which part of a head is rotated."""
    rope = config.get("rope_parameters") or {}
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def frequency_factors(config: Mapping[str, Any]) -> dict[str, Array]:
    """Return the divisors of RoPE's frequencies (rotated / 2), by the names of a GGUF's tensors of them."""
    rope = rope_in_both_forms(dict(config))
    scaling = rope.get("rope_scaling") or {}
    match _kind(scaling):
        case "longrope":
            return {tensor: np.array(scaling[option], np.float32) for option, tensor in LISTS.items()}
        case "llama3":
            return {FACTORS: llama3_factors(scaling, rope["rope_theta"], head_size(config)).astype(np.float32)}
    return {}


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Array:
    """Compute the number by which Llama 3's scaling divides each RoPE frequency: (head_dim / 2)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def rope_options(gguf: GgufFile, architecture: Architecture, head_dim: int) -> dict[str, Any]:
    """Return the options of config.json for transformers 5, which reads `rope_parameters`, and for older readers.

    mlx-lm takes a theta of 10000 without a word where the older options are missing. Raises UserError for a scaling
    that Hugging Face's models don't have.
    """
    theta, rotated = gguf.number(THETA, DEFAULT_THETA), gguf.number(ROTATED, head_dim)
    scaling = _scaling(gguf, theta, head_dim)
    if _kind(scaling) not in architecture.rope_kinds:
        raise gguf.refusal(f"RoPE is scaled by {_kind(scaling)}", " or ".join(architecture.rope_kinds))
    if _kind(scaling) != "longrope" and gguf.setting(ATTENTION_FACTOR):
        raise gguf.refusal(f"{gguf.architecture}.{ATTENTION_FACTOR} is set without LongRoPE's lists", "both or none")
    if rotated != head_dim and not architecture.partial_rotary:
        raise gguf.refusal(f"{gguf.architecture}.{ROTATED} is {rotated}", f"the size of a head, {head_dim}")
    further = {"partial_rotary_factor": rotated / head_dim} if architecture.partial_rotary else {}
    everywhere = {"rope_theta": theta, **(scaling or {"rope_type": "default"}), **further}
    if _kind(scaling) == "longrope":  # Phi 3's code looks for it here
        further["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    options = {"rope_theta": theta, "rope_scaling": scaling or None, "rope_parameters": everywhere, **further}
    if architecture.local_theta is None:
        return options
    local = gguf.number(LOCAL_THETA, architecture.local_theta)
    by_layer = {"sliding_attention": {"rope_theta": local, "rope_type": "default"}, "full_attention": everywhere}
    return options | {"rope_local_base_freq": local, "rope_parameters": by_layer}


def _scaling(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Return `rope_scaling`, empty for plain RoPE."""
    kind, factor = gguf.setting(KIND, "linear"), gguf.number(FACTOR, gguf.number(OLD_FACTOR, 1.0))
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor} if kind != "none" and factor != 1 else {}
    if scaling and kind == "yarn":
        scaling["original_max_position_embeddings"] = gguf.number(ORIGINAL)
    tensors = sorted(TENSORS & gguf.tensors.keys())
    if tensors and (scaling or tensors not in ([FACTORS], sorted(LISTS.values()))):
        raise gguf.refusal(f"{' and '.join(tensors)} with a scaling by {kind} {factor:g}", "one scaling, and whole")
    if tensors:
        return _llama3(gguf, theta, head_dim) if FACTORS in tensors else _longrope(gguf)
    return scaling


def _llama3(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    found = gguf.tensors[FACTORS].read()
    llama3 = {**LLAMA3, "factor": round(float(found.max()), 3)}
    expected = llama3_factors(llama3, theta, head_dim)
    # llama.cpp computes them in float32: 1e-4 is far above its rounding, far below another setting's effect.
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise gguf.refusal(f"{FACTORS} has a scaling that differs from Llama 3's", "factors 1 and 4, 8192")
    return llama3


def _longrope(gguf: GgufFile) -> dict[str, Any]:
    longest, original = gguf.number("context_length"), gguf.number(ORIGINAL)
    usual, found = _attention_factor(longest, original), gguf.number(ATTENTION_FACTOR, 1.0)
    if not math.isclose(found, usual, rel_tol=1e-5):
        raise gguf.refusal(f"{gguf.architecture}.{ATTENTION_FACTOR} is {found}", f"LongRoPE's own, {usual:.6g}")
    lists = {option: [shortest(each) for each in gguf.tensors[tensor].read()] for option, tensor in LISTS.items()}
    return {"rope_type": "longrope", **lists, "original_max_position_embeddings": original}
