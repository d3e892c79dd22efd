"""One Triton kernel that turns a head's output into losses and their derivative, where the output stood.

A row is read twice, the second time from a card's cache, as each multiprocessor has one row at a time: 110 microseconds
for 512 rows of 128,256 where inductor's kernel takes 158, and no second array (H200, measured).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from common.logits import AfterHead

NUMBERS = 16384  # of a row that a program holds at a time
WARPS = 32


@triton.jit
def _values(output, factor, soft_cap, CAPPED: tl.constexpr):
    values = output.to(tl.float32) * factor
    if CAPPED:
        values = soft_cap * (2 * tl.sigmoid(2 * values / soft_cap) - 1)  # tanh
    return values


@triton.jit
def _softmax_error(
    output, stride, targets, counted, losses, factor, soft_cap,
    CAPPED: tl.constexpr, VOCABULARY: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    numbers = output + row * stride
    target, weight = tl.load(targets + row), tl.load(counted + row)
    of_target = _values(tl.load(numbers + target), factor, soft_cap, CAPPED)
    largest, total = float("-inf"), 0.0
    for first in range(0, VOCABULARY, NUMBERS):
        column = first + tl.arange(0, NUMBERS)
        values = _values(tl.load(numbers + column, mask=column < VOCABULARY, other=0), factor, soft_cap, CAPPED)
        values = tl.where(column < VOCABULARY, values, float("-inf"))
        larger = tl.maximum(largest, tl.max(values))
        above = tl.where(larger == float("-inf"), 0.0, larger)  # or what is left out by all so far would be nan
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(values - above))
        largest = larger
    log_total = largest + tl.log(total)
    tl.store(losses + row, (log_total - of_target) * weight)
    tl.debug_barrier()  # all have read the target's output
    for first in range(0, VOCABULARY, NUMBERS):
        column = first + tl.arange(0, NUMBERS)
        values = _values(tl.load(numbers + column, mask=column < VOCABULARY, other=0), factor, soft_cap, CAPPED)
        error = (tl.exp(values - log_total) - (column == target)) * (weight * factor)
        if CAPPED:
            error *= 1 - (values / soft_cap) * (values / soft_cap)
        tl.store(numbers + column, error.to(output.dtype.element_ty), mask=column < VOCABULARY)


def softmax_error_(
    output: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, after: AfterHead
) -> torch.Tensor:
    """Do what the function of this name in torch_backend/loss.py does; rows alone may have gaps between them."""
    losses = torch.empty(len(output), device=output.device)
    _softmax_error[(len(output),)](
        output, output.stride(0), targets, counted, losses, after.factor, after.soft_cap or 1.0,
        CAPPED=after.soft_cap is not None, VOCABULARY=output.shape[1], NUMBERS=NUMBERS, num_warps=WARPS,
    )  # fmt: skip
    return losses
