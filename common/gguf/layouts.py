"""The tensors of a Hugging Face model of an architecture that llama.cpp has: names and shapes, by its config.

What stands here are Hugging Face's names alone; what llama.cpp calls the same is the `gguf` package's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Modules of a layer: the sizes of their weight, by the names that `_sizes` gives them.
Layout = Mapping[str, tuple[str, ...]]

QKV: Layout = {
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
}
ATTENTION: Layout = {**QKV, "self_attn.o_proj": ("hidden", "queries")}
MLP: Layout = {
    "mlp.gate_proj": ("inner", "hidden"),
    "mlp.up_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
}
NORMS: Layout = {"input_layernorm": ("hidden",), "post_attention_layernorm": ("hidden",)}
MLP_NORMS: Layout = {"pre_feedforward_layernorm": ("hidden",), "post_feedforward_layernorm": ("hidden",)}
HEAD_NORMS: Layout = {"self_attn.q_norm": ("head",), "self_attn.k_norm": ("head",)}

LLAMA: Layout = {**ATTENTION, **MLP, **NORMS}
QWEN3: Layout = {**LLAMA, **HEAD_NORMS}
GEMMA2: Layout = {**LLAMA, **MLP_NORMS}
GEMMA3: Layout = {**GEMMA2, **HEAD_NORMS}
PHI3: Layout = {
    "self_attn.qkv_proj": ("queries, keys, values", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
    "mlp.gate_up_proj": ("gate and up", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
    **NORMS,
}


def tensor_shapes(
    config: Mapping[str, Any], layer: Layout, biased: Layout, tied: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each tensor, in the order in which a model computes."""
    sizes = _sizes(config)
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(config["num_hidden_layers"]):
        for module, names in layer.items():
            shape = tuple(sizes[name] for name in names)
            yield f"model.layers.{number}.{module}.weight", shape
            if module in biased:
                yield f"model.layers.{number}.{module}.bias", shape[:1]
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocabulary, hidden)


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    head, inner = config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "hidden": config["hidden_size"],
        "inner": inner,
        "gate and up": 2 * inner,
        "head": head,
        "queries": queries,
        "keys": keys,
        "queries, keys, values": queries + 2 * keys,
    }
