"""Checkpoints by the clock, and a disk that takes none: training goes on and nothing that was saved is lost."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import Run, states_equal, untimed

from common.errors import UserError
from common.runs.best import Best
from common.runs.checkpoint import checkpoints, damage
from common.runs.run import RunFolder

# ---- by the clock


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        (dict(save_minutes=2.5), [3, 6, 9, 12]),
        (dict(save_minutes=3.0, save_steps=5), [3, 5, 8, 10, 12]),  # counted from the latest, whatever made it
        (dict(save_minutes=4.0, save_strategy="epoch"), [4, 6, 10, 12]),
        (dict(save_minutes=5.0, save_strategy="no"), [5, 10]),
        (dict(save_minutes=0.5), list(range(1, 13))),  # not oftener than once a step
        (dict(save_minutes=0.0), [12]),
        (dict(), [12]),
    ],
)
def test_checkpoints_come_by_the_clock_beside_those_by_steps(tmp_path, settings, saved):
    run = Run(tmp_path, step_seconds=60.0, **settings)
    run.train()  # FakeEngine refuses to be read while a step is under way
    assert run.saved == saved


def test_checkpoints_by_the_clock_leave_no_trace_in_the_run(tmp_path):
    plain, timed = Run(tmp_path / "plain"), Run(tmp_path / "timed", step_seconds=60.0, save_minutes=1.5)
    plain.train(), timed.train()
    assert len(timed.saved) > len(plain.saved)
    assert states_equal(plain.engine.read_state(), timed.engine.read_state())
    assert untimed(plain.rows) == untimed(timed.rows)


def test_the_clock_starts_anew_with_a_resume(tmp_path):
    first = Run(tmp_path, step_seconds=60.0, save_minutes=4.0)
    first.stop_at(6)
    first.train()
    assert first.saved == [4, 6]
    second = Run(tmp_path, step_seconds=60.0, save_minutes=4.0)
    second.train(resume=True)
    assert second.saved == [10, 12]


# ---- a disk that takes none


def test_a_run_goes_on_where_the_disk_takes_no_checkpoint(tmp_path):
    plain, full = Run(tmp_path / "plain", save_steps=4), Run(tmp_path / "full", save_steps=4, full=[8])
    plain.train()
    assert full.train() is True
    assert full.checkpoints() == [4, 12] and not any(map(damage, checkpoints(tmp_path / "full")))
    assert full.reporter.lines == [
        "step 8 is not saved: checkpoint-8: the disk is full. The checkpoints before it are good"
    ]
    assert full.trainer.unsaved is None
    assert untimed(full.rows) == untimed(plain.rows)
    assert states_equal(full.engine.read_state(), plain.engine.read_state())


def test_a_last_step_that_is_not_saved_is_remembered(tmp_path):
    run = Run(tmp_path, save_steps=4, full=[8, 12])
    assert run.train() is True
    assert run.checkpoints() == [4] and "checkpoint-12: the disk is full" in str(run.trainer.unsaved)


def test_a_failed_save_that_no_later_one_had_to_make_good_is_forgotten(tmp_path):
    run = Run(tmp_path, step_seconds=60.0, save_minutes=5.0, save_strategy="no", full=[5, 10])
    assert run.train() is True
    assert run.checkpoints() == [] and run.trainer.unsaved is None


def test_a_failed_save_by_the_clock_is_not_tried_again_at_every_step(tmp_path):
    run = Run(tmp_path, step_seconds=60.0, save_minutes=3.0, full=range(1, 12))
    run.train()
    assert [call for call in run.engine.calls if call.startswith("save")] == ["save 3", "save 6", "save 9", "save 12"]


def test_a_save_that_fails_for_another_reason_ends_the_run(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise UserError("the adapter holds NaN")

    monkeypatch.setattr(RunFolder, "save", broken)
    with pytest.raises(UserError, match="the adapter holds NaN"):
        Run(tmp_path, save_steps=4).train()


def test_a_best_that_could_not_be_saved_is_not_the_best(tmp_path):
    script = {2: 1.0, 4: 0.5, 6: 0.9, 8: 0.7, 10: 0.95, 12: 0.95}
    settings = dict(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True)
    run = Run(tmp_path, script=script, full=[4, 8], save_total_limit=1, **settings)
    run.train()
    assert run.trainer.progress.best == Best(0.9, 6, 2)
    assert run.checkpoints() == [6, 12]


def test_a_best_is_the_best_without_a_checkpoint_where_only_patience_asks(tmp_path):
    script = {4: 0.5, 8: 0.7, 12: 0.8}
    run = Run(tmp_path, script=script, full=[4], save_steps=4, eval_strategy="steps", eval_steps=4)
    run.train()
    assert run.trainer.progress.best == Best(0.5, 4, 2)


def test_a_stop_request_on_a_full_disk_ends_the_run_unsaved(tmp_path):
    run = Run(tmp_path, save_steps=4, full=[6])
    run.stop_at(6)
    assert run.train() is False
    assert run.checkpoints() == [4] and run.trainer.unsaved is not None


def test_a_step_that_is_not_finite_on_a_full_disk_does_not_claim_to_be_saved(tmp_path):
    run = Run(tmp_path, broken=[5], save_steps=4, full=[6])
    with pytest.raises(UserError, match=r"^step 5: .* could not be saved: checkpoint-6: the disk is full"):
        run.train()


# ---- a real small disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 600 kB, room for several checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "twintune-test", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(path: Path) -> None:
    """Write until the disk takes not a byte more."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def test_a_disk_full_for_a_while_costs_the_checkpoints_of_that_while_and_no_metrics(small_disk):
    run = Run(small_disk / "run", save_steps=2)
    filler, save = small_disk / "filler", run.folder.save

    def saving(engine, progress):
        if progress.step == 4:
            fill(filler)
        if progress.step == 10:
            filler.unlink()
        return save(engine, progress)

    run.folder.save = saving
    assert run.train() is True
    assert run.checkpoints() == [2, 10, 12] and not any(map(damage, checkpoints(small_disk / "run")))
    unsaved = [line for line in run.reporter.lines if "is not saved" in line]
    assert [line.partition(" is not")[0] for line in unsaved] == ["step 4", "step 6", "step 8"]
    assert all("the disk is full: " in line and "bytes are missing" in line for line in unsaved)
    assert run.logged == list(range(1, 13))
    waiting = [line for line in run.reporter.lines if "metrics.jsonl: the disk is full" in line]
    assert len(waiting) <= 1  # a row may still fit into the last page of the file
    assert not [path.name for path in (small_disk / "run").iterdir() if path.name.startswith(".")]
