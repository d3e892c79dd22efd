"""The C library's heap while a model is packed on the CPU: full-size weights must not leave holes in it.

glibc serves ever larger blocks from the heap once some were freed, and the small arrays that stay, scales and codes,
lie between the holes that full weights leave behind. Packing 156 MB of weights into 44 held 165 to 590 MB, another
figure each time; with large blocks outside the heap it is 165 (measured). Elsewhere than on glibc nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SMALL, LARGEST = 1 << 20, 32 << 20  # the second is where glibc's own adjustment ends


@contextlib.contextmanager
def without_holes() -> Iterator[None]:
    """Give large blocks pages of their own for as long as the context lasts, and what is free back at its end."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
        libc.malloc_trim(0)
