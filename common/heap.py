"""The C library's heap on the CPU: what is packed must leave no holes in it, and a step needs no new pages each time.

glibc serves ever larger blocks from the heap once some were freed, and the small arrays that stay, scales and codes,
lie between the holes that full weights leave behind. Packing 156 MB of weights into 44 held 165 to 590 MB, another
figure each time; with large blocks outside the heap it is 165 (measured).
And it gives pages back that the next operation asks for again, zeroed, a thousand numbers each: of 5 million weights
MLX's AdamW takes 89 ms with that and 38 without (measured). Elsewhere than on glibc nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SMALL, LARGEST = 1 << 20, 32 << 20  # the second is where glibc's own adjustment ends
NEVER = (1 << 31) - 1


@contextlib.contextmanager
def without_holes() -> Iterator[None]:
    """Give large blocks pages of their own for as long as the context lasts, and what is free back at its end."""
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        give_pages_back()


def keep_pages() -> None:
    """Keep what is freed for the next arrays, until `give_pages_back`."""
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def give_pages_back() -> None:
    """Give back what is free, and from here on as glibc does where it has adjusted itself."""
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
