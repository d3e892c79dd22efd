"""Counting calls, for tests that something costs as much however much there is: clocks differ from run to run."""

import sys
from collections.abc import Callable


def calls_of(function: Callable[[], object]) -> int:
    """Count the calls of functions, Python's and C's, that a call makes."""
    count = 0

    def note(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
