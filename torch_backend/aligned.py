"""How arrays lie in memory so that a card's products read them fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNED = 8  # numbers: cuBLAS' fast kernels want rows of whole 16 bytes
LINE = 128  # bytes that a card reads of its memory at once


def new_rows(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Make an array (N, D) whose rows begin at whole lines of memory.

    Products read others slower: of 3,120 columns in bfloat16, behind each other, by 3% (H200).
    """
    return like.new_empty_strided(tuple(shape), (row_stride(shape[1], like.dtype), 1))


def row_stride(width: int, dtype: torch.dtype) -> int:
    """Return how many numbers lie between the beginnings of rows of some width, at whole lines."""
    numbers = LINE // dtype.itemsize
    return -(-width // numbers) * numbers
