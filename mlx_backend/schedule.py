"""In which order and in what portions MLX sends its work to a device: its environment, read at its first evaluation.

Whoever sets one of these variables before the program starts is heeded.
"""

from __future__ import annotations

import os

import mlx.core as mx

from common.config import TrainConfig
from mlx_backend.budget import device_memory

LARGEST = 1000  # million numbers in a part of the work, MLX's own choice for large cards
BYTES_A_MILLION = 250e6  # of a card's free memory for each: 600 on an H200


def set_schedule(config: TrainConfig) -> None:
    """Choose what suits the config and the device."""
    on_cpu = config.device == "cpu" or (config.device == "auto" and mx.default_device().type == mx.cpu)
    # How many branches of its graph MLX walks side by side; 20 by default. Depth first, a checkpointed layer is
    # computed again when it is needed and not before: 90 MB for 109 (8 layers, a CPU, measured). Several streams, which
    # only a CPU has here, take turns by that; breadth first they work at the same time: 2.2 s a step of SmolLM2 on two
    # cores against 3.1 s.
    if config.gradient_checkpointing:
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")
    elif on_cpu:
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000000")
    if mx.cuda.is_available() and not on_cpu:
        operations, numbers = portion(config)
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", str(operations))
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", str(numbers))


def portion(config: TrainConfig) -> tuple[int, int]:
    """Return how much goes to a CUDA card at once, in operations and in millions of numbers that they read.

    Up to ten such portions wait there, and nothing that one of them reads is freed before it is done. Small ones cost
    the card's time: it waits between two of them, and for the first of a step while the host puts that together. Of a
    3B's 4 x 2048 on an H200 it waits 27 ms a step in 23.6 GB with the smallest here, 10 in 27.9 with those for its
    memory, and 6 in 29.6 with a third more. Where layers are computed again memory is what is short.
    """
    if config.gradient_checkpointing:
        return 20, 50
    return 40, max(50, min(LARGEST, int(device_memory(config.device).free_bytes / BYTES_A_MILLION)))
