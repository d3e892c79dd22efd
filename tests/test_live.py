"""What a terminal, a program and nobody see of a run while it goes on."""

import io
import json

import pytest
from rich.console import Console

from common.config import TrainConfig
from common.runs.saving import next_save, next_save_text
from common.view.live import TerminalReporter, make_reporter, view
from common.view.progress import JsonReporter, PlainReporter

ROW = {
    "step": 40,
    "epoch": 0.13,
    "loss": 0.25,
    "learning_rate": 5.12e-4,
    "tokens_per_second": 217.4,
    "peak_memory_bytes": 2.04e9,
}


def rendered(width: int, **changes) -> list[str]:
    shown = io.StringIO()
    losses = [1.0, 0.5, 0.25]
    arguments = {"step": 40, "total": 80, "epoch": 0.13, "left": "1:32 left", "losses": losses, "row": ROW}
    console = Console(file=shown, width=width, force_terminal=False)
    console.print(view(**(arguments | {"next_save": "next save: step 80"} | changes)))
    return shown.getvalue().splitlines()


def test_the_view_says_where_the_run_is_and_all_figures():
    first, second = rendered(110)
    assert first.startswith("step 40/80  epoch 0.13  ━") and first.endswith("50%  1:32 left")
    assert second.rstrip() == "loss 0.2500 █▃▁  lr 5.12e-04  217 tok/s  2.0 GB  next save: step 80"


def test_a_narrow_terminal_still_has_two_lines():
    lines = rendered(50)
    assert len(lines) == 2 and all(len(line) <= 50 for line in lines) and lines[1].endswith("…")


def test_before_the_first_row_there_is_a_bar_and_nothing_invented():
    first, second = rendered(80, step=0, epoch=None, left="", losses=[], row={}, next_save="")
    assert first.startswith("step 0/80  ") and first.rstrip().endswith("0%") and second.strip() == ""


def test_the_terminal_shows_the_figures_and_what_is_said():
    shown = io.StringIO()
    console = Console(file=shown, width=110, force_terminal=True)
    reporter = make_reporter(console, None, lambda step: f"next save: step {step + 10}")
    assert isinstance(reporter, TerminalReporter)
    reporter.begin(39, 80)
    reporter.advance(40)
    reporter.row(ROW | {"eval_loss": 0.5, "loss_spike": True})
    reporter.say("as [bold]it[/bold] is")
    reporter.end()
    reporter.end()
    text = shown.getvalue()
    assert "step 40: validation loss 0.5000" in text and "step 40: loss 0.2500 is a spike" in text
    assert "as [bold]it[/bold] is" in text and "next save: step 50" in text and "217 tok/s" in text


def test_a_pipe_gets_lines_and_a_program_gets_json():
    console = Console(file=io.StringIO(), width=80)
    assert isinstance(make_reporter(console, None, str), PlainReporter)
    events, told = io.StringIO(), io.StringIO()
    reporter = make_reporter(Console(file=told), events, str)
    assert isinstance(reporter, JsonReporter)
    reporter.begin(0, 80)
    reporter.advance(40)
    reporter.row(ROW)
    reporter.say("a checkpoint is lost")
    reporter.end()
    assert [json.loads(line) for line in events.getvalue().splitlines()] == [
        {"event": "begin", "step": 0, "total_steps": 80},
        {"event": "metrics", **ROW},
        {"event": "message", "text": "a checkpoint is lost"},
    ]
    assert told.getvalue() == "a checkpoint is lost\n"


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({"save_steps": 40}, 0, 40),
        ({"save_steps": 40}, 39, 40),
        ({"save_steps": 40}, 40, 80),
        ({"save_steps": 40}, 80, 100),  # the last step is saved
        ({"save_steps": 40}, 100, None),
        ({"save_strategy": "epoch"}, 31, 60),
        ({"save_strategy": "no"}, 0, None),
    ],
)
def test_the_next_save_is_the_next_due_step(settings, step, expected):
    assert next_save(TrainConfig(**settings), 30, 100, step) == expected


def test_the_next_save_is_told_with_the_clock_where_that_saves_too():
    assert (
        next_save_text(TrainConfig(save_steps=40, save_minutes=20), 30, 100, 3) == "next save: step 40 and every 20 min"
    )
    assert next_save_text(TrainConfig(save_strategy="no", save_minutes=0.5), 30, 100, 3) == "next save: every 0.5 min"
    assert next_save_text(TrainConfig(save_strategy="no"), 30, 100, 3) == ""
