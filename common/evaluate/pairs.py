"""How sure it is that of two models one is better, from their judgements on the same questions.

The interval of a difference is the percentile bootstrap over questions (Efron and Tibshirani 1993; Koehn 2004 for
paired comparisons of texts). Beside it stands on how many questions each was better, with the exact sign test, which
for answers that are right or wrong is McNemar's: the chance of a split at least as uneven if neither were better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.engine import Array
from common.evaluate.metrics import Judgement, field_of

RESAMPLES = 10_000
LEVEL = 0.95
AT_A_TIME = 1_000_000  # drawn questions
SEED = 0  # the same judgements always give the same interval


@dataclass(frozen=True)
class Difference:
    """Hold how far a second model's score is above a first one's, between what bounds, and who was better how often."""

    metric: str
    first: str
    second: str
    difference: float
    interval: tuple[float, float]  # at `LEVEL`
    better: int  # questions on which the second was better
    worse: int
    num_examples: int
    p_value: float


def compare(names: tuple[str, str], first: Sequence[Judgement], second: Sequence[Judgement]) -> list[Difference]:
    """Compare two models by every score but those of single fields."""
    metrics = [name for name in first[0] if not field_of(name)] if first else []
    return [_difference(metric, names, first, second) for metric in metrics]


def _difference(
    metric: str, names: tuple[str, str], first: Sequence[Judgement], second: Sequence[Judgement]
) -> Difference:
    before, after = (np.array([each[metric] for each in some], np.float64) for some in (first, second))
    each = ratio(after.T) - ratio(before.T)
    better, worse = int((each > 0).sum()), int((each < 0).sum())
    resampled = _resampled(before, after)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(
        metric,
        *names,
        difference=float(ratio(after.sum(axis=0)) - ratio(before.sum(axis=0))),
        interval=(float(low), float(high)),
        better=better,
        worse=worse,
        num_examples=len(each),
        p_value=sign_test(better, worse),
    )


def ratio(parts: Array) -> Array:
    """Divide parts[0] by parts[1]; nothing over nothing is 0, as in the scores."""
    return np.divide(parts[0], parts[1], out=np.zeros_like(parts[0]), where=parts[1] != 0)


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p-value of so uneven a split of a fair coin's throws, exactly."""
    throws = better + worse
    ways = tail = 1
    for heads in range(min(better, worse)):
        ways = ways * (throws - heads) // (heads + 1)  # binomial coefficients, one from the other
        tail += ways
    return min(1.0, 2 * tail / 2**throws)


def _resampled(before: Array, after: Array) -> Array:
    """Draw the questions anew, with replacement, and return the difference of the scores of each drawing."""
    random, found, count = np.random.default_rng(SEED), [], len(before)
    step = max(1, AT_A_TIME // count)
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(count, size=(min(step, RESAMPLES - start), count))
        sums = (np.moveaxis(some[drawn].sum(axis=1), -1, 0) for some in (before, after))
        earlier, later = map(ratio, sums)
        found.append(later - earlier)
    return np.concatenate(found)
