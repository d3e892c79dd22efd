"""Tiny random checkpoints, made by transformers: every in differs from every out, theta is not 10000."""

from pathlib import Path

import torch
from tiny_tokenizer import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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
LOCAL_AND_GLOBAL = {"rope_type": "default", "rope_theta": 10000.0}, {"rope_type": "default", "rope_theta": 70000.0}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"hidden_size": 64},  # mlx-lm derives the size of its heads from it
    "qwen3": {},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "rope_parameters": dict(zip(("sliding_attention", "full_attention"), LOCAL_AND_GLOBAL, strict=True)),
    },
}


def write_family(directory: Path, family: str, **changes: object) -> Path:
    """Write a tiny random checkpoint of an architecture of FAMILIES; returns the folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHAPE | FAMILIES.get(family, {}) | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory
