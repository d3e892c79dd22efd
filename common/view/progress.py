"""What is shown while a run goes on: plain lines here, JSON for programs, and on a terminal common/view/live.py."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console

from common.view.display import say


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


class JsonReporter:
    """Write one JSON object an event, for programs; what is said to people goes to their console too."""

    def __init__(self, events: TextIO, console: Console) -> None:
        """Take where the events go, and a console that writes elsewhere."""
        self._events = events
        self._console = console

    def begin(self, done: int, total: int) -> None:
        """Start showing a run of `total` steps of which `done` are done."""
        print_event(self._events, "begin", {"step": done, "total_steps": total})

    def advance(self, step: int) -> None:
        """Note that a step is done."""

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        print_event(self._events, "metrics", metrics)

    def say(self, text: str) -> None:
        """Show a line."""
        print_event(self._events, "message", {"text": text})
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


def print_event(events: TextIO, event: str, values: Mapping[str, Any]) -> None:
    """Write one line of `train --json`."""
    print(json.dumps({"event": event, **values}), file=events, flush=True)


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
