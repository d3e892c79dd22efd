"""How much memory a device has left for torch, how fast it multiplies, and what torch raises when it is full."""

from __future__ import annotations

import time

import psutil
import torch

from common.engine import DeviceMemory
from torch_backend.device import DTYPES, choose_device, look_at

SIDES = {"cuda": 8192, "mps": 2048, "cpu": 512}  # of the matrices that are multiplied
REPEATS = 4


def device_memory(device: str) -> DeviceMemory:
    """Return the device that the config means; raises MachineError where it isn't there."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        free, hardware = torch.cuda.mem_get_info(chosen)[0], look_at(chosen)
        return DeviceMemory("cuda", torch.cuda.get_device_name(chosen), free, hardware.compiles(hardware.dtype))
    if chosen.type == "mps":
        return DeviceMemory("mps", "the Apple GPU (MPS)", torch.mps.recommended_max_memory())
    return DeviceMemory("cpu", "the CPU", psutil.virtual_memory().available)


def matmul_rate(device: str) -> float:
    """Time products of square matrices, after one that warms up: FLOP/s."""
    chosen = choose_device(device)
    side = SIDES[chosen.type]
    matrix = torch.ones(side, side, device=chosen, dtype=DTYPES[look_at(chosen).dtype])
    (matrix @ matrix)[0, 0].item()
    began = time.perf_counter()
    for _ in range(REPEATS):
        product = matrix @ matrix
    product[0, 0].item()  # waits for the device
    return REPEATS * 2 * side**3 / (time.perf_counter() - began)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out: CUDA's own class, or a RuntimeError of MPS or the CPU."""
    signs = ("DefaultCPUAllocator", "MPS backend out of memory")
    plain = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return plain or isinstance(error, torch.OutOfMemoryError)
