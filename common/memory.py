"""What the process itself holds, for engines that run on the CPU."""

import resource
import sys

import psutil

from common.engine import MemoryUse


def process_memory() -> MemoryUse:
    """Return the resident memory of this process now and at its highest, in bytes."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return MemoryUse(psutil.Process().memory_info().rss, highest if sys.platform == "darwin" else highest * 1024)
