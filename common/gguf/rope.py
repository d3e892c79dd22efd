"""Rotary embeddings: Hugging Face's `rope_parameters` and `rope_scaling`, and llama.cpp's settings, both ways.

A GGUF of Llama 3.1 or later has no setting of its scaling, only a tensor of the number by which each frequency is
divided. Those numbers are computed from the settings that all these models share, and the settings are taken if they
agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.base.weights import rope_in_both_forms
from common.engine import Array
from common.errors import UserError
from common.gguf.architectures import Architecture, head_size
from common.gguf.file import GgufFile

FACTORS = "rope_freqs.weight"
LOCAL_THETA = "rope.freq_base_swa"
THETA = 10000.0  # both sides' default
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALING = "rope.scaling"
# Read here, but for the last, which changes nothing.
SETTINGS = {"rope.freq_base", "rope.scale_linear", f"{SCALING}.type", f"{SCALING}.factor"}
SETTINGS |= {f"{SCALING}.original_context_length", f"{SCALING}.finetuned"}
# What llama.cpp's YaRN computes with, where a GGUF says no more than factor and length.
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}
YARN |= {"mscale": None, "mscale_all_dim": None}


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return llama.cpp's settings of a model's RoPE; raises UserError for a scaling that has none."""
    by_layer = config.get("rope_parameters") or {}
    if "full_attention" in by_layer:  # Gemma 3: one for windows, one for all
        local, everywhere = by_layer["sliding_attention"], by_layer["full_attention"]
        return {LOCAL_THETA: float(local["rope_theta"]), **_scaled(everywhere["rope_theta"], everywhere, config)}
    rope = rope_in_both_forms(dict(config))
    return _scaled(rope.get("rope_theta", THETA), rope.get("rope_scaling") or {}, config)


def _scaled(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    kind = _kind(scaling)
    if kind not in ("default", "linear", "yarn", "llama3"):  # llama3 is a tensor: frequency_factors
        raise UserError(
            f"rope_scaling: {kind} is not exported to GGUF here; write --to merged, and convert that folder"
        )
    settings: dict[str, Any] = {"rope.freq_base": float(theta)}
    if kind in ("linear", "yarn"):
        settings |= {f"{SCALING}.type": kind, f"{SCALING}.factor": float(scaling["factor"])}
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        settings[f"{SCALING}.original_context_length"] = original
        if unusual := {key: value for key, value in scaling.items() if value != YARN.get(key, value)}:
            raise UserError(f"rope_scaling: a GGUF's YaRN has no {unusual}; write --to merged, and convert that folder")
    return settings


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def frequency_factors(config: Mapping[str, Any]) -> Array | None:
    """Return the divisors of Llama 3's RoPE frequencies (head_dim / 2), which a GGUF holds as a tensor, or None."""
    rope = rope_in_both_forms(dict(config))
    scaling = rope.get("rope_scaling") or {}
    if _kind(scaling) != "llama3":
        return None
    return llama3_factors(scaling, rope["rope_theta"], head_size(config)).astype(np.float32)


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
    theta = gguf.number("rope.freq_base", THETA)
    scaling = _scaling(gguf, theta, head_dim)
    everywhere = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    options: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": everywhere}
    if architecture.local_theta is None:
        return options
    local = gguf.number(LOCAL_THETA, architecture.local_theta)
    by_layer = {"sliding_attention": {"rope_theta": local, "rope_type": "default"}, "full_attention": everywhere}
    return options | {"rope_local_base_freq": local, "rope_parameters": by_layer}


def _scaling(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return `rope_scaling`, None for plain RoPE."""
    kind = gguf.setting(f"{SCALING}.type", "linear")
    factor = gguf.number(f"{SCALING}.factor", gguf.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise gguf.refusal(f"{gguf.architecture}.{SCALING}.type is {kind!r}", "none, linear or yarn")
    scaling = {"rope_type": kind, "factor": factor} if kind != "none" and factor != 1 else None
    if scaling and kind == "yarn":
        scaling["original_max_position_embeddings"] = gguf.number(f"{SCALING}.original_context_length")
    if FACTORS not in gguf.tensors:
        return scaling
    found = gguf.tensors[FACTORS].read()
    llama3 = {**LLAMA3, "factor": round(float(found.max()), 3)}
    expected = llama3_factors(llama3, theta, head_dim)
    # llama.cpp computes them in float32: 1e-4 is far above its rounding, far below another setting's effect.
    if scaling or found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise gguf.refusal(f"{FACTORS} has a scaling that differs from Llama 3's", "factors 1 and 4, 8192")
    return llama3
