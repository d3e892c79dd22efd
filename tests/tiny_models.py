"""Tiny random checkpoints, made by transformers: every in differs from every out, theta is not 10000."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_tokenizer import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

VOCABULARY = 416
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # q_proj 48 -> 64, k_proj and v_proj 48 -> 32
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "initializer_range": 0.2,  # large enough that attention and RoPE matter
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write_llama(directory: Path, tied: bool = False, seed: int = 0, **changes: object) -> Path:
    """Write a Llama of 0.1 million random float32 weights and its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    settings = SHAPE | {"rms_norm_eps": 1e-5, "tie_word_embeddings": tied} | changes
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


WINDOW = 8  # tokens that a sliding layer sees, fewer than most examples of the tests have
THETA = {"rope_theta": 50000.0}
LOCAL_AND_GLOBAL = {"rope_type": "default", "rope_theta": 20000.0}, {"rope_type": "default", "rope_theta": 70000.0}
SQUARE = {"hidden_size": 64}  # 4 heads of 16: mlx-lm derives the size of a head in these architectures
LLAMA3_ROPE = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = THETA | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.1],
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "partial_rotary_factor": 0.75,
}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA_NET = {
    "num_hidden_layers": 4,  # every fourth has attention
    "initializer_range": 0.05,  # a recurrence multiplies rounding errors too
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
GEMMA3 = {
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 24,
    "rope_parameters": dict(zip(("sliding_attention", "full_attention"), LOCAL_AND_GLOBAL, strict=True)),
}
VISION = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}


@dataclass(frozen=True)
class Family:
    """Describe a tiny checkpoint of an architecture: which models have it, and how its config differs from SHAPE."""

    model_type: str
    examples: str
    settings: Mapping[str, object] = field(default_factory=dict)
    vision: Mapping[str, object] | None = None  # a tower beside the text model, which the settings are then of
    packs_on: tuple[str, ...] = ("mlx", "torch")
    max_seq_length: int = 2048


FAMILIES = {
    "llama": Family("llama", "SmolLM 2, Llama 2, 3", {"tie_word_embeddings": True}),
    "llama-scaled": Family(
        "llama", "Llama 3.1 to 3.3", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}
    ),
    "mistral": Family("mistral", "Mistral 7B, Nemo, Small 2", {"sliding_window": WINDOW}),
    "ministral3": Family(
        "ministral3", "Ministral 3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}, packs_on=("torch",)
    ),
    "mistral3": Family(
        "mistral3",
        "Mistral Small 3.1, 3.2",
        {"model_type": "mistral", "sliding_window": None},
        VISION | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 12},
    ),
    "mixtral": Family("mixtral", "Mixtral", SQUARE | {"num_local_experts": 6}),
    "qwen2": Family("qwen2", "Qwen 2, 2.5", SQUARE | {"tie_word_embeddings": True}),
    "qwen2-yarn": Family("qwen2", "Qwen 2.5 with YaRN", SQUARE | {"rope_parameters": YARN}),
    "qwen2-window": Family(
        "qwen2",
        "Qwen 2 with use_sliding_window",
        SQUARE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2_moe": Family("qwen2_moe", "Qwen 1.5 and 2 MoE", SQUARE | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3": Family("qwen3", "Qwen 3", {"tie_word_embeddings": True}),
    "qwen3_moe": Family("qwen3_moe", "Qwen 3 MoE", EXPERTS | {"norm_topk_prob": True}),
    "qwen3_5_text": Family("qwen3_5_text", "Qwen 3.5, text alone", DELTA_NET, packs_on=()),
    "qwen3_5": Family(
        "qwen3_5",
        "Qwen 3.5",
        DELTA_NET | {"tie_word_embeddings": True},
        {"depth": 1, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48},
        packs_on=(),
    ),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text",
        "Qwen 3.5 MoE, text alone",
        DELTA_NET | EXPERTS | {"shared_expert_intermediate_size": 40},
        packs_on=(),
    ),
    "gemma2": Family(
        "gemma2", "Gemma 2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}
    ),
    "gemma3_text": Family("gemma3_text", "Gemma 3 270M, 1B", GEMMA3),
    "gemma3": Family("gemma3", "Gemma 3 4B, 12B, 27B", GEMMA3, VISION | {"image_size": 28, "patch_size": 14}),
    "phi3": Family("phi3", "Phi 3 mini 4K, Phi 4", SQUARE | {"sliding_window": WINDOW}),
    "phi3-longrope": Family(
        "phi3",
        "Phi 3 128K, Phi 4 mini",
        SQUARE | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64, "tie_word_embeddings": True},
        max_seq_length=64,
    ),
    "smollm3": Family("smollm3", "SmolLM 3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "olmo2": Family("olmo2", "OLMo 2"),
    "olmo3": Family(
        "olmo3",
        "OLMo 3",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": YARN | {"attention_factor": 1.1386294361119891},
                "sliding_attention": THETA | {"rope_type": "default"},
            },
        },
    ),
    "olmoe": Family("olmoe", "OLMoE", SQUARE | EXPERTS),
    "granite": Family(
        "granite",
        "Granite 3, 4 dense",
        SQUARE
        | {"embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.4, "logits_scaling": 3.0},
    ),
    "cohere2": Family("cohere2", "Command R7B, A", SQUARE | {"num_hidden_layers": 4, "sliding_window": WINDOW}),
    "glm4": Family("glm4", "GLM 4 0414", {"rope_parameters": THETA | {"rope_type": "default"}}),
    "seed_oss": Family("seed_oss", "Seed-OSS"),
    "gpt_oss": Family(
        "gpt_oss",
        "GPT-OSS in bfloat16",
        {
            "sliding_window": WINDOW,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
    ),
}


def write_family(directory: Path, family: str, **changes: object) -> Path:
    """Write a tiny random checkpoint of FAMILIES or of another model_type, its text config changed; returns the folder.

    Norms, biases and gates are drawn too: transformers begins them at 1 and 0, which hides what a wrong sign or
    a missing 1 + w does.
    """
    torch.manual_seed(0)
    described = FAMILIES.get(family) or Family(family, "")
    text = deepcopy(SHAPE | dict(described.settings) | changes)  # transformers writes into what it is given
    if described.vision is None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(described.model_type, **text))
    else:
        config = AutoConfig.for_model(described.model_type, text_config=text, vision_config=dict(described.vision))
        config.tie_word_embeddings = config.text_config.tie_word_embeddings
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.ndim == 1 else 0.02)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory
