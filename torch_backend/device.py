"""Where torch computes and what can be done there: the one place that asks for a card's generation.

The config decides where it says something; what stands here is what `auto` and null mean. Turing cards (7.5) have
neither bfloat16 nor FlashAttention-2: they train in float16, and each packed example attends by itself, in layers that
are not compiled then. Without Triton, as on Windows where nobody installed it, no layer is; all else is the same.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch

from common.errors import MachineError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """Know the kind of a device and, of a card, its generation: (7, 5) Turing, (8, 0) Ampere, (9, 0) Hopper."""

    type: str  # "cuda", "mps" or "cpu"
    capability: tuple[int, int] = (0, 0)
    has_triton: bool = False

    @property
    def dtype(self) -> str:
        """Give the dtype that `auto` means."""
        if self.type != "cuda":
            return "float32"
        return "bfloat16" if self._has_bfloat16 else "float16"

    @property
    def prefers_cudnn(self) -> bool:
        """Tell whether cuDNN's attention is the fastest."""
        return self.type == "cuda" and self.capability >= (9, 0)

    @property
    def runs_triton(self) -> bool:
        """Tell whether Triton is there and knows the card."""
        return self.type == "cuda" and self.has_triton and self.capability >= (7, 0)

    def borders(self, dtype: str) -> bool:
        """Tell whether products are rounded before they are added, so that LoRA's belongs into the base's own."""
        return self.type == "cuda" and dtype != "float32"

    def has_varlen(self, dtype: str) -> bool:
        """Tell whether one kernel, FlashAttention-2's, attends within all examples of a packed row."""
        return self.type == "cuda" and self.capability >= (8, 0) and dtype != "float32"

    def compiles(self, dtype: str) -> bool:
        """Tell whether compiling pays without being asked for: on CUDA, where Triton is there and knows the card."""
        return self.type == "cuda" and self.why_not_compiled(dtype) is None

    def why_not_compiled(self, dtype: str) -> str | None:
        """Say why layers can't be compiled here, None where they can."""
        if self.type != "cuda":
            return None  # by a C++ compiler or for Metal
        if not self.has_triton:
            return "Triton is not installed; pip install triton (on Windows triton-windows)"
        if self.capability < (7, 0):
            return "Triton knows no card older than Volta"
        if dtype == "bfloat16" and not self._has_bfloat16:
            return "this card has no bfloat16; write dtype: float16"
        return None

    @property
    def _has_bfloat16(self) -> bool:
        return self.capability >= (8, 0)


@functools.cache
def look_at(device: torch.device) -> Hardware:
    """Ask a device what it is."""
    if device.type != "cuda":
        return Hardware(device.type)
    has_triton = importlib.util.find_spec("triton") is not None
    return Hardware("cuda", torch.cuda.get_device_capability(device), has_triton)


def choose_device(device: str) -> torch.device:
    """Resolve the config's device: auto takes CUDA, then MPS, then the CPU.

    Raises MachineError where the device asked for isn't there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device in ("auto", "gpu"):
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, usable in available.items() if usable)
        raise MachineError(
            f"device: {device}: torch {torch.__version__} sees none here, only {there}; "
            "use device: auto, or install a torch built for it"
        )
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def describe(device: torch.device) -> str:
    """Name a device as a person would."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "the Apple GPU (MPS)" if device.type == "mps" else f"the CPU ({torch.get_num_threads()} threads)"


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device, behind the work that waits there.

    From memory that isn't pinned CUDA may copy only once its stream is done; the host would wait with it, and the card
    for the host afterwards.
    """
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
