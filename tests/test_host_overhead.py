"""What the Trainer does around each step is little: counted in calls, as times say nothing on a busy machine."""

import os
from pathlib import Path

import numpy as np
import pytest
from calls import calls_of
from rich.console import Console
from tiny_run import Run, examples

from common.batches import BatchPlan
from common.data.tokens import build_dataset
from common.layout import make_micro_batch
from common.view.progress import LoggedReporter, PlainReporter


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("in_a_row", [1, 40])
def test_a_batch_is_laid_out_in_as_many_calls_however_many_examples(in_a_row: int, shared: int) -> None:
    data = build_dataset([([1, 2, 3, 4, 5 + i, 6], [False] * 5 + [True], "made") for i in range(80)])
    rows = [range(start, start + in_a_row) for start in range(0, 2 * in_a_row, in_a_row)]
    prefixes = np.full(80, shared)
    # An array operation more is fine, one an example not.
    assert calls_of(lambda: make_micro_batch(data, rows, prefixes)) < 150


def train(folder: Path, steps: int) -> Run:
    run = Run(folder, examples(40), max_steps=steps, save_strategy="no")
    with open(os.devnull, "w") as nowhere:
        shown = PlainReporter(Console(file=nowhere, width=100))
        run.reporter = LoggedReporter(shown, folder / "training.log")
        run.train()
    return run


def test_no_step_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    counts = []
    for steps in (5, 25):
        synced.clear()
        run = train(tmp_path / str(steps), steps)
        assert run.logged == list(range(1, steps + 1))
        counts.append(len(synced))
    assert counts[0] == counts[1] > 0  # those that begin the log


def test_a_logged_step_takes_few_calls(tmp_path: Path) -> None:
    few, many = (calls_of(lambda steps=steps: train(tmp_path / str(steps), steps)) for steps in (15, 55))
    # About 900, of which rich takes 300 to print a line and the engine in NumPy 200; what is done for each example or
    # each token of a step would be thousands.
    assert (many - few) / 40 < 1500


def test_the_next_batch_is_built_while_the_engine_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, max_steps=4, save_strategy="no")
    build = BatchPlan.step_batch

    def noted(plan: BatchPlan, step: int):
        run.engine.calls.append(f"build {step}")
        return build(plan, step)

    monkeypatch.setattr(BatchPlan, "step_batch", noted)
    run.train()
    order = [call for call in run.engine.calls if call.startswith(("build", "train", "fetch train"))]
    for step in (2, 3, 4):
        assert order.index(f"train {step - 1}") < order.index(f"build {step}") < order.index(f"fetch train {step - 1}")
