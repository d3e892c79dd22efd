"""The C library's heap: pages stay from array to array while they are to be kept, and only then."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from common.heap import give_pages_back, keep_pages


def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        first, second = np.ones(4_000_000, np.float32), np.ones(4_000_000, np.float32)
        del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


keep_pages()
np.ones(10_000_000, np.float32)
faults()
kept = faults()
give_pages_back()
print(kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap alone")
def test_pages_stay_while_they_are_kept():
    kept, given_back = map(int, subprocess.check_output([sys.executable, "-c", FAULTS]).split())
    assert 10 * kept < given_back  # the arrays' pages were there, and then were gone
