"""The torch engine: LoRA and QLoRA on CUDA, also on MPS and the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.config import LoraConfig, TrainConfig
    from common.engine import Engine


def open_engine(config: TrainConfig, model_dir: Path, lora: LoraConfig | None) -> Engine:
    """Load the base model with transformers, inject the adapter with PEFT and return a ready engine."""
    from torch_backend.engine import TorchEngine

    return TorchEngine(config, model_dir, lora)
