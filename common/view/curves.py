"""Series of numbers made readable: smoothed, or drawn into one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def smoothed(values: Sequence[float], keep: float) -> list[float]:
    """Return exponentially weighted means of the values so far, unbiased from the first one on.

    As TensorBoard does it, and Adam its moments (arXiv:1412.6980, section 3). `keep` is the weight of the mean so far.
    """
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def last(values: Sequence[float | None]) -> float | None:
    """Return the last value that is one."""
    return next((value for value in reversed(values) if value is not None), None)


def current(values: Sequence[float | None]) -> float | None:
    """Return the mean of the newest eighth of the values, ten at most: smooth, and not behind where there are few."""
    known = [value for value in values if value is not None]
    newest = known[-max(1, min(10, len(known) // 8)) :]
    return math.fsum(newest) / len(newest) if newest else None


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw values as a row of at most `width` block characters, each the mean of its stretch; low is a low block."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    columns = min(width, len(known))
    edges = [len(known) * column // columns for column in range(columns + 1)] if columns else []
    means = [math.fsum(known[start:stop]) / (stop - start) for start, stop in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
