"""The torch engine: LoRA and QLoRA on CUDA, also on MPS and the CPU."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import cache_folder

if TYPE_CHECKING:
    from common.config import LoraConfig, TrainConfig
    from common.doctor.finding import Finding
    from common.engine import DeviceMemory, Engine

ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}  # variables that set it up


def open_engine(config: TrainConfig, model_dir: Path, lora: LoraConfig | None) -> Engine:
    """Load the base model with transformers, inject the adapter with PEFT and return a ready engine."""
    _set_environment()
    _quieten()
    from torch_backend.engine import TorchEngine

    return TorchEngine(config, model_dir, lora)


def examine() -> list[Finding]:
    """Say how the machine suits the engine: device, driver, kernels."""
    _set_environment()
    _quieten()
    from torch_backend import health

    return list(health.examine())


def packable_modules(config: Mapping[str, Any], where: Path) -> Sequence[str]:
    """List the linear modules of transformers' model of a config that bitsandbytes packs."""
    _quieten()
    from torch_backend import model

    return model.packable_modules(config, where)


def device_memory(device: str) -> DeviceMemory:
    """Say where the config's device is and how much of its memory is free."""
    _set_environment()
    _quieten()
    from torch_backend import budget

    return budget.device_memory(device)


def matmul_rate(device: str) -> float:
    """Measure the FLOP/s of a matrix product in the dtype that training takes there."""
    from torch_backend import budget

    return budget.matmul_rate(device)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out."""
    from torch_backend import budget

    return budget.is_out_of_memory(error)


def _set_environment() -> None:
    """Set what OpenMP, inductor and torch's allocator read when they start, which importing torch does.

    Threads that spin at each barrier collapse where anything else uses a core: with one of two cores busy, a step of
    SmolLM2 took over 30 s spinning and 4 s sleeping; alone, 2.4 s either way. And what is compiled is kept beside our
    other caches: torch's own place for it, in /tmp, is lost when a machine starts.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = cache_folder() / "inductor"
    if os.access(next(path for path in (folder, *folder.parents) if path.exists()), os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    # In segments of fixed sizes a card's memory falls to pieces: 6 to 21% beside what arrays took (H200, 3B and 8B).
    # Under WSL growing ones can fail at the first array (pytorch issue 192330).
    if sys.platform == "linux" and "microsoft" not in platform.release().lower() and not ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _quieten() -> None:
    """Silence libraries' notices to each other's developers, which would stand between a person and our one message."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
