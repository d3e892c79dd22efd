"""Two models compared by their judgements: the sign test by counting all cases, the interval by what it promises."""

import itertools

import numpy as np
import pytest

from common.evaluate.pairs import LEVEL, compare, sign_test


def judgements(values, name="exact_match"):
    return [{name: (float(value), 1.0)} for value in values]


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 3), (2, 7), (10, 1), (0, 9)])
def test_the_sign_test_counts_every_way_the_coins_can_fall(better, worse):
    throws = better + worse
    falls = [sum(fall) for fall in itertools.product((0, 1), repeat=throws)]
    as_uneven = sum(abs(heads - throws / 2) >= abs(better - throws / 2) for heads in falls)
    assert sign_test(better, worse) == pytest.approx(as_uneven / 2**throws, rel=1e-12)
    assert sign_test(better, worse) == sign_test(worse, better)


def test_many_questions_are_no_trouble():
    assert 0.9 < sign_test(5000, 5001) <= 1


def test_who_is_better_and_by_how_much():
    (found,) = compare(("a", "b"), judgements([1, 0, 0, 0, 1]), judgements([1, 1, 1, 0, 0]))
    assert (found.better, found.worse, found.num_examples) == (2, 1, 5)
    assert found.difference == pytest.approx(0.2)
    assert found.interval[0] < 0 < found.interval[1] and found.p_value == 1.0


def test_the_same_answers_differ_by_nothing():
    (found,) = compare(("a", "b"), judgements([1, 0, 1]), judgements([1, 0, 1]))
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_a_ratio_of_sums_is_compared_as_such_and_not_as_a_mean_of_ratios():
    first = [{"json_fields:f1": (2, 10), "json_fields:f1:a": (0, 1)}, {"json_fields:f1": (0, 0)}]
    second = [{"json_fields:f1": (10, 10)}, {"json_fields:f1": (0, 2)}]
    (found,) = compare(("a", "b"), first, second)
    assert found.metric == "json_fields:f1" and found.difference == pytest.approx(10 / 12 - 2 / 10)
    assert (found.better, found.worse) == (1, 0)  # nothing of nothing is 0 as well


def test_the_interval_is_that_of_the_normal_approximation_where_there_are_many_questions():
    random = np.random.default_rng(5)
    first, second = random.random(2000) < 0.5, random.random(2000) < 0.55
    (found,) = compare(("a", "b"), judgements(first), judgements(second))
    each = second.astype(float) - first
    error = 1.96 * each.std() / np.sqrt(len(each))
    # 10,000 resamples leave an end uncertain by some 2% of the deviation.
    np.testing.assert_allclose(found.interval, [each.mean() - error, each.mean() + error], atol=0.05 * error)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr("common.evaluate.pairs.RESAMPLES", 400)
    random, held = np.random.default_rng(1), 0
    for _ in range(300):
        first, second = random.random(150) < 0.4, random.random(150) < 0.6
        (found,) = compare(("a", "b"), judgements(first), judgements(second))
        held += found.interval[0] <= 0.2 <= found.interval[1]
    assert abs(held / 300 - LEVEL) < 0.04  # three standard deviations of 300 draws at 0.95
