"""Whether a base's weights are packed already, and whether an engine can hold them as a config asks.

Both engines ask here before they load anything, so that what one can't do is said with what the other can.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import QuantizationConfig
from common.errors import UserError

BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, MLX = "bitsandbytes' 4-bit", "bitsandbytes' 8-bit (LLM.int8)", "MLX's quantised"


def stored_format(config: Mapping[str, Any]) -> str | None:
    """Name the format in which a checkpoint's weights are packed, by its config.json; None where they are not."""
    inside = config.get("text_config") or {}
    stored = config.get("quantization_config") or inside.get("quantization_config") or config.get("quantization")
    if not stored:
        return None
    if config.get("quantization") or ("quant_method" not in stored and "bits" in stored):
        return MLX
    if stored.get("load_in_4bit"):
        return BITSANDBYTES_4BIT
    return BITSANDBYTES_8BIT if stored.get("load_in_8bit") else str(stored.get("quant_method"))


def check_quantization(directory: Path, config: Mapping[str, Any], wanted: QuantizationConfig, engine: str) -> None:
    """Raise UserError where an engine can't hold a base as it is stored, or as the config wants it."""
    stored = stored_format(config)
    if engine == "torch" and wanted.mlx_format:
        raise UserError(
            "quantization.bits and quantization.mode: MLX's own formats, which torch can't read; "
            "write quantization: {load_in_4bit: true} for NF4, or use --engine mlx"
        )
    if engine == "torch" and stored == MLX:
        raise UserError(
            f"{directory}: holds MLX's quantised weights, which torch can't read; use --engine mlx, "
            "or the model that it was made from with quantization: {load_in_4bit: true}"
        )
    if engine == "mlx" and (wanted.load_in_8bit or stored == BITSANDBYTES_8BIT):
        where = "quantization.load_in_8bit" if wanted.load_in_8bit else f"{directory}"
        raise UserError(
            f"{where}: LLM.int8 rounds activations to 8 bits too, by bitsandbytes' kernels, which MLX lacks; "
            "write quantization: {bits: 8} for MLX's own 8 bits, or use --engine torch"
        )
    if stored and wanted.way and not _is_the_same(stored, config, wanted):
        raise UserError(
            f"{wanted.way}: {directory} holds {stored} weights already, and to round them again would lose more; "
            "delete the group quantization, or take the base that they were made from"
        )


def _is_the_same(stored: str, config: Mapping[str, Any], wanted: QuantizationConfig) -> bool:
    """Tell whether a config asks for just what the checkpoint holds."""
    if stored != BITSANDBYTES_4BIT or not wanted.load_in_4bit:
        return False
    settings = config["quantization_config"]
    asked = wanted.quant_type, wanted.use_double_quant
    return asked == (settings.get("bnb_4bit_quant_type"), settings.get("bnb_4bit_use_double_quant"))
