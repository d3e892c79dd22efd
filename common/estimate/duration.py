"""How long an epoch takes: a probe of the machine's matrix products, times the share of them that training reached.

The probe takes a second; the shares are measured, by engine and kind of device. A forward pass takes 2 FLOPs a weight
and position, the backward pass of a frozen base as many, checkpointing the forward pass again.
"""

from __future__ import annotations

from common.config import TrainConfig
from common.estimate.shape import ModelShape

# Of the measured rate of matrix products. H200, a 3B shape in bfloat16, 790 TFLOP/s: torch 32,596 tokens a second,
# MLX 28,700; two CPU cores, SmolLM2, 180 GFLOP/s: MLX 217, torch 190. Metal, MPS: none.
SHARES = {("torch", "cuda"): 0.53, ("mlx", "cuda"): 0.47, ("mlx", "cpu"): 0.65, ("torch", "cpu"): 0.57}
UNMEASURED = 0.5


def seconds_per_epoch(
    shape: ModelShape, config: TrainConfig, name: str, device_type: str, positions: int, rate: float
) -> float:
    """Return the seconds that `positions` take at a measured `rate` of FLOP/s."""
    passes = 6 if config.gradient_checkpointing else 4
    weights = shape.quantisable + shape.vocabulary * shape.hidden
    return passes * weights * positions / (rate * SHARES.get((name, device_type), UNMEASURED))
