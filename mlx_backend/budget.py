"""How much memory a device has left for MLX, and how fast it multiplies."""

from __future__ import annotations

import time

import mlx.core as mx
import psutil

from common.engine import DeviceMemory
from mlx_backend.model import choose_device

REPEATS = 4
SIDE_ON_GPU, SIDE_ON_CPU = 4096, 512  # of the matrices that are multiplied


def device_memory(device: str) -> DeviceMemory:
    """Return the device that the config means; raises MachineError where it isn't there."""
    if choose_device(device).type != mx.gpu:
        return DeviceMemory("cpu", "the CPU", psutil.virtual_memory().available)
    info = mx.device_info()
    if mx.metal.is_available():  # what Apple says the GPU may hold without being slowed down
        return DeviceMemory("metal", str(info["device_name"]), int(info["max_recommended_working_set_size"]))
    return DeviceMemory("cuda", str(info["device_name"]), int(info.get("free_memory", mx.get_memory_limit())))


def matmul_rate(device: str) -> float:
    """Time products of square matrices, after one that warms up: FLOP/s."""
    on_gpu = choose_device(device).type == mx.gpu
    side = SIDE_ON_GPU if on_gpu else SIDE_ON_CPU
    matrix = mx.ones((side, side), mx.bfloat16 if on_gpu else mx.float32)
    mx.eval(matrix @ matrix)
    began = time.perf_counter()
    mx.eval([matrix @ (matrix + step) for step in range(REPEATS)])
    return REPEATS * 2 * side**3 / (time.perf_counter() - began)
