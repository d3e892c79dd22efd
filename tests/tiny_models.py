"""Tiny random checkpoints, made by transformers: every in differs from every out, theta is not 10000."""

from pathlib import Path

import torch
from tiny_tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 416


def write_llama(directory: Path, tied: bool = False, seed: int = 0, **changes: object) -> Path:
    """Write a Llama of 0.1 million random float32 weights and its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # q_proj 48 -> 64, k_proj and v_proj 48 -> 32
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,  # large enough that attention and RoPE matter
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory
