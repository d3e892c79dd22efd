"""One Triton kernel that copies parts of a flat array to many places, rounding on the way.

A copy of each of a 3B adapter's 392 matrices takes a card 4 microseconds, far more than its numbers do, and the host
no less: 2 of 230 ms a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

NUMBERS = 1024  # that one program copies
FIELDS = 6


@triton.jit
def _copy(table, source, like, NUMBERS: tl.constexpr, FIELDS: tl.constexpr):
    entry = table + tl.program_id(0) * FIELDS
    target, first = tl.load(entry).to(like.dtype), tl.load(entry + 1)
    done, count, width = (
        tl.load(entry + 2).to(tl.int32),
        tl.load(entry + 3).to(tl.int32),
        tl.load(entry + 4).to(tl.int32),
    )
    number = done + tl.arange(0, NUMBERS)
    value = tl.load(source + first + number, mask=number < count)
    place = (number // width).to(tl.int64) * tl.load(entry + 5) + number % width
    tl.store(target + place, value.to(like.dtype.element_ty), mask=number < count)


class Copies:
    """Know where the parts of a flat array go: matrices of one dtype, whose rows may have gaps between them."""

    def __init__(self, places: Sequence[slice], targets: Sequence[torch.Tensor]) -> None:
        """Take for each matrix its place in the flat array; the matrices must stay where they are."""
        entries = [
            (target.data_ptr(), place.start, done, target.numel(), target.shape[-1], target.stride(0))
            for place, target in zip(places, targets, strict=True)
            for done in range(0, target.numel(), NUMBERS)
        ]
        self._like = targets[0]
        self._table = torch.tensor(entries, dtype=torch.int64).to(self._like.device)

    def make(self, flat: torch.Tensor) -> None:
        """Copy what is in the flat array now."""
        _copy[(len(self._table),)](self._table, flat, self._like, NUMBERS=NUMBERS, FIELDS=FIELDS)
