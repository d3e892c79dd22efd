"""What a run needs, said before it starts: held against measured peaks, and against what real engines keep and refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest

from common.config import LoraConfig, QuantizationConfig, TrainConfig
from common.engine import DeviceMemory
from common.errors import MachineError, UserError
from common.estimate import guard
from common.estimate.changes import changed, find_changes
from common.estimate.guard import advise, refuse_hopeless, total_bytes
from common.estimate.memory import estimate_memory
from common.estimate.shape import read_shape, shape_of
from common.estimate.workload import Workload
from common.weights import read_header, read_model_config, weight_files

H200 = DeviceMemory("cuda", "NVIDIA H200", 150 * 10**9, compiles=True)
CPU = DeviceMemory("cpu", "the CPU", 20 * 10**9)
GB = 10**9


def decoder(layers: int, hidden: int, inner: int, queries: int, keys: int, vocabulary: int):
    """Make the config and headers of a tied Llama."""
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": queries // 128,
        "num_key_value_heads": keys // 128,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.q_proj": (queries, hidden), f"{at}.self_attn.o_proj": (hidden, queries)}
        shapes |= {f"{at}.self_attn.{name}_proj": (keys, hidden) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (hidden, inner)}
    return config, {f"{name}.weight": {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}


LLAMA_3B = shape_of("3B", *decoder(28, 3072, 8192, 3072, 1024, 128256))
NF4, MLX4 = QuantizationConfig(load_in_4bit=True), QuantizationConfig(bits=4)
CHECKPOINTED = {"gradient_checkpointing": True}
OFFLOADED = {**CHECKPOINTED, "activation_offloading": True}
PACKED = Workload(longest=80, supervised_share=0.4)

# Measured on one H200, 2026-11-23: torch 2.11 and MLX 0.32.4, LoRA r=16 on all linear layers of a 3B shape, 4 x 2048.
MEASURED = [
    ("torch", {}, Workload(), 22.1),
    ("torch", {"quantization": NF4}, Workload(), 18.05),
    ("torch", CHECKPOINTED, Workload(), 9.74),
    ("torch", OFFLOADED, Workload(), 8.48),
    ("torch", {"quantization": NF4, **CHECKPOINTED}, Workload(), 5.69),
    ("torch", {"quantization": NF4, **OFFLOADED}, Workload(), 4.43),
    ("torch", {"quantization": NF4, **CHECKPOINTED, "per_device_train_batch_size": 1}, Workload(), 3.64),
    ("torch", {"packing": True}, PACKED, 23.4),
    ("torch", {"packing": True, "torch_compile": False}, PACKED, 43.4),
    ("mlx", {}, Workload(), 58.5),
    ("mlx", {"quantization": MLX4, **CHECKPOINTED}, Workload(), 35.9),
]


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"per_device_train_batch_size": 4, "max_seq_length": 2048, "lora": LoraConfig(r=16)} | changes)


@pytest.mark.parametrize(("engine", "changes", "workload", "peak"), MEASURED)
def test_estimates_are_within_a_tenth_of_what_was_measured_on_a_card(engine, changes, workload, peak):
    config = settings(**changes)
    memory = estimate_memory(LLAMA_3B, config, workload.work(config), engine, H200)
    print(f"{memory.total / 1e9:.2f} estimated, {peak} measured", memory.parts)
    assert memory.total == pytest.approx(peak * GB, rel=0.1)
