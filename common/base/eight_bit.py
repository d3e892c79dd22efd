"""bitsandbytes' 8-bit weights (LLM.int8, arXiv:2208.07339): a row keeps its largest magnitude, and 127ths of it."""

from __future__ import annotations

import numpy as np

from common.engine import Array

STEPS = np.float32(127)


def pack(weight: Array) -> tuple[Array, Array]:
    """Pack float32 rows (out, in): int8 codes and the absmax of each row, float32.

    bitsandbytes takes weights through float16; raises `OverflowError` for one that float16 can't hold.
    """
    with np.errstate(over="ignore"):
        halves = weight.astype(np.float16).astype(np.float32)
    if not np.isfinite(halves).all():
        raise OverflowError("has values past float16's 65504, through which LLM.int8 goes; use nf4")
    absmax = np.abs(halves).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.float32(1) / absmax * STEPS  # rounded twice, as torch does 127 / absmax
        scaled = np.nan_to_num(halves * factors[:, None], nan=0.0)
    return np.round(scaled).astype(np.int8), absmax


def unpack(codes: Array, absmax: Array) -> Array:
    """Unpack int8 rows (out, in) to float32."""
    return codes.astype(np.float32) * (absmax / STEPS)[:, None]
