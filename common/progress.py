"""What a person sees while a run goes on: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from common.display import say


class Reporter(Protocol):
    """Show a run's progress."""

    def begin(self, done: int, total: int) -> None:
        """Start showing a run of `total` steps of which `done` are done."""

    def advance(self, step: int) -> None:
        """Note that a step is done."""

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""

    def say(self, text: str) -> None:
        """Show a line."""

    def end(self) -> None:
        """Stop showing; safe to call twice."""


class TerminalReporter:
    """Show one live bar with loss, speed, memory and the time left, and lines above it."""

    def __init__(self, console: Console) -> None:
        self._eta = Eta()
        self._progress = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=None, figures="", left="")

    def begin(self, done: int, total: int) -> None:
        """Start showing a run of `total` steps of which `done` are done."""
        self._eta.begin(done, total)
        self._progress.update(self._task, total=total, completed=done)
        self._progress.start()

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        self._progress.update(self._task, completed=step, left=self._eta.after(step))

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        if "loss_spike" in metrics:
            self.say(f"step {metrics['step']}: loss {metrics['loss']:.4f} is a spike, far above those before it")
        if "eval_loss" in metrics:
            self.say(f"step {metrics['step']}: {evaluated(metrics).strip()}")
        self._progress.update(self._task, figures=figures(metrics))

    def say(self, text: str) -> None:
        """Show a line."""
        say(self._progress.console, text)

    def end(self) -> None:
        """Stop showing; safe to call twice."""
        self._progress.stop()


class PlainReporter:
    """Print one line a row, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._eta = Eta()
        self._total = 0

    def begin(self, done: int, total: int) -> None:
        """Start showing a run of `total` steps of which `done` are done."""
        self._total = total
        self._eta.begin(done, total)

    def advance(self, step: int) -> None:
        """Note that a step is done."""

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        step = metrics["step"]
        self.say(f"step {step}/{self._total}  {figures(metrics)}  {self._eta.after(step)}{evaluated(metrics)}")

    def say(self, text: str) -> None:
        """Show a line."""
        say(self._console, text)

    def end(self) -> None:
        """Stop showing; safe to call twice."""


class LoggedReporter:
    """Show through another reporter and keep every line, with its time, in training.log."""

    def __init__(self, shown: Reporter, path: Path) -> None:
        self._shown = shown
        self._path = path

    def begin(self, done: int, total: int) -> None:
        """Start showing a run of `total` steps of which `done` are done."""
        self._write(f"steps {done + 1} to {total}")
        self._shown.begin(done, total)

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        self._shown.advance(step)

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        self._write(f"step {metrics['step']}  {figures(metrics)}{evaluated(metrics)}")
        self._shown.row(metrics)

    def say(self, text: str) -> None:
        """Show a line."""
        self._write(text)
        self._shown.say(text)

    def end(self) -> None:
        """Stop showing; safe to call twice."""
        self._shown.end()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:  # no run ends for this
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")


class Eta:
    """Guess the time left from the steps since the first one, which compiles and is slow."""

    def begin(self, done: int, total: int) -> None:
        """Start counting."""
        self._first, self._total, self._since = done + 1, total, time.monotonic()

    def after(self, step: int) -> str:
        """Say the time left once a step is done."""
        if step <= self._first:
            self._since = time.monotonic()
            return ""
        seconds = (time.monotonic() - self._since) / (step - self._first) * (self._total - step)
        return f"{clock(seconds)} left"


def make_reporter(console: Console) -> Reporter:
    """Choose the live bar on a terminal, lines elsewhere."""
    return TerminalReporter(console) if console.is_terminal else PlainReporter(console)


def figures(metrics: Mapping[str, Any]) -> str:
    """Format the figures of a row for one line."""
    parts = [
        f"loss {metrics['loss']:.4f}" if metrics.get("loss") is not None else "",
        "(a spike)" if "loss_spike" in metrics else "",
        f"lr {metrics['learning_rate']:.2e}" if "learning_rate" in metrics else "",
        f"{metrics['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in metrics else "",
        f"{metrics['peak_memory_bytes'] / 1e9:.1f} GB" if "peak_memory_bytes" in metrics else "",
    ]
    return "  ".join(part for part in parts if part)


def evaluated(metrics: Mapping[str, Any]) -> str:
    """Format the validation loss of a row, where it has one, to stand after the figures."""
    if "eval_loss" not in metrics:
        return ""
    loss = metrics["eval_loss"]
    return "  validation loss not finite" if loss is None else f"  validation loss {loss:.4f}"


def clock(seconds: float) -> str:
    """Format a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
