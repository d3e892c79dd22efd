"""How many CPUs this process may use, which in a container is not how many there are."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path


def available_cpus(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the CPUs this process may keep busy: its affinity, or its container's quota if that is less."""
    if sys.platform != "linux":  # no affinity and no quota to ask for
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    for read_quota in (_cgroup2_quota, _cgroup1_quota):
        with contextlib.suppress(OSError, ValueError):
            return max(1, min(allowed, math.ceil(read_quota(cgroup_root))))
    return allowed


def _cgroup2_quota(root: Path) -> float:
    quota, period = (root / "cpu.max").read_text().split()
    return int(quota) / int(period)  # "max" is no int: no limit


def _cgroup1_quota(root: Path) -> float:
    quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
    if quota <= 0:
        raise ValueError("no limit")
    return quota / int((root / "cpu/cpu.cfs_period_us").read_text())
