"""How a run ends: which weights final/ holds, and what an error says where the disk is full at the last moment."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_run import Run, ScriptedEngine

from common import launch
from common.adapters.adapter import read_adapter
from common.config import TrainConfig
from common.errors import DiskError, Interrupted, UserError
from common.runs.best import Best
from common.runs.checkpoint import load_checkpoint

LOWEST_AT_4 = {4: 0.8, 8: 0.9, 12: 0.85}
LOWEST_AT_12 = {4: 0.8, 8: 0.9, 12: 0.75}
EVERY_4 = dict(eval_strategy="steps", eval_steps=4, save_steps=4)
BEST = dict(load_best_model_at_end=True, **EVERY_4)
CONTINUE = "Once there is room, continue with:\n  twintune train --resume"


def trained(folder: Path, **settings) -> Run:
    run = Run(folder, **settings)
    assert run.train() is True
    return run


def weights_equal(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def final_is_of(run: Run, step: int) -> bool:
    """Tell whether final/ and the engine both hold the weights of a checkpoint."""
    weights = load_checkpoint(run.folder.path / f"checkpoint-{step}")[0].weights
    final, engine = read_adapter(run.folder.final)[0], run.engine.read_state().weights
    return weights_equal(final, weights) and weights_equal(engine, weights)


def disk_full(*_: object) -> None:
    raise DiskError("final: the disk is full: 7 bytes are missing")


# ---- which weights


def test_final_holds_the_best_weights_where_they_are_wanted_and_says_so(tmp_path):
    run = trained(tmp_path, script=LOWEST_AT_4, **BEST)
    run.ending().ship()
    assert final_is_of(run, 4) and not final_is_of(run, 12)
    assert run.reporter.lines == ["final/ holds the best weights: validation loss 0.8000 of step 4"]
    card = (run.folder.final / "README.md").read_text()
    assert "| weights | the best: validation loss 0.8000 of step 4 |" in card
    assert "| begun from | seed 42 |" in card
    assert "| steps, epochs | 12, 2.00 |" in card and "| last validation loss | 0.8500 |" in card


def test_final_holds_the_last_weights_where_nobody_asks_for_the_best(tmp_path):
    run = trained(tmp_path, script=LOWEST_AT_4, early_stopping_patience=9, **EVERY_4)
    run.ending().ship()
    assert final_is_of(run, 12) and run.reporter.lines == []
    assert "| weights | of the last step |" in (run.folder.final / "README.md").read_text()


def test_the_last_weights_may_be_the_best(tmp_path):
    run = trained(tmp_path, script=LOWEST_AT_12, **BEST)
    run.ending().ship()
    assert final_is_of(run, 12)
    assert run.reporter.lines == ["final/ holds the best weights: validation loss 0.7500 of step 12"]


def test_a_resumed_run_ships_the_best_of_before(tmp_path):
    first = Run(tmp_path, script=LOWEST_AT_4, **BEST)
    first.stop_at(6)
    first.train()
    second = Run(tmp_path, script=LOWEST_AT_4, **BEST)
    second.train(resume=True), second.ending().ship()
    assert final_is_of(second, 4)


def test_a_finished_run_ships_its_best_when_that_is_asked_for_later(tmp_path):
    last = trained(tmp_path, script=LOWEST_AT_4, **EVERY_4)
    last.ending().ship()
    assert final_is_of(last, 12)
    best = Run(tmp_path, script=LOWEST_AT_4, **BEST)
    assert not best.folder.is_finished(best.folder.find_start("auto", False, []))
    best.train(resume=True), best.ending().ship()
    assert final_is_of(best, 4) and not any(call.startswith("train") for call in best.engine.calls)


def test_a_damaged_best_checkpoint_is_told_and_the_last_weights_ship(tmp_path):
    run = trained(tmp_path, script=LOWEST_AT_4, **BEST)
    (tmp_path / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"")
    run.ending().ship()
    assert final_is_of(run, 12)
    (line,) = run.reporter.lines
    assert line.startswith("The best weights can't be had: ") and "optimizer.safetensors has changed" in line
    assert line.endswith("Instead final/ holds the weights of the last step, 12")
    assert "| weights | of the last step |" in (run.folder.final / "README.md").read_text()


def test_without_a_finite_evaluation_the_last_weights_ship(tmp_path):
    run = trained(tmp_path, script=dict.fromkeys((4, 8, 12), float("nan")), **BEST)
    run.ending().ship()
    assert final_is_of(run, 12)
    assert "There is no finite validation loss to choose by" in run.reporter.lines[0]
    assert "| last validation loss | not measured |" in (run.folder.final / "README.md").read_text()


# ---- a full disk at the end


def test_a_best_last_step_ships_though_its_checkpoint_found_no_room(tmp_path):
    run = trained(tmp_path, script=LOWEST_AT_12, full=[12], **BEST)
    assert run.trainer.progress.best == Best(0.75, 12)
    with pytest.raises(UserError):
        run.ending().ship()
    assert weights_equal(read_adapter(run.folder.final)[0], run.engine.read_state().weights)
    assert "of step 12 |" in (run.folder.final / "README.md").read_text()


def test_a_full_disk_at_the_last_checkpoint_is_an_error_once_final_is_written(tmp_path):
    run = trained(tmp_path, save_steps=4, full=[12])
    with pytest.raises(UserError) as caught:
        run.ending().ship()
    assert str(caught.value) == (
        f"checkpoint-12: the disk is full.\n{tmp_path / 'final'} is written and whole; what is missing is the "
        "checkpoint of the last step, from which the run could be made longer.\n"
        f"{tmp_path / 'checkpoint-8'} is good: nothing is lost but the 4 steps after it. {CONTINUE}"
    )
    assert weights_equal(read_adapter(run.folder.final)[0], run.engine.read_state().weights)
    again = Run(tmp_path, save_steps=4)  # what the message asks for, with room
    assert again.train(resume=True) is True and again.engine.calls[1] == "train 9"
    assert again.checkpoints() == [4, 8, 12]


def test_a_full_disk_at_final_is_an_error_that_says_every_step_is_saved(tmp_path):
    run = trained(tmp_path, save_steps=4)
    run.folder.write_final = disk_full
    with pytest.raises(UserError) as caught:
        run.ending().ship()
    assert str(caught.value) == (
        "final: the disk is full: 7 bytes are missing.\n"
        f"Every step is saved in {tmp_path / 'checkpoint-12'}: nothing is lost. {CONTINUE}"
    )
    again = Run(tmp_path, save_steps=4)
    assert again.train(resume=True) is True and again.engine.calls == ["load_state"]
    again.ending().ship()
    assert final_is_of(again, 12)


def test_a_disk_full_from_beginning_to_end_says_what_is_lost(tmp_path):
    run = trained(tmp_path, save_steps=4, full=[4, 8, 12])
    run.folder.write_final = disk_full
    with pytest.raises(UserError, match="No checkpoint of this run is saved: its 12 steps have to be trained again"):
        run.ending().ship()


def test_an_interrupted_run_says_that_everything_is_saved_only_where_it_is(tmp_path):
    saved, unsaved = Run(tmp_path / "saved", save_steps=4), Run(tmp_path / "unsaved", save_steps=4, full=[6])
    for run in (saved, unsaved):
        run.stop_at(6)
        assert run.train() is False
    error = saved.ending().interrupted("SIGINT", 12)
    assert isinstance(error, Interrupted)
    assert str(error) == (
        "stopped by SIGINT after step 6 of 12; everything is saved. Continue with:\n  twintune train --resume"
    )
    error = unsaved.ending().interrupted("SIGINT", 12)
    assert isinstance(error, UserError)
    assert str(error) == (
        "stopped by SIGINT after step 6 of 12, but checkpoint-6: the disk is full.\n"
        f"{tmp_path / 'unsaved' / 'checkpoint-4'} is good: nothing is lost but the 2 steps after it. {CONTINUE}"
    )


# ---- the whole of `twintune train`


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    """Have `twintune train` compute in NumPy, with the lowest of its validation losses at step 4."""
    opened: list[ScriptedEngine] = []

    def open_engine(name, config, directory, lora):
        engine = ScriptedEngine(config, vocabulary=416)
        engine.script = {2: 1.0, 4: 0.5, 6: 0.9, 8: 0.8, 10: 0.7}
        opened.append(engine)
        return engine

    monkeypatch.setattr("common.inputs.open_engine", open_engine)
    return opened


def test_training_stops_early_ships_the_best_and_stays_finished(tmp_path, tiny_model, engines):
    said = [{"role": "user", "content": "say 3"}, {"role": "assistant", "content": "it is 3"}]
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 4)
    config = TrainConfig.from_dict(
        {
            "model_name_or_path": str(tiny_model),
            "output_dir": str(tmp_path / "out"),
            "data": {"train": str(tmp_path / "data.jsonl"), "validation": str(tmp_path / "data.jsonl")},
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            "max_steps": 50,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "early_stopping_patience": 3,
        }
    )
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    launch.train(config, launch.Request("config.yaml"), console)
    assert "stopped early: 3 evaluations no better than validation loss 0.5000 of step 4" in shown.getvalue()
    assert "final/ holds the best weights: validation loss 0.5000 of step 4" in shown.getvalue()
    final = read_adapter(tmp_path / "out" / "final")[0]
    assert weights_equal(final, load_checkpoint(tmp_path / "out" / "checkpoint-4")[0].weights)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-4"]

    launch.train(config, launch.Request("config.yaml", resume="auto"), console)
    assert "This run is finished" in shown.getvalue()
    assert not any(call.startswith("train") for call in engines[1].calls)
    assert weights_equal(engines[1].read_state().weights, final)  # what is evaluated is what ships
