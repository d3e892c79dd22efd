"""What the process itself holds, for engines that run on the CPU."""

import os
import re
import sys
from functools import cache
from pathlib import Path

import psutil

from common.engine import MemoryUse


def process_memory() -> MemoryUse:
    """Return the resident memory of this process now and at its highest, in bytes."""
    held = _process(os.getpid()).memory_info()
    if sys.platform == "win32":
        return MemoryUse(held.rss, held.peak_wset)
    return MemoryUse(held.rss, max(held.rss, _high_water_mark()))


def _high_water_mark() -> int:
    """Read VmHWM where there is one: Linux's ru_maxrss begins at the peak of whoever started this process."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # which Windows lacks

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # bytes on macOS, KiB elsewhere


@cache
def _process(number: int) -> psutil.Process:
    """Find a process once: psutil reads several files for it."""
    return psutil.Process(number)
