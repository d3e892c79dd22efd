"""The best evaluation: what counts as better, when patience ends, and that a resume knows both."""

import math
import shutil

import pytest
from tiny_run import Run, states_equal, untimed

from common.runs.best import Best
from common.runs.checkpoint import load_checkpoint

FALLS_AND_RISES = {2: 1.0, 4: 0.8, 6: 0.9, 8: 0.85, 10: 0.7, 12: 0.6}
LOWEST_AT_4 = {2: 1.0, 4: 0.8, 6: 0.9, 8: 0.85, 10: 0.9, 12: 0.95}
EVERY_2 = dict(eval_strategy="steps", eval_steps=2)


def best_of(*losses: float) -> Best:
    best = Best()
    for step, loss in enumerate(losses, start=1):
        best = best.after(loss, step)
    return best


# ---- what is best


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], Best(None, None, 0)),
        ([2.0], Best(2.0, 1, 0)),
        ([2.0, 1.0, 1.5], Best(1.0, 2, 1)),
        ([2.0, 2.0, 2.0], Best(2.0, 1, 2)),  # an equal loss is no better
        ([2.0, 3.0, math.nextafter(2.0, 0)], Best(math.nextafter(2.0, 0), 3, 0)),  # any improvement counts
        ([math.nan, math.inf], Best(None, None, 2)),
        ([math.nan, 5.0, math.nan], Best(5.0, 2, 1)),
    ],
)
def test_the_lowest_finite_loss_is_the_best_and_evaluations_since_it_are_counted(losses, expected):
    assert best_of(*losses) == expected


def test_patience_ends_after_as_many_evaluations_without_a_better_one():
    assert [best_of(*[1.0] * count).out_of_patience(2) for count in (1, 2, 3, 4)] == [False, False, True, True]
    assert not best_of(*[1.0] * 100).out_of_patience(None)


def test_early_stopping_decides_as_that_of_transformers():
    import numpy as np
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import TrainerControl, TrainerState

    class Arguments:
        metric_for_best_model, greater_is_better = "eval_loss", False

    random = np.random.default_rng(0)
    for patience in (1, 2, 3):
        theirs, state, control = EarlyStoppingCallback(patience), TrainerState(), TrainerControl()
        ours = Best()
        for step, loss in enumerate(random.integers(1, 9, 40) / 8, start=1):  # with many equal ones
            theirs.on_evaluate(Arguments, state, control, {"eval_loss": loss})
            if state.best_metric is None or loss < state.best_metric:
                state.best_metric = loss
            ours = ours.after(float(loss), step)
            assert ours.metric == state.best_metric
            assert ours.out_of_patience(patience) == (theirs.early_stopping_patience_counter >= patience)


# ---- early stopping


def test_a_run_out_of_patience_ends_saved_and_says_so(tmp_path):
    run = Run(tmp_path, script=FALLS_AND_RISES, early_stopping_patience=2, save_steps=100, **EVERY_2)
    assert run.train() is True
    assert run.logged[-1] == 8 and run.saved == [8]
    assert run.engine.calls[-4:] == ["eval", "fetch eval", "save 8", "read_state"]
    assert run.reporter.lines == ["stopped early: 2 evaluations no better than validation loss 0.8000 of step 4"]
    assert run.reporter.shown[-1] == ("end",)


def test_patience_that_ends_with_the_last_step_is_no_early_stop(tmp_path):
    run = Run(tmp_path, script=LOWEST_AT_4, early_stopping_patience=4, **EVERY_2)
    assert run.train() is True
    assert run.logged[-1] == 12 and run.reporter.lines == []


def test_a_run_that_saves_nothing_saves_nothing_when_it_stops_early(tmp_path):
    run = Run(tmp_path, script=FALLS_AND_RISES, early_stopping_patience=1, save_strategy="no", **EVERY_2)
    assert run.train() is True
    assert run.logged[-1] == 6 and run.saved == []


def test_losses_that_are_not_finite_use_up_patience(tmp_path):
    losses = dict.fromkeys(range(2, 13, 2), math.nan)
    run = Run(tmp_path, script=losses, early_stopping_patience=3, **EVERY_2)
    assert run.train() is True
    assert run.logged[-1] == 6 and run.rows[-1]["eval_loss"] is None
    assert run.reporter.lines == ["stopped early: 3 evaluations no better than no finite validation loss"]


def test_a_run_that_stopped_early_is_finished_once_final_is_there(tmp_path):
    settings = dict(script=FALLS_AND_RISES, early_stopping_patience=2, **EVERY_2)
    first = Run(tmp_path, **settings)
    first.train()
    assert not first.folder.is_finished(first.folder.find_start("auto", False, []))
    again = Run(tmp_path, **settings)
    assert again.train(resume=True) is True
    assert again.engine.calls == ["load_state"] and again.logged == first.logged
    again.ending().ship()
    assert again.folder.is_finished(again.folder.find_start("auto", False, []))


def test_more_patience_takes_a_run_up_that_stopped_early(tmp_path):
    first = Run(tmp_path, script=FALLS_AND_RISES, early_stopping_patience=2, **EVERY_2)
    first.train(), first.ending().ship()
    more = Run(tmp_path, script=FALLS_AND_RISES, early_stopping_patience=3, **EVERY_2)
    assert not more.folder.is_finished(more.folder.find_start("auto", False, []))
    assert more.train(resume=True) is True
    assert more.logged == list(range(1, 13)) and more.trainer.progress.best == Best(0.6, 12)


def test_a_final_of_less_patience_does_not_finish_a_run(tmp_path):
    first = Run(tmp_path, script=LOWEST_AT_4, early_stopping_patience=2, **EVERY_2)
    first.train(), first.ending().ship()
    more = Run(tmp_path, script=LOWEST_AT_4, early_stopping_patience=3, **EVERY_2)
    more.train(resume=True)  # and killed before its own final/ is written
    assert more.logged[-1] == 10
    assert not more.folder.is_finished(more.folder.find_start("auto", False, []))
    more.ending().ship()
    assert more.folder.is_finished(more.folder.find_start("auto", False, []))


@pytest.mark.parametrize("stopped_at", range(1, 9))
def test_an_interruption_changes_nothing_of_when_patience_ends(tmp_path, stopped_at):
    settings = dict(script=FALLS_AND_RISES, early_stopping_patience=2, save_steps=100, **EVERY_2)
    whole = Run(tmp_path / "whole", **settings)
    whole.train()
    first, second = Run(tmp_path / "parts", **settings), Run(tmp_path / "parts", **settings)
    first.stop_at(stopped_at)
    assert first.train() is False
    assert second.train(resume=True) is True
    assert second.trainer.progress == whole.trainer.progress
    assert untimed(second.rows) == untimed(whole.rows)
    assert states_equal(second.engine.read_state(), whole.engine.read_state())


# ---- the checkpoint of the best


def test_a_new_best_is_saved_at_once_and_knows_that_it_is_the_best(tmp_path):
    run = Run(tmp_path, script=LOWEST_AT_4, load_best_model_at_end=True, save_steps=6, **EVERY_2)
    run.train()
    assert run.saved == [2, 4, 6, 12]
    trainer = load_checkpoint(tmp_path / "checkpoint-4")[1]
    assert (trainer.best_metric, trainer.best_step, trainer.evaluations_without_improvement) == (0.8, 4, 0)
    trainer = load_checkpoint(tmp_path / "checkpoint-12")[1]
    assert (trainer.best_metric, trainer.best_step, trainer.evaluations_without_improvement) == (0.8, 4, 4)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (dict(load_best_model_at_end=True, save_total_limit=1), [4, 12]),
        (dict(load_best_model_at_end=True, save_total_limit=3), [4, 8, 10, 12]),
        (dict(early_stopping_patience=9, save_total_limit=2), [4, 10, 12]),
        (dict(save_total_limit=2), [10, 12]),
        (dict(load_best_model_at_end=True), [2, 4, 6, 8, 10, 12]),
    ],
)
def test_the_limit_keeps_the_newest_checkpoints_and_the_best_where_it_is_wanted(tmp_path, settings, kept):
    run = Run(tmp_path, script=LOWEST_AT_4, save_steps=2, **EVERY_2, **settings)
    run.train()
    assert run.checkpoints() == kept


def test_a_best_checkpoint_that_another_surpasses_goes(tmp_path):
    run = Run(
        tmp_path, script=FALLS_AND_RISES, load_best_model_at_end=True, save_total_limit=1, save_steps=2, **EVERY_2
    )
    run.train()
    assert run.checkpoints() == [12]


@pytest.mark.parametrize("stopped_at", [3, 4, 5, 8, 11])
def test_an_interruption_changes_nothing_of_which_is_best_and_kept(tmp_path, stopped_at):
    settings = dict(load_best_model_at_end=True, save_total_limit=1, save_steps=4, script=LOWEST_AT_4, **EVERY_2)
    whole = Run(tmp_path / "whole", **settings)
    whole.train()
    first, second = Run(tmp_path / "parts", **settings), Run(tmp_path / "parts", **settings)
    first.stop_at(stopped_at)
    first.train()
    assert second.train(resume=True) is True and second.notes == []
    assert second.trainer.progress == whole.trainer.progress
    assert second.checkpoints() == whole.checkpoints() == [4, 12]


def test_a_resume_that_lost_the_best_checkpoint_says_so_and_seeks_a_new_one(tmp_path):
    settings = dict(script=LOWEST_AT_4, load_best_model_at_end=True, save_steps=2, **EVERY_2)
    first, second = Run(tmp_path, **settings), Run(tmp_path, **settings)
    first.stop_at(7)
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert second.train(resume=True) is True
    (note,) = second.notes
    assert note.startswith(f"{tmp_path / 'checkpoint-4'}, the best so far, is lost: manifest.json can't be read")
    assert second.trainer.progress.best == Best(0.85, 8, 2)


def test_a_resume_that_ships_the_last_weights_needs_no_best_checkpoint(tmp_path):
    settings = dict(script=LOWEST_AT_4, save_steps=5, **EVERY_2)
    first, second = Run(tmp_path, **settings), Run(tmp_path, **settings)
    first.stop_at(7)
    first.train()
    assert second.train(resume=True) is True and second.notes == []
    assert second.trainer.progress.best == Best(0.8, 4, 4)
