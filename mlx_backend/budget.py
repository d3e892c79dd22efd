"""How much memory a device has left for MLX, holding MLX to it, and how fast it multiplies."""

from __future__ import annotations

import time

import mlx.core as mx
import psutil
from mlx_lm.utils import maybe_set_recommended_wired_limit

from common.engine import DeviceMemory
from common.heap import give_pages_back, keep_pages
from mlx_backend.model import choose_device

REPEATS = 4
SIDE_ON_GPU, SIDE_ON_CPU = 4096, 512  # of the matrices that are multiplied
SHARE = 0.95  # of what is free; the rest is for what MLX doesn't count: heaps, compiled kernels


def device_memory(device: str) -> DeviceMemory:
    """Return the device that the config means; raises MachineError where it isn't there."""
    if choose_device(device).type != mx.gpu:
        return DeviceMemory("cpu", "the CPU", psutil.virtual_memory().available)
    info = mx.device_info()
    if mx.metal.is_available():  # what Apple says the GPU may hold without being slowed down
        return DeviceMemory("metal", str(info["device_name"]), int(info["max_recommended_working_set_size"]))
    return DeviceMemory("cuda", str(info["device_name"]), int(info.get("free_memory", mx.get_memory_limit())))


class Limits:
    """Keep MLX within what the device has free, until `restore`.

    Near its memory limit MLX gives back cached buffers, and past it the host waits for the device instead of running
    ahead. So the limit is what there is and not what a run should need: on an H200 one below a run's peak saved
    11 GB and cost 18% of the speed. On a Mac, where MLX's own limit is half as much again as the GPU may hold without
    being slowed down, weights are wired besides, lest macOS compress them between two steps. On a CPU the process
    keeps its pages from step to step.
    """

    def __init__(self, device: str) -> None:
        """Set the limits; the cache counts within them."""
        self._on_gpu = on_gpu = choose_device(device).type == mx.gpu
        on_mac = on_gpu and mx.metal.is_available()
        held = 0 if on_mac else mx.get_active_memory()  # a Mac tells what there is, others what is left
        limit = held + int(SHARE * device_memory(device).free_bytes)
        self._memory = mx.set_memory_limit(limit)
        self._cache = mx.set_cache_limit(limit)
        if self._cache < limit:
            mx.set_cache_limit(self._cache)  # 32 MB on a CPU, where more gained no time
        self._wired = maybe_set_recommended_wired_limit() if on_mac else None
        if not on_gpu:
            keep_pages()

    def restore(self) -> None:
        """Set the limits back to what they were; the device has to be idle."""
        mx.set_memory_limit(self._memory)
        mx.set_cache_limit(self._cache)
        if self._wired is not None:
            mx.set_wired_limit(self._wired)
        if not self._on_gpu:
            give_pages_back()


def matmul_rate(device: str) -> float:
    """Time products of square matrices, after one that warms up: FLOP/s."""
    on_gpu = choose_device(device).type == mx.gpu
    side = SIDE_ON_GPU if on_gpu else SIDE_ON_CPU
    matrix = mx.ones((side, side), mx.bfloat16 if on_gpu else mx.float32)
    mx.eval(matrix @ matrix)
    began = time.perf_counter()
    mx.eval([matrix @ (matrix + step) for step in range(REPEATS)])
    return REPEATS * 2 * side**3 / (time.perf_counter() - began)
