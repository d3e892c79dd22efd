"""The settings of a model in llama.cpp's words, from its config.json.

Only what the graphs of ARCHITECTURES (gguf_names.py) compute is written; what they don't compute is refused, because
llama.cpp would leave it out without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType

from common.base.gguf import llama3_factors
from common.base.weights import rope_in_both_forms
from common.engine import Array
from common.errors import UserError
from common.export.gguf_names import GgufNames

ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}
FILE_TYPES = {
    "float32": LlamaFileType.ALL_F32,
    "float16": LlamaFileType.MOSTLY_F16,
    "bfloat16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def model_metadata(names: GgufNames, title: str, dtype: str) -> dict[str, Any]:
    """Return a model's settings by GGUF key; raises UserError for one that llama.cpp's graph doesn't have."""
    config, family = names.config, names.config["model_type"]
    _refuse(config)
    heads, head_dim = config["num_attention_heads"], head_size(config)
    settings = {
        "block_count": config["num_hidden_layers"],
        "context_length": _context(config),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
        **_rope(config),
        **(_gemma(config) if family.startswith("gemma") else {}),
    }
    general = {"general.name": title, "general.file_type": int(FILE_TYPES[dtype]), "general.quantization_version": 2}
    return general | {f"{names.architecture.name}.{key}": value for key, value in settings.items()}


def frequency_factors(config: Mapping[str, Any]) -> Array | None:
    """Return the divisors of Llama 3's RoPE frequencies (head_dim / 2), which a GGUF holds as a tensor, or None."""
    rope = rope_in_both_forms(dict(config))
    scaling = rope.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    return llama3_factors(scaling, rope["rope_theta"], head_size(config)).astype(np.float32)


def head_size(config: Mapping[str, Any]) -> int:
    """Return the features of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Write settings by the types their values have."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _refuse(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_activation") or config.get("hidden_act")
    wanted = ACTIVATIONS.get(config["model_type"], "silu")
    found = None
    if activation not in (wanted, None):
        found = f"it has the activation {activation}, where llama.cpp has {wanted}"
    elif config.get("use_sliding_window"):
        found = "it has use_sliding_window, which llama.cpp doesn't compute for it"
    elif config.get("query_pre_attn_scalar") not in (None, head_size(config)):
        found = f"its query_pre_attn_scalar is {config['query_pre_attn_scalar']}, llama.cpp takes the size of a head"
    elif (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0) != 1.0:
        found = "it has a partial rotary embedding, which llama.cpp doesn't compute for it"
    if found:
        raise UserError(
            f"a GGUF of this {config['model_type']} would compute something else: {found}; write --to merged"
        )


def _context(config: Mapping[str, Any]) -> int:
    """Return the longest text: a Mistral's window, within which llama.cpp's full attention is the same."""
    longest, window = config["max_position_embeddings"], config.get("sliding_window")
    return int(min(longest, window) if config["model_type"] == "mistral" and window else longest)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    by_layer = config.get("rope_parameters") or {}
    if "full_attention" in by_layer:  # Gemma 3: one for windows, one for all
        local, everywhere = by_layer["sliding_attention"], by_layer["full_attention"]
        return {"rope.freq_base_swa": float(local["rope_theta"]), **_scaled(everywhere["rope_theta"], everywhere)}
    rope = rope_in_both_forms(dict(config))
    return _scaled(rope.get("rope_theta", 10000.0), rope.get("rope_scaling") or {})


def _scaled(theta: float, scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):  # llama3 is a tensor: frequency_factors
        raise UserError(
            f"rope_scaling: {kind} is not exported to GGUF here; write --to merged, and convert that folder"
        )
    linear = (
        {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])} if kind == "linear" else {}
    )
    return {"rope.freq_base": float(theta), **linear}


def _gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    caps = {
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }
    settings: dict[str, Any] = {key: float(value) for key, value in caps.items() if value}
    settings["attention.sliding_window"] = config["sliding_window"]
    kinds = config.get("layer_types")
    if kinds:
        settings["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in kinds]
    return settings
