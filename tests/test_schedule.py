"""The learning rate, with transformers' schedules as the oracle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.schedule import learning_rate_at, warmup_step_count

KINDS = ("constant_with_warmup", "linear", "cosine")


def transformers_rates(kind: str, total: int, peak: float, warmup: int) -> list[float]:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (10, 0), (10, 1), (37, 5), (10, 10), (5, 8)])
def test_every_step_has_the_rate_of_transformers(kind, total, warmup):
    ours = [learning_rate_at(step, total, 3e-4, kind, warmup) for step in range(total)]
    # The same formulas in another order of operations: a few roundings of float64, no more.
    assert ours == pytest.approx(transformers_rates(kind, total, 3e-4, warmup), rel=1e-12, abs=1e-18)


def test_constant_without_warmup_is_that_of_transformers():
    assert [learning_rate_at(step, 5, 3e-4, "constant", 0) for step in range(5)] == transformers_rates(
        "constant", 5, 3e-4, 0
    )


def test_constant_honours_a_warmup_that_transformers_would_ignore():
    rates = [learning_rate_at(step, 6, 1.0, "constant", 2) for step in range(6)]
    assert rates == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert transformers_rates("constant", 6, 1.0, 2) == [1.0] * 6


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_ends_at_zero_and_stays_there(kind):
    # A run made longer by --allow-changed passes its old end; the half cosine must not rise again. cos(pi) is exact.
    assert learning_rate_at(20, 20, 1.0, kind, 3) == 0.0
    assert learning_rate_at(25, 20, 1.0, kind, 3) == 0.0


@given(st.sampled_from(KINDS), st.integers(1, 500), st.integers(0, 500), st.integers(0, 600))
def test_rate_stays_between_zero_and_the_peak(kind, total, warmup, step):
    assert 0.0 <= learning_rate_at(step, total, 2e-4, kind, warmup) <= 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_rate_rises_only_during_warmup(kind):
    rates = [learning_rate_at(step, 50, 1.0, kind, 7) for step in range(51)]
    assert rates[:8] == sorted(rates[:8]) and rates[0] == 0.0 and rates[7] == 1.0
    assert rates[7:] == sorted(rates[7:], reverse=True)


def test_unknown_kind_is_a_bug_of_ours():
    with pytest.raises(AssertionError, match="polynomial"):
        learning_rate_at(5, 10, 1.0, "polynomial", 0)


@pytest.mark.parametrize(
    ("total", "steps", "ratio", "expected"),
    [(100, 7, 0.0, 7), (100, 0, 0.03, 3), (101, 0, 0.03, 4), (10, 0, 0.0, 0), (3, 0, 0.01, 1)],
)
def test_warmup_is_the_steps_or_the_ratio_rounded_up_as_transformers_has_it(total, steps, ratio, expected):
    from transformers import TrainingArguments

    assert warmup_step_count(total, steps, ratio) == expected
    # transformers 5 takes a ratio in `warmup_steps` too.
    theirs = TrainingArguments(warmup_steps=steps or ratio, report_to=[], use_cpu=True)
    assert theirs.get_warmup_steps(total) == expected
