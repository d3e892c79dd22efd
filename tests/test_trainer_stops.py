"""How a run on an engine in NumPy stops and goes on: asked to, killed, or at a step that is not finite."""

import math
import os
import signal

import pytest
from tiny_run import KEYS, Run, states_equal, untimed

from common.batches import chain_hash
from common.errors import UserError
from common.runs.signals import stop_on_signals

# ---- stop and resume


def test_a_stop_request_saves_and_ends_the_run(tmp_path):
    run = Run(tmp_path, save_steps=100)
    launch = run.engine.train_step

    def stop_at_five(batch, rate):
        if batch.step == 5:
            run.stop.signal_name = "SIGTERM"
        return launch(batch, rate)

    run.engine.train_step = stop_at_five
    assert run.train() is False
    assert run.saved == [5] and run.trainer.progress.step == 5
    assert run.engine.calls[-3:] == ["fetch train 5", "save 5", "read_state"]


def test_a_stop_request_at_a_checkpoint_saves_once(tmp_path):
    run = Run(tmp_path, save_steps=1)
    run.stop.signal_name = "SIGINT"
    assert run.train() is False
    assert run.saved == [1]


@pytest.mark.parametrize("stopped_at", range(1, 12))
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, stopped_at, accumulation):
    settings = dict(
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2.0 * accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=1000,
    )
    whole = Run(tmp_path / "whole", **settings)
    assert whole.train() is True
    assert whole.plan.total_steps >= 12

    first = Run(tmp_path / "parts", **settings)
    first.stop_at(stopped_at)
    assert first.train() is False
    second = Run(tmp_path / "parts", **settings)
    assert second.train(resume=True) is True

    assert second.engine.calls[1] == f"train {stopped_at + 1}"
    assert states_equal(second.engine.read_state(), whole.engine.read_state())
    assert second.trainer.progress == whole.trainer.progress
    assert untimed(second.rows) == untimed(whole.rows)


def test_a_killed_run_goes_on_from_its_checkpoint_without_a_row_twice(tmp_path):
    whole = Run(tmp_path / "whole", save_steps=4)
    whole.train()
    first = Run(tmp_path / "parts", save_steps=4)
    launch = first.engine.train_step

    def killed(batch, rate):
        if batch.step == 8:
            raise KeyboardInterrupt
        return launch(batch, rate)

    first.engine.train_step = killed
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert first.logged == [1, 2, 3, 4, 5, 6]
    second = Run(tmp_path / "parts", save_steps=4)
    assert second.train(resume=True) is True
    assert second.logged == list(range(1, 13))
    assert untimed(second.rows) == untimed(whole.rows)
    assert states_equal(second.engine.read_state(), whole.engine.read_state())


def test_batch_hash_is_that_of_all_batches_in_order(tmp_path):
    run = Run(tmp_path, save_strategy="no")
    run.train()
    expected = ""
    for step in range(1, 13):
        expected = chain_hash(expected, run.plan.step_batch(step))
    assert run.trainer.progress.batch_hash == expected


def test_a_finished_run_has_nothing_left_to_train(tmp_path):
    Run(tmp_path).train()
    again = Run(tmp_path)
    assert again.train(resume=True) is True
    assert again.engine.calls == ["load_state"] and again.saved == []
    assert again.logged == list(range(1, 13))


def test_the_first_signal_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# ---- steps that are not finite


def test_a_step_that_is_not_finite_stops_the_run_with_a_checkpoint_and_says_why(tmp_path):
    run = Run(tmp_path, broken=[5], save_steps=100)
    with pytest.raises(UserError) as caught:
        run.train()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("step 5: loss ") and "gradient norm nan: the update was skipped and the run" in lines[0]
    sources = [run.data.places[row] for row in run.plan.step_batch(5).examples]
    assert lines[1] == f"examples of that step: {', '.join(sources)}"
    assert "lower learning_rate" in lines[2]
    assert run.saved == [6]  # step 6 was under way when step 5 was fetched


def test_the_first_bad_step_is_told_though_the_one_under_way_is_bad_too(tmp_path):
    run = Run(tmp_path, broken=range(5, 100), save_steps=100)
    with pytest.raises(UserError, match=r"^step 5: "):
        run.train()
    assert run.trainer.progress.nonfinite_steps == 2
    good = Run(tmp_path / "good", max_steps=4, save_strategy="no", lr_scheduler_type="constant")
    bad = Run(tmp_path / "bad", broken=range(5, 100), lr_scheduler_type="constant")
    good.train()
    with pytest.raises(UserError):
        bad.train()
    assert states_equal(bad.engine.read_state(), good.engine.read_state())


def test_a_bad_step_at_a_checkpoint_or_the_last_step_stops_the_run_too(tmp_path):
    for step in (4, 12):
        run = Run(tmp_path / str(step), broken=[step], save_steps=4)
        with pytest.raises(UserError, match=f"^step {step}: "):
            run.train()
        assert run.saved[-1] == step


def test_bad_steps_are_skipped_and_counted_up_to_the_limit(tmp_path):
    run = Run(tmp_path, broken=[2, 7], max_nonfinite_steps=2)
    assert run.train() is True
    assert run.trainer.progress.nonfinite_steps == 2
    assert run.engine.read_state().update_count == 10
    assert [line.split(":")[0] for line in run.reporter.lines] == ["step 2", "step 7"]
    assert run.trainer.progress.supervised_tokens == 2 * run.data.loss_mask.sum()
    assert all(math.isfinite(row["loss"]) for row in run.rows)


def test_an_evaluation_due_at_a_bad_step_is_made_and_logged_all_the_same(tmp_path):
    settings = dict(broken=[4, 8], max_nonfinite_steps=2, eval_strategy="steps", eval_steps=4, save_strategy="no")
    each, fourth = Run(tmp_path / "each", **settings), Run(tmp_path / "fourth", logging_steps=4, **settings)
    each.train(), fourth.train()
    assert each.evaluated == fourth.evaluated == [4, 8, 12]
    for one, other in zip((each.rows[3], each.rows[7]), fourth.rows[1:3], strict=True):
        assert one["eval_loss"] == other["eval_loss"] and one.keys() == KEYS | {"eval_loss"}
        assert one["loss"] is None and one["grad_norm"] is None  # none of the steps since the last row was good
        assert math.isfinite(other["loss"])


def test_a_bad_step_without_an_evaluation_makes_no_row_of_its_own(tmp_path):
    run = Run(tmp_path, broken=[4], max_nonfinite_steps=1, save_strategy="no")
    run.train()
    assert run.logged == [1, 2, 3, *range(5, 13)]


def test_bad_steps_are_counted_across_a_resume(tmp_path):
    first = Run(tmp_path, broken=[2], max_nonfinite_steps=1, max_steps=4)
    assert first.train() is True
    second = Run(tmp_path, broken=[2, 7], max_nonfinite_steps=1)
    with pytest.raises(UserError, match=r"^step 7: "):
        second.train(resume=True)


def test_a_run_goes_on_past_the_step_that_stopped_it(tmp_path):
    settings = dict(save_steps=100)
    with pytest.raises(UserError):
        Run(tmp_path, broken=[5], **settings).train()
    again = Run(tmp_path, broken=[5], **settings)
    assert again.train(resume=True) is True
    assert again.engine.calls[1] == "train 7"
    skipped = Run(tmp_path / "skipped", broken=[5], max_nonfinite_steps=1, **settings)
    skipped.train()
    assert states_equal(again.engine.read_state(), skipped.engine.read_state())
    assert again.trainer.progress == skipped.trainer.progress
