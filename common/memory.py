"""What the process itself holds, for engines that run on the CPU."""

import os
import sys
from functools import cache

import psutil

from common.engine import MemoryUse


def process_memory() -> MemoryUse:
    """Return the resident memory of this process now and at its highest, in bytes."""
    held = _process(os.getpid()).memory_info()
    if sys.platform == "win32":
        return MemoryUse(held.rss, held.peak_wset)
    import resource  # which Windows lacks

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return MemoryUse(held.rss, highest if sys.platform == "darwin" else highest * 1024)


@cache
def _process(number: int) -> psutil.Process:
    """Find a process once: psutil reads several files for it."""
    return psutil.Process(number)
