"""A minute's proof that an engine trains right here: a tiny model, a few steps, and the losses they must have.

The model is written with NumPy alone, so that a Mac with nothing but MLX can do it; batches, initial adapter and
schedule are a run's own. The losses are compared with those of the two engines on a Linux CPU, and with each other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.adapters.adapter import save_tensors
from common.batches import BatchPlan
from common.config import LoraConfig, TrainConfig
from common.data.tokens import build_dataset
from common.doctor.finding import Finding
from common.engine import EXTRAS, Engine, TrainState, open_engine
from common.errors import TwintuneError
from common.initial import starting_weights

VOCABULARY, HIDDEN, INNER, LAYERS, QUERIES, KEYS, HEAD = 96, 32, 48, 2, 4, 2, 12
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": QUERIES,
    "num_key_value_heads": KEYS,
    "head_dim": HEAD,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
STEPS = 6
# Both engines' losses a token on a Linux CPU; tests/test_doctor.py holds them to it.
EXPECTED = (5.442410, 5.277422, 5.500897, 5.081871, 5.172668, 5.219234)
# float32 sums in another order on a CPU; GPUs multiply float32 in fewer bits (TensorFloat-32).
TOLERANCE = {"cpu": 1e-4}
GPU_TOLERANCE = 1e-2


def self_test(names: list[str]) -> Iterator[Finding]:
    """Train the tiny model on each engine and compare their losses with the expected ones."""
    with tempfile.TemporaryDirectory(prefix="twintune-") as folder:
        model = write_tiny_model(Path(folder))
        for name in names:
            yield _tested(name, model)


def write_tiny_model(folder: Path) -> Path:
    """Write a random Llama of 40,000 weights, float32, norms not 1; returns the folder."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    rng = np.random.default_rng(0)
    tensors = {name: (rng.standard_normal(shape) * 0.2).astype(np.float32) for name, shape in _shapes().items()}
    save_tensors(folder / "model.safetensors", {n: t + 1 if t.ndim == 1 else t for n, t in tensors.items()})
    return folder


def train_tiny_model(name: str, model: Path) -> tuple[Engine, list[float]]:
    """Train some steps in float32 on the device that `auto` means; returns the engine and the losses a token."""
    config = TrainConfig(dtype="float32", lora=LoraConfig(r=4, lora_alpha=8))
    engine = open_engine(name, config, model, config.lora)
    engine.load_state(TrainState.fresh(starting_weights(engine, config.lora, config.seed)))
    rng, examples = np.random.default_rng(1), []
    for index in range(2 * STEPS):
        ids = rng.integers(0, VOCABULARY, 16 + index).tolist()
        examples.append((ids, [position > 4 for position in range(len(ids))], f"made:{index + 1}"))
    batches = BatchPlan(build_dataset(examples), batch_size=2, accumulation=1, seed=0, num_train_epochs=1)
    results = [engine.fetch(engine.train_step(batches.step_batch(step), 1e-2)) for step in range(1, STEPS + 1)]
    return engine, [result.loss_sum / result.num_loss_tokens for result in results]


def _tested(name: str, model: Path) -> Finding:
    what = f"{name} self-test"
    try:
        engine, losses = train_tiny_model(name, model)
    except TwintuneError as error:
        return Finding("wrong", what, str(error))
    except Exception as error:  # whatever a broken library raises is what an examination is for
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Finding(
            "wrong", what, reason, f"reinstall the engine's packages: pip install -U 'twintune[{EXTRAS[name]}]'"
        )
    device = engine.device
    tolerance = TOLERANCE.get(engine.device_type, GPU_TOLERANCE)
    engine.close()
    difference = max(abs(found / expected - 1) for found, expected in zip(losses, EXPECTED, strict=True))
    found = f"{STEPS} steps on {device}, losses within {difference:.0e} of the expected ones"
    if not difference <= tolerance:
        fix = "this device computes something else: update its driver and the engine, and report it with this output"
        return Finding("wrong", what, found, fix)
    return Finding("ok", what, found)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_proj": (KEYS * HEAD, HIDDEN) for name in ("k", "v")}
        shapes |= {
            f"{at}.self_attn.q_proj": (QUERIES * HEAD, HIDDEN),
            f"{at}.self_attn.o_proj": (HIDDEN, QUERIES * HEAD),
        }
        shapes |= {f"{at}.mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (HIDDEN, INNER)}
    shapes |= {"model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}
