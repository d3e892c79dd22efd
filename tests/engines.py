"""What tests of real engines share: opening one with the initial adapter, and a small data set.

They run on the CPU; TWINTUNE_TEST_DEVICE=gpu runs the same suite on a card.
"""

import os
from pathlib import Path

import numpy as np

from common.config import LoraConfig, TrainConfig
from common.data.tokens import TokenDataset, build_dataset
from common.engine import Engine, StepBatch, TrainState, open_engine
from common.initial import starting_weights
from common.lora import as_stored

ENGINES = ("mlx", "torch")
Step = tuple[float, dict[str, np.ndarray]]  # loss and gradient
# MLX multiplies float32 in TensorFloat-32 on CUDA unless told not to; the tests compare with exact float32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
DEVICE = os.environ.get("TWINTUNE_TEST_DEVICE", "cpu")
TORCH_DEVICE = "cpu" if DEVICE == "cpu" else "cuda"


def open_fresh(name: str, model: Path, lora: LoraConfig | None = None, **settings: object) -> Engine:
    """Open an engine in float32, unless told otherwise, with the initial adapter of seed 42."""
    config = TrainConfig(
        **({"device": DEVICE, "dtype": "float32", "torch_compile": False} | settings), lora=lora or LoraConfig()
    )
    engine = open_engine(name, config, model, as_stored(config.lora))
    engine.load_state(TrainState.fresh(starting_weights(engine, config.lora, config.seed)))
    return engine


def make_batches(examples: int = 22, seed: int = 0, vocabulary: int = 400, beginning: int = 0) -> TokenDataset:
    """Make examples of 5 to 45 random tokens, the second part of them supervised, after some that all begin with."""
    rng = np.random.default_rng(seed)
    rows, same = [], np.random.default_rng(seed + 1).integers(0, vocabulary, beginning).tolist()
    for index in range(examples):
        length = int(rng.integers(5, 46))
        answer = int(rng.integers(1, length - 1))
        ids = rng.integers(0, vocabulary, length).tolist()
        mask = [False] * beginning + [position >= answer for position in range(length)]
        rows.append((same + ids, mask, f"made:{index + 1}"))
    return build_dataset(rows)


def gradient_of(engine: Engine, batch: StepBatch) -> Step:
    """Return the loss of a step and its gradient, read from the first moment of one update; A and B are random."""
    rng = np.random.default_rng(1)
    state = TrainState.fresh(
        {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in engine.adapter_shapes().items()}
    )
    engine.load_state(state)
    result = engine.fetch(engine.train_step(batch, 1e-3))
    return result.loss_sum, engine.read_state().moment1
