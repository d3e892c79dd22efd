"""The MLX engine: native LoRA training on Apple silicon, also on a Linux CPU.

Nothing of MLX is imported here: on Linux the fast BLAS must be in place before the first `import mlx.core`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.config import LoraConfig, QuantizationConfig, TrainConfig
    from common.convert.source import Source
    from common.convert.target import Target
    from common.doctor.finding import Finding
    from common.engine import Array, DeviceMemory, Engine


def open_engine(config: TrainConfig, model_dir: Path, lora: LoraConfig | None) -> Engine:
    """Load the base model with mlx-lm, inject the adapter and return a ready engine."""
    from mlx_backend.blas import use_fast_blas

    blas = use_fast_blas()
    if blas.startswith("warning"):
        logging.getLogger(__name__).warning(blas)
    from mlx_backend.schedule import set_schedule

    set_schedule(config)
    from mlx_backend.engine import MLXEngine

    return MLXEngine(config, model_dir, lora)


def examine() -> list[Finding]:
    """Say how the machine suits the engine: device, BLAS, compiler."""
    from mlx_backend.blas import use_fast_blas

    blas = use_fast_blas()
    from mlx_backend import health

    return list(health.examine(blas))


def dequantize(parts: Sequence[Array], form: Mapping[str, Any]) -> Array:
    """Unpack rows in one of MLX's formats to float32."""
    if "mlx.core" not in sys.modules:  # it is called for every block of rows
        from mlx_backend.blas import use_fast_blas

        use_fast_blas()
    from mlx_backend import convert

    return convert.dequantize(parts, form)


def conversion_target(source: Source, quantization: QuantizationConfig, dtype: str | None) -> Target:
    """Plan the folder that mlx-lm makes of a model."""
    from mlx_backend.blas import use_fast_blas

    use_fast_blas()
    from mlx_backend import convert

    return convert.MlxTarget(source, quantization, dtype)


def device_memory(device: str) -> DeviceMemory:
    """Say where the config's device is and how much of its memory is free."""
    from mlx_backend.blas import use_fast_blas

    use_fast_blas()
    from mlx_backend import budget

    return budget.device_memory(device)


def matmul_rate(device: str) -> float:
    """Measure the FLOP/s of a matrix product in the dtype that training takes there."""
    from mlx_backend.blas import use_fast_blas

    use_fast_blas()
    from mlx_backend import budget

    return budget.matmul_rate(device)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out."""
    signs = ("malloc] ", "Insufficient Memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
