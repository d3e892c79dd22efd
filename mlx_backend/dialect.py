"""A checkpoint's config in the words that mlx-lm reads, and what no word can make it compute.

mlx-lm builds a model of the keys it knows and takes a default of its own, without a word, where transformers 5
calls the same thing otherwise. So what the two call differently is translated here, and what mlx-lm's code has no
place for is refused before any weight is read. The lists are what reading mlx-lm 0.32 beside transformers 5.23 taught;
the cost is that they have to be read again with each of their versions, which tests/test_architectures.py and
`twintune doctor --model` do by comparing logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.base.weights import rope_in_both_forms
from common.errors import MachineError, UserError

Config = Mapping[str, Any]

MODEL_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
EVERY_LAYER_SLIDES = {"mistral": 4096, "mixtral": None, "phi3": None, "starcoder2": None, "qwen3_moe": None}
SOME_LAYERS_SLIDE = ("gemma2", "qwen2", "qwen2_moe", "qwen3")
SLIDING = "sliding_attention"
ON_REQUEST = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")  # their window counts only with `use_sliding_window`

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
# Keys that mlx-lm doesn't read, and the values (the first is transformers' default) that its code computes.
UNREAD: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": SILU},
    "mistral": {"hidden_act": SILU},
    "qwen2": {"hidden_act": SILU},
    "qwen2_moe": {
        "hidden_act": SILU,
        "norm_topk_prob": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    "qwen3": {"hidden_act": SILU},
    "qwen3_moe": {"hidden_act": SILU},
    "qwen3_5": {"hidden_act": SILU},
    "qwen3_5_moe": {"hidden_act": SILU},
    "gemma2": {"hidden_activation": GELU},
    "gemma3_text": {
        "hidden_activation": GELU,
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False,),
    },
    "phi3": {"hidden_act": SILU},
    "smollm3": {"hidden_act": SILU},
    "olmo2": {"hidden_act": SILU},
    "olmo3": {"hidden_act": SILU},
    "olmoe": {"hidden_act": SILU},
    "granite": {"hidden_act": SILU},
    "mixtral": {"hidden_act": SILU},
    "ministral3": {"hidden_act": SILU},
    "starcoder2": {"hidden_act": ("gelu",)},
    "gpt_oss": {"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
}
# Kinds of rotary embedding beyond the default that an architecture's code has; all others have all of mlx-lm's.
ROPE_KINDS = {"gemma2": (), "qwen2_moe": (), "phi3": ("longrope", "su")}
ROPE_BY_LAYER = ("gemma3_text", "olmo3")
PARTIAL_ROTATION = ("phi3", "qwen3_5", "qwen3_5_moe", "phi", "stablelm", "glm4", "nemotron", "qwen3_next")


def translated(config: Config) -> dict[str, Any]:
    """Return the keys of a config.json that mlx-lm must be told otherwise, the inner config's too."""
    if inner := config.get("text_config"):
        return {
            "text_config": {**inner, **translated({"model_type": config["model_type"], **inner})},
            **({"vocab_size": inner["vocab_size"]} if "vocab_size" in inner else {}),
        }
    words = rope_in_both_forms(config)
    words["model_type"] = _model_type(config)
    if "num_local_experts" in config:
        words["num_experts"] = config["num_local_experts"]
    words |= _rope_words(config, words)
    words |= _pattern_words(config)
    return words


def layer_windows(config: Config) -> dict[int, int]:
    """Return how many tokens a layer sees, by its number, where mlx-lm's code lets it see all."""
    config = config.get("text_config") or config
    kind = config["model_type"]
    if kind in ON_REQUEST and not config.get("use_sliding_window"):
        return {}
    if kind in EVERY_LAYER_SLIDES:
        window, slides = config.get("sliding_window", EVERY_LAYER_SLIDES[kind]), lambda layer: True
    elif kind in SOME_LAYERS_SLIDE:
        window, types = config.get("sliding_window", 4096), config.get("layer_types")
        slides = partial(_slides_by_default, config) if types is None else lambda layer: types[layer] == SLIDING
    else:
        return {}
    return {layer: window for layer in range(config["num_hidden_layers"]) if window and slides(layer)}


def refuse_unlike(directory: Path, config: Config, max_seq_length: int) -> None:
    """Raise UserError, with the reason, where mlx-lm would compute another function than transformers."""
    text = config.get("text_config") or config
    for reason in (*_unread(text), *_rope_reasons(text, max_seq_length), *_pattern_reasons(text)):
        raise UserError(
            f"{directory / 'config.json'}: {reason}, so the MLX engine would compute another model; use --engine torch"
        )


def refuse_half_experts(directory: Path, config: Config, dtype: str) -> None:
    """Raise MachineError for routed experts in half precision, which MLX can't multiply on a CPU."""
    text = config.get("text_config") or config
    experts = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), None)
    if experts and dtype != "float32":
        raise MachineError(
            f"{directory}: MLX multiplies a mixture's experts on a CPU in float32 only, not in {dtype}; "
            "write dtype: float32, or use --engine torch"
        )


def _model_type(config: Config) -> str:
    return MODEL_TYPES.get(config["model_type"], config["model_type"])


def _rope_words(config: Config, words: Config) -> dict[str, Any]:
    """Say RoPE where mlx-lm looks for it: `type`, the rotated part, and the lengths that scaling starts from."""
    found: dict[str, Any] = {}
    modern = words.get("rope_parameters") or {}
    if "partial_rotary_factor" in modern:
        found["partial_rotary_factor"] = modern["partial_rotary_factor"]
    if scaling := words.get("rope_scaling"):
        original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        original = original or config.get("max_position_embeddings")
        found["original_max_position_embeddings"] = original
        found["rope_scaling"] = {**scaling, "type": modern["rope_type"], "original_max_position_embeddings": original}
        if "short_factor" in scaling:
            # mlx-lm knows one list of factors, transformers takes the short one up to the original length; longer
            # contexts are refused below.
            found["rope_scaling"]["long_factor"] = scaling["short_factor"]
    return found


def _pattern_words(config: Config) -> dict[str, Any]:
    """Say which layers are unlike the others, by the interval that mlx-lm wants instead of `layer_types`."""
    kind, types = _model_type(config), config.get("layer_types")
    if kind in ("qwen3_5", "qwen3_5_moe") and types:
        return {"full_attention_interval": _interval(types)}
    words = {"sliding_window_pattern": _interval(types)} if types and kind == "gemma3_text" else {}
    ropes = config.get("rope_parameters") or {}
    if kind in ROPE_BY_LAYER and SLIDING in ropes:
        full = ropes["full_attention"]
        words["rope_local_base_freq"] = ropes[SLIDING]["rope_theta"]
        words["rope_theta"] = full["rope_theta"]
        words["rope_scaling"] = None if full.get("rope_type", "default") == "default" else full
    return words


def _interval(types: Sequence[str]) -> int:
    return types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1


def _slides_by_default(config: Config, layer: int) -> bool:
    """Repeat what transformers takes a layer for where the config names no `layer_types`."""
    first = config.get("max_window_layers", 28)
    return {"gemma2": layer % 2 == 0, "qwen2_moe": layer % 2 == 0 and layer < first}.get(
        config["model_type"], layer >= first
    )


def _unread(config: Config) -> list[str]:
    return [
        f"{key}: {config[key]!r} is not what mlx-lm computes for {config['model_type']} ({values[0]!r})"
        for key, values in UNREAD.get(_model_type(config), {}).items()
        if key in config and config[key] not in values
    ]


def _rope_reasons(config: Config, max_seq_length: int) -> list[str]:
    kind = _model_type(config)
    rope = rope_in_both_forms(config).get("rope_parameters") or {}
    scaling, reasons = rope.get("rope_type", "default"), []
    if scaling != "default" and scaling not in ROPE_KINDS.get(kind, (scaling,)):
        reasons.append(f"mlx-lm's {kind} has no rotary embeddings of type {scaling}")
    if not _scales_as_usual(rope):
        reasons.append(f"mlx-lm reads no attention_factor, and {rope['attention_factor']} is not the usual one")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and kind not in PARTIAL_ROTATION:
        reasons.append(f"mlx-lm's {kind} rotates whole heads, not a part of {rope['partial_rotary_factor']}")
    if scaling in ("longrope", "su"):
        short = translated(config)["original_max_position_embeddings"]
        if max_seq_length > short:
            reasons.append(
                f"mlx-lm can't change from short_factor to long_factor past {short} tokens "
                f"and max_seq_length is {max_seq_length}; set it to {short}"
            )
    return reasons


def _scales_as_usual(rope: Config) -> bool:
    """Tell whether YaRN's attention_factor, where there is one, is what mlx-lm derives from `factor`."""
    stated = rope.get("attention_factor")
    if stated is None or rope.get("rope_type") in ("default", "linear", "llama3"):
        return True
    return rope["rope_type"] == "yarn" and math.isclose(stated, 0.1 * math.log(rope["factor"]) + 1, rel_tol=1e-6)


def _pattern_reasons(config: Config) -> list[str]:
    """Tell where layers come in an order that mlx-lm's interval can't say."""
    kind, types = _model_type(config), config.get("layer_types")
    ropes = config.get("rope_parameters") or {}
    if kind == "olmo3" and SLIDING in ropes and len({ropes[each]["rope_theta"] for each in set(types)}) > 1:
        return ["mlx-lm's olmo3 has one rope_theta for all layers"]
    if not types or kind not in ("qwen3_5", "qwen3_5_moe", "gemma3_text"):
        return []
    interval = _interval(types)
    regular = all((each == "full_attention") == ((layer + 1) % interval == 0) for layer, each in enumerate(types))
    return [] if regular else [f"mlx-lm's {kind} needs full attention at a fixed interval, not layer_types: {types}"]
