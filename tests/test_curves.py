"""Smoothing against its formula, sparklines by eye."""

import numpy as np
import pytest

from common.view.curves import current, last, smoothed, sparkline


def test_smoothing_is_the_weighted_mean_of_all_values_so_far():
    values = np.random.default_rng(0).normal(size=40)
    expected = [np.average(values[: n + 1], weights=0.9 ** np.arange(n, -1, -1)) for n in range(40)]
    assert smoothed(values.tolist(), keep=0.9) == pytest.approx(expected, rel=1e-12)  # float64 sums in another order


def test_the_current_value_is_the_mean_of_the_newest_eighth_and_of_ten_at_most():
    assert current([]) is None and current([None]) is None
    assert current([9.0, 3.0, None]) == 3.0
    assert current([100.0] * 14 + [1.0, 3.0]) == 2.0
    assert current([100.0] * 1000 + [2.0] * 10) == 2.0
    assert last([1.0, 3.0, None]) == 3.0 and last([None]) is None


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([8, 7, 6, 5, 4, 3, 2, 1], 8, "█▇▆▅▄▃▂▁"),
        ([1, 1, 9, 9], 2, "▁█"),  # two values a column
        ([3.0], 8, "▁"),
        ([2, 2, 2], 8, "▁▁▁"),
        ([1, None, float("nan"), 2], 8, "▁█"),
        ([], 8, ""),
    ],
)
def test_a_sparkline_is_high_where_values_are(values, width, expected):
    assert sparkline(values, width) == expected
