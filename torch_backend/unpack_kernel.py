"""One Triton kernel that unpacks 4-bit weights, double quantisation included, into rows of a wider array.

bitsandbytes takes four kernels and as many calls from Python for it, which for a 3B is 40 ms of the host a step, a
sixth of it, and writes rows without a gap, so that what stands beside them has to be copied together afterwards.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from common.base.four_bit import CODE_BOOKS, NESTED_BLOCK

NUMBERS = 1024  # of a row that one program unpacks


@triton.jit
def _unpack(
    codes, scales, outer, code, offset, book, out, width, stride,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, NESTED: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * NUMBERS
    pair = first // 2 + tl.arange(0, NUMBERS // 2)
    there, place = pair < width // 2, row * (width // 2) + pair
    byte = tl.load(codes + place, mask=there, other=0).to(tl.int32)
    block = place // (BLOCK // 2)
    if NESTED:
        scale = tl.load(code + tl.load(scales + block, mask=there, other=0).to(tl.int32))
        scale = scale * tl.load(outer + block // OUTER, mask=there, other=0) + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=there, other=0)
    both = tl.interleave(tl.load(book + (byte >> 4)) * scale, tl.load(book + (byte & 15)) * scale)
    column = first + tl.arange(0, NUMBERS)
    tl.store(out + row * stride + column, both.to(out.dtype.element_ty), mask=column < width)


def unpack_into(
    out: torch.Tensor, codes: torch.Tensor, scales: list[torch.Tensor], blocksize: int, quant_type: str
) -> None:
    """Unpack a weight into an array of its shape (out, in), in even, whose rows may have gaps between them.

    `scales` are one float32 array, or those of double quantisation.
    """
    absmax, *nested = scales
    outer, code, offset = nested or (absmax, absmax, absmax)
    rows, width = out.shape
    _unpack[(rows, triton.cdiv(width, NUMBERS))](
        codes, absmax, outer, code, offset, code_book(quant_type, out.device), out, width, out.stride(0),
        BLOCK=blocksize, OUTER=NESTED_BLOCK, NESTED=bool(nested), NUMBERS=NUMBERS,
        num_warps=2,  # 16 numbers a thread: of 14,336 x 4,096 in 48 us for 52 (H200)
        enable_fp_fusion=False,  # bitsandbytes rounds before it adds the offset
    )  # fmt: skip


@functools.cache
def code_book(quant_type: str, device: torch.device) -> torch.Tensor:
    """Give the values of the codes of a kind on a device."""
    return torch.from_numpy(CODE_BOOKS[quant_type].copy()).to(device)
