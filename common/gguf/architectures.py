"""The architectures that both Hugging Face and llama.cpp compute: one entry each, for both directions.

A fact about an architecture stands here once; exports read it from Hugging Face's side, conversions from llama.cpp's.
What llama.cpp does is read in its sources (src/models, convert_hf_to_gguf.py) and proven by running it: an architecture
that the tests have not run in llama.cpp is not listed, and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from common.gguf.layouts import ATTENTION, GEMMA2, GEMMA3, LLAMA, MLP, PHI3, QKV, QWEN3, Layout

# llama.cpp's setting, behind the architecture's name: Hugging Face's option.
SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
SOFT_CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
FRACTIONS = {"rms_norm_eps", *SOFT_CAPS}
WINDOW = {"attention.sliding_window": "sliding_window"}
WINDOW_PATTERN = "attention.sliding_window_pattern"


@dataclass(frozen=True)
class Architecture:
    """Say how llama.cpp holds a kind of model, and what its graph computes."""

    graph: MODEL_ARCH
    model_class: str  # transformers'
    layout: Layout
    biased: Layout = field(default_factory=dict)  # modules that have a bias
    optional_biases: Mapping[str, Layout] = field(default_factory=dict)  # by the option that says so
    activation: str = "silu"
    permuted: bool = False  # rows of q and k: the graph rotates neighbours together
    norm_offset: float = 0.0  # what llama.cpp expects to have been added to a norm's weight
    tied: bool = False  # always: there is no other head
    settings: Mapping[str, str] = field(default_factory=dict)  # beyond SETTINGS
    defaults: Mapping[str, Any] = field(default_factory=dict)  # llama.cpp's of those options
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")  # that its graph computes
    partial_rotary: bool = False  # a part of a head may be rotated
    windowless: bool = False  # llama.cpp sees everything where Hugging Face has a window
    window_pattern: int = 0  # every so many layers one sees everything, where no list says which
    local_theta: float | None = None  # of the rotary embedding of layers with a window, where they have their own
    layers_scaled_by_width: int = 0  # the model of so many layers scales attention by hidden_size / heads

    @property
    def name(self) -> str:
        """Give `general.architecture`."""
        return MODEL_ARCH_NAMES[self.graph]

    @property
    def is_gemma(self) -> bool:
        """Tell whether its attention has a scale of its own, and layers with a window."""
        return bool(self.window_pattern)

    def attention_scalar(self, config: Mapping[str, Any]) -> int:
        """Return what `query_pre_attn_scalar` llama.cpp computes with: the size of a head, but for one model."""
        if config["num_hidden_layers"] == self.layers_scaled_by_width:
            return int(config["hidden_size"] // config["num_attention_heads"])
        return head_size(config)


def head_size(config: Mapping[str, Any]) -> int:
    """Return the features of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


_LLAMA_BIASES = {"attention_bias": ATTENTION, "mlp_bias": MLP}
_LLAMA_ROPES = ("default", "linear", "yarn", "llama3")
# By model_type. Of those that share a graph, the first is what a GGUF is read as.
ARCHITECTURES = {
    "llama": Architecture(
        MODEL_ARCH.LLAMA,
        "LlamaForCausalLM",
        LLAMA,
        optional_biases=_LLAMA_BIASES,
        permuted=True,
        rope_kinds=_LLAMA_ROPES,
    ),
    "mistral": Architecture(
        MODEL_ARCH.LLAMA, "MistralForCausalLM", LLAMA, permuted=True, rope_kinds=_LLAMA_ROPES, windowless=True
    ),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, "Qwen2ForCausalLM", LLAMA, biased=QKV),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, "Qwen3ForCausalLM", QWEN3),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2,
        "Gemma2ForCausalLM",
        GEMMA2,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        tied=True,
        settings={**WINDOW, **SOFT_CAPS},
        defaults={"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        window_pattern=2,
        layers_scaled_by_width=46,  # Gemma 2 27B
    ),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3,
        "Gemma3ForCausalLM",
        GEMMA3,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        tied=True,
        settings=WINDOW,
        window_pattern=6,
        local_theta=10000.0,
        layers_scaled_by_width=62,  # Gemma 3 27B
    ),
    "phi3": Architecture(
        MODEL_ARCH.PHI3,
        "Phi3ForCausalLM",
        PHI3,
        settings=WINDOW,
        defaults={"sliding_window": None},
        rope_kinds=("default", "longrope"),
        partial_rotary=True,
        windowless=True,
    ),
}
