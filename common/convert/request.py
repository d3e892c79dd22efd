"""What `twintune convert` is asked for, from the command line's words, and which of them go together."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.base.shards import SHARD_BYTES
from common.config import QuantizationConfig, TrainConfig
from common.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Request:
    """Say what `twintune convert` was asked for."""

    model: str
    output: Path
    to: Literal["hf", "mlx", "bnb"] = "hf"
    dtype: str | None = None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)  # of MLX's own formats
    quant_type: Literal["nf4", "fp4", "int8"] | None = None
    double_quant: bool = False
    max_shard_bytes: int = SHARD_BYTES
    check: bool = True
    command: str = "twintune convert ..."

    def options(self) -> dict[str, Any]:
        """Return what decides about the bytes to write, in JSON's types."""
        quantization = self.quantization.model_dump(mode="json") if self.quantization.way else None
        return {
            "to": self.to,
            "dtype": self.dtype,
            "quantization": quantization,
            "quant_type": self.quant_type,
            "double_quant": self.double_quant,
            "max_shard_bytes": self.max_shard_bytes,
        }


def check_options(request: Request) -> None:
    """Raise UserError for an option that the format asked for does not have."""
    if request.to != "mlx" and request.quantization.way:
        raise UserError(f"--quantize, --mode: MLX's formats, with --to {request.to}; write --to mlx")
    if request.to != "bnb" and (request.quant_type or request.double_quant):
        raise UserError(f"--quant-type, --double-quant: bitsandbytes' formats, with --to {request.to}; write --to bnb")
    if request.double_quant and request.quant_type == "int8":
        raise UserError("--double-quant: int8 keeps one scale a row as it is; take nf4 or fp4, or leave it out")


def quantization_of(
    bits: int | None, group_size: int | None, mode: str | None, overrides: Sequence[str]
) -> QuantizationConfig:
    """Build the config's group `quantization` of options; raises UserError for formats that MLX lacks."""
    values: dict[str, Any] = {"bits": bits, "group_size": group_size, "mode": mode}
    values = {key: value for key, value in values.items() if value is not None}
    if overrides:
        values["overrides"] = dict(map(_override, overrides))
    return TrainConfig.from_dict({"quantization": values}, "command line").quantization


def byte_size(text: str) -> int:
    """Read a size such as 500MB or 5GB; raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    size = float(found[1]) * UNITS[found[2]] if found else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: expected a size such as 500MB or 5GB")
    return int(size)


def _override(text: str) -> tuple[str, Any]:
    """Read `lm_head=8`, `k_proj=false` or `lm_head={"bits": 8}`."""
    name, _, value = text.partition("=")
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        raise UserError(
            f"--override {text}: expected a module and its bits, a format or false: lm_head=8, k_proj=false"
        ) from None
    return name, {"bits": found} if isinstance(found, int) and not isinstance(found, bool) else found
