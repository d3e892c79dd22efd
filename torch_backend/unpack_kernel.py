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

BYTES = 1024  # of codes that one program unpacks


@triton.jit
def _unpack(
    codes, scales, outer, code, offset, book, out, size, width, stride,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    there = place < size // 2
    byte = tl.load(codes + place, mask=there, other=0).to(tl.int32)
    block = place // (BLOCK // 2)
    if NESTED:
        scale = tl.load(code + tl.load(scales + block, mask=there, other=0).to(tl.int32))
        scale = scale * tl.load(outer + block // OUTER, mask=there, other=0) + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=there, other=0)
    high, low = tl.load(book + (byte >> 4)) * scale, tl.load(book + (byte & 15)) * scale
    number = tl.program_id(0) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    target = out + (number // width).to(tl.int64) * stride + number % width
    tl.store(target, tl.interleave(high, low).to(out.dtype.element_ty), mask=number < size)


def unpack_into(
    out: torch.Tensor, codes: torch.Tensor, scales: list[torch.Tensor], blocksize: int, quant_type: str
) -> None:
    """Unpack a weight into an array of its shape (out, in), whose rows may have gaps between them.

    `scales` are one float32 array, or those of double quantisation.
    """
    absmax, *nested = scales
    outer, code, offset = nested or (absmax, absmax, absmax)
    size = out.numel()
    _unpack[(triton.cdiv(size, 2 * BYTES),)](
        codes, absmax, outer, code, offset, code_book(quant_type, out.device), out, size, out.shape[1], out.stride(0),
        BLOCK=blocksize, OUTER=NESTED_BLOCK, NESTED=bool(nested), BYTES=BYTES,
        enable_fp_fusion=False,  # bitsandbytes rounds before it adds the offset
    )  # fmt: skip


@functools.cache
def code_book(quant_type: str, device: torch.device) -> torch.Tensor:
    """Give the values of the codes of a kind on a device."""
    return torch.from_numpy(CODE_BOOKS[quant_type].copy()).to(device)
