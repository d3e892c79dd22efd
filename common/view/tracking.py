"""Metrics on their way to trackers, each in a thread of its own: a slow network costs no step, a dead one no run.

A row is put into a queue, in microseconds. What fails is told once for each tracker, and the rows after it are tried
all the same, as a network may come back. The cost: rows that are still on their way when the run ends are waited for
some seconds only, and one that failed is not sent again; metrics.jsonl has them all.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from common.view.progress import Reporter
from common.view.trackers import TrackedRun, Tracker, Values

PATIENCE = 20.0  # seconds that a run waits at its end for all trackers together

Row = tuple[int, Values]


class TrackedReporter:
    """Show through another reporter, and send every row of metrics to trackers."""

    def __init__(
        self, shown: Reporter, trackers: Sequence[Tracker], run: TrackedRun, patience: float = PATIENCE
    ) -> None:
        self._shown = shown
        self._feeds = [_Feed(tracker, run) for tracker in trackers]
        self._patience = patience

    def begin(self, done: int, total: int) -> None:
        """Start showing a run of `total` steps of which `done` are done."""
        self._shown.begin(done, total)
        for feed in self._feeds:
            feed.start()

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        self._shown.advance(step)

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        self._shown.row(metrics)
        values = {key: float(value) for key, value in metrics.items() if key != "step" and _is_figure(value)}
        for feed in self._feeds:
            feed.put((metrics["step"], values))
        self._tell()

    def say(self, text: str) -> None:
        """Show a line."""
        self._shown.say(text)

    def end(self) -> None:
        """Stop showing; safe to call twice."""
        self._shown.end()
        feeds, self._feeds = self._feeds, []
        deadline = time.monotonic() + self._patience
        for feed in feeds:
            feed.finish()
        for feed in feeds:
            feed.wait(max(0.0, deadline - time.monotonic()))
        self._tell(feeds)

    def _tell(self, feeds: Sequence[_Feed] | None = None) -> None:
        for feed in self._feeds if feeds is None else feeds:
            trouble = feed.take_trouble()
            if trouble:
                self.say(trouble)


class _Feed:
    """Own the thread and the queue of one tracker."""

    def __init__(self, tracker: Tracker, run: TrackedRun) -> None:
        self._tracker = tracker
        self._run = run
        self._rows: SimpleQueue[Row | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"report to {tracker.name}", daemon=True)
        self._trouble: str | None = None
        self._told = False

    def start(self) -> None:
        self._thread.start()

    def put(self, row: Row) -> None:
        if self._thread.is_alive():  # else it could not even be started, and nobody takes the rows
            self._rows.put(row)

    def finish(self) -> None:
        self._rows.put(None)

    def wait(self, seconds: float) -> None:
        if self._thread.ident is None:
            return  # never started
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._note(f"is still sending; about {self._rows.qsize()} rows of metrics are left behind")

    def take_trouble(self) -> str | None:
        """Return what there is to tell of this tracker, once a run."""
        if self._trouble is None or self._told:
            return None
        self._told = True
        return f"report_to: {self._tracker.name}: {self._trouble}; training goes on, metrics.jsonl has everything"

    def _work(self) -> None:
        try:
            self._tracker.start(self._run)
        except Exception as error:
            self._note(f"can't be started ({_in_short(error)})")
            return
        while (row := self._rows.get()) is not None:
            self._try(self._tracker.log, *row)
        self._try(self._tracker.finish)

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # whatever a tracker's package may raise
            self._note(f"takes no metrics ({_in_short(error)})")

    def _note(self, trouble: str) -> None:
        self._trouble = self._trouble or trouble


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _in_short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
