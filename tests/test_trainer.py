"""The training loop on an engine in NumPy: what happens in which order, and the numbers it tells."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import KEYS, Run, states_equal

from common.data.tokens import build_dataset
from common.errors import UserError
from common.runs.checkpoint import load_checkpoint
from common.trainer import mean_loss

# ---- the order of things


def test_each_step_is_launched_before_the_one_before_it_is_fetched(tmp_path):
    run = Run(tmp_path, save_strategy="no", num_train_epochs=1.0)
    assert run.train() is True
    assert run.plan.total_steps == 6
    assert run.engine.calls == [
        "load_state",
        "train 1",
        *(call for n in range(2, 7) for call in (f"train {n}", f"fetch train {n - 1}")),
        "fetch train 6",
    ]


def test_step_under_way_is_fetched_before_a_checkpoint_and_the_next_launched_after_it(tmp_path):
    run = Run(tmp_path, save_steps=2, num_train_epochs=1.0)
    run.train()  # FakeEngine refuses to be read while a step is under way
    assert run.engine.calls[1:9] == [
        "train 1",
        "train 2",
        "fetch train 1",
        "fetch train 2",
        "save 2",
        "read_state",
        "train 3",
        "train 4",
    ]


def test_evaluation_comes_before_the_checkpoint_of_its_step_and_with_no_step_under_way(tmp_path):
    run = Run(tmp_path, save_steps=3, eval_strategy="steps", eval_steps=3, num_train_epochs=1.0)
    run.train()
    calls = run.engine.calls
    assert calls.index("fetch train 3") < calls.index("eval") < calls.index("save 3") < calls.index("train 4")


@pytest.mark.parametrize(
    ("settings", "logged", "evaluated", "saved"),
    [
        (dict(logging_steps=1, save_strategy="no"), range(1, 13), [], []),
        (dict(logging_steps=5, save_steps=4), [1, 5, 10, 12], [], [4, 8, 12]),
        (dict(logging_steps=5, save_steps=5), [1, 5, 10, 12], [], [5, 10, 12]),
        (dict(logging_steps=100, save_steps=100), [1, 12], [], [12]),
        (dict(logging_steps=100, save_strategy="epoch"), [1, 12], [], [6, 12]),
        (dict(logging_steps=100, eval_strategy="epoch", save_steps=100), [1, 6, 12], [6, 12], [12]),
        (
            dict(logging_steps=4, eval_strategy="steps", eval_steps=5, save_steps=5),
            [1, 4, 5, 8, 10, 12],
            [5, 10, 12],
            [5, 10, 12],
        ),
        (dict(logging_steps=3, eval_strategy="steps", save_strategy="no"), [1, 3, 6, 9, 12], [3, 6, 9, 12], []),
    ],
)
def test_logging_evaluation_and_checkpoints_come_at_their_steps_and_at_the_last(
    tmp_path, settings, logged, evaluated, saved
):
    run = Run(tmp_path, **settings)
    assert run.train() is True and run.plan.total_steps == 12
    assert run.logged == list(logged)
    assert run.evaluated == evaluated
    assert run.saved == saved


def test_a_fractional_epoch_ends_with_a_row_and_a_checkpoint(tmp_path):
    run = Run(tmp_path, num_train_epochs=1.5, save_strategy="epoch", eval_strategy="epoch", logging_steps=100)
    run.train()
    assert (run.plan.total_steps, run.saved, run.evaluated) == (9, [6, 9], [6, 9])
    assert run.rows[-1]["epoch"] == 1.5


def test_reporter_is_told_every_step_once_and_always_the_end(tmp_path):
    run = Run(tmp_path, save_steps=4)
    run.train()
    assert run.reporter.steps == list(range(1, 13))
    assert run.reporter.shown == [("begin", 0, 12), ("end",)]
    assert run.reporter.rows == run.rows
    failing = Run(tmp_path / "failing", broken=[3])
    with pytest.raises(UserError):
        failing.train()
    assert failing.reporter.shown[-1] == ("end",)


# ---- the numbers


def test_rows_have_the_keys_of_the_contract_and_only_json(tmp_path):
    run = Run(tmp_path, eval_strategy="steps", eval_steps=5, broken=[4], max_nonfinite_steps=1, logging_steps=2)
    run.train()
    for row in run.rows:
        assert row.keys() == KEYS | ({"eval_loss"} if row["step"] in (5, 10, 12) else set())
    text = (tmp_path / "metrics.jsonl").read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_rows_give_the_loss_a_token_since_the_row_before(tmp_path):
    each, third = Run(tmp_path / "each"), Run(tmp_path / "third", logging_steps=3)
    each.train(), third.train()
    tokens = [each.plan.step_batch(step).num_loss_tokens for step in range(1, 13)]
    sums = [row["loss"] * count for row, count in zip(each.rows, tokens, strict=True)]
    for row, (first, last) in zip(third.rows, [(0, 1), (1, 3), (3, 6), (6, 9), (9, 12)], strict=True):
        # The same sums, multiplied and divided once more.
        assert row["loss"] == pytest.approx(sum(sums[first:last]) / sum(tokens[first:last]), rel=1e-12)
        assert row["supervised_tokens"] == sum(tokens[:last])
        assert row["peak_memory_bytes"] == 2000


def test_rows_give_the_learning_rate_of_their_own_step(tmp_path):
    run = Run(tmp_path, warmup_steps=4, lr_scheduler_type="linear", save_steps=5)
    run.train()
    expected = [0.05 * n / 4 for n in range(4)] + [0.05 * (1 - n / 8) for n in range(8)]
    # One product and one quotient in another order.
    assert [row["learning_rate"] for row in run.rows] == pytest.approx(expected, rel=1e-12, abs=0)


def test_training_lowers_the_loss(tmp_path):
    run = Run(tmp_path, num_train_epochs=40.0, lr_scheduler_type="constant", eval_strategy="epoch", save_strategy="no")
    run.train()
    assert np.mean([row["loss"] for row in run.rows[-6:]]) < 0.8 * np.mean([row["loss"] for row in run.rows[:6]])


def test_gradient_accumulation_weighs_tokens_not_micro_batches(tmp_path):
    # AdamW hides a factor of the gradient, clipping and the norm don't: max_grad_norm is far below the norm.
    settings = dict(max_grad_norm=0.1, num_train_epochs=2.0, save_strategy="no")
    whole = Run(tmp_path / "a", per_device_train_batch_size=4, **settings)
    parts = Run(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    whole.train(), parts.train()
    assert whole.plan.total_steps == parts.plan.total_steps == 6
    for one, other in zip(whole.rows, parts.rows, strict=True):
        # Float64 sums in another order, weights rounded to float32 at each of six steps.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_the_short_last_step_of_an_epoch_counts_its_own_tokens(tmp_path):
    run = Run(tmp_path, per_device_train_batch_size=4, num_train_epochs=1.0)
    run.train()
    last = run.plan.step_batch(3)
    assert len(last.examples) == 3
    assert run.rows[-1]["supervised_tokens"] == run.data.loss_mask.sum()
    before = Run(tmp_path / "before", per_device_train_batch_size=4, max_steps=2, lr_scheduler_type="constant")
    same = Run(tmp_path / "same", per_device_train_batch_size=4, num_train_epochs=1.0, lr_scheduler_type="constant")
    before.train(), same.train()
    rows = build_dataset([(run.data.tokens(i).tolist(), run.data.mask(i).tolist(), "x") for i in last.examples])
    # The loss of the third step is the mean over its three examples with the weights after two steps; two batchings
    # of one sum in float64.
    assert same.rows[-1]["loss"] == pytest.approx(mean_loss(before.engine, rows, 8), rel=1e-12)


def test_evaluation_uses_the_weights_after_its_step(tmp_path):
    run = Run(tmp_path, eval_strategy="steps", eval_steps=4, save_steps=4, per_device_eval_batch_size=2)
    run.train()
    for row in (row for row in run.rows if "eval_loss" in row):
        checkpoint = tmp_path / f"checkpoint-{row['step']}"
        run.engine.load_state(load_checkpoint(checkpoint)[0])
        assert row["eval_loss"] == mean_loss(run.engine, run.validation, 2)


def test_evaluation_changes_nothing(tmp_path):
    without = Run(tmp_path / "a", save_strategy="no")
    every = Run(tmp_path / "b", save_strategy="no", eval_strategy="steps", eval_steps=1)
    without.train(), every.train()
    assert states_equal(without.engine.read_state(), every.engine.read_state())


@pytest.mark.parametrize("computes_in", ["train_step", "fetch"])
def test_speed_is_that_of_training_without_saving_and_evaluating(tmp_path, monkeypatch, computes_in):
    run = Run(tmp_path, save_steps=2, logging_steps=3, eval_strategy="steps", eval_steps=4)
    now = [0.0]
    monkeypatch.setattr("common.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(function, seconds: float, only: str = ""):
        def wrapper(*arguments):
            now[0] += seconds if only in str(arguments[0]) else 0
            return function(*arguments)

        return wrapper

    setattr(
        run.engine, computes_in, slow(getattr(run.engine, computes_in), 2.0, only="train" * (computes_in == "fetch"))
    )
    run.engine.eval_step = slow(run.engine.eval_step, 500.0)
    run.save = slow(run.save, 1000.0)
    run.train()
    assert run.logged == [1, 3, 4, 6, 8, 9, 12]
    for previous, row in zip([0, *run.logged], run.rows, strict=False):
        batches = [run.plan.step_batch(step) for step in range(previous + 1, row["step"] + 1)]
        # Times are whole seconds: exact in floats.
        assert row["tokens_per_second"] == sum(batch.num_tokens for batch in batches) / (2.0 * len(batches))


def multiply_losses(run: Run, factors: dict[int, float]) -> None:
    """Have the engine report other losses at some steps."""
    launch = run.engine.train_step

    def train_step(batch, rate):
        handle = launch(batch, rate)
        loss_sum = handle.result.loss_sum * factors.get(batch.step, 1.0)
        handle.result = dataclasses.replace(handle.result, loss_sum=loss_sum)
        return handle

    run.engine.train_step = train_step


def test_a_loss_spike_is_flagged_and_changes_nothing(tmp_path):
    plain, spiked = Run(tmp_path / "plain", num_train_epochs=4.0), Run(tmp_path / "spiked", num_train_epochs=4.0)
    multiply_losses(spiked, {5: 5.0, 18: 50.0})  # at step 5 there are too few before it to tell
    plain.train(), spiked.train()
    assert not any("loss_spike" in row for row in plain.rows)
    assert [row["step"] for row in spiked.rows if row.get("loss_spike")] == [18]
    assert states_equal(plain.engine.read_state(), spiked.engine.read_state())


def test_a_resumed_run_knows_the_losses_before_it_when_it_looks_for_spikes(tmp_path):
    first, second = Run(tmp_path, num_train_epochs=4.0), Run(tmp_path, num_train_epochs=4.0)
    first.stop_at(16)
    first.train()
    multiply_losses(second, {17: 50.0})
    second.train(resume=True)
    assert [row["step"] for row in second.rows if row.get("loss_spike")] == [17]
