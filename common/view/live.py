"""The two lines that a terminal shows while a run goes on, redrawn in place, with what is said scrolling above them.

    step 40/80  epoch 0.13  ━━━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━  50%  1:32 left
    loss 0.2412 █▅▃▂▂▁▁▁▁  lr 5.12e-04  217 tok/s  2.0 GB  next save: step 80

The loss is the smoothed one; the sparkline has one block a logged row until it fills its width. They are redrawn by a
thread four times a second: that costs the same however short the steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.view.curves import current, sparkline
from common.view.display import say
from common.view.progress import Eta, JsonReporter, PlainReporter, Reporter, evaluated

SPARK_WIDTH = 24
REDRAWS_PER_SECOND = 4
REMEMBERED = 600  # logged losses that the sparkline shows

NextSave = Callable[[int], str]  # says after a step when the next checkpoint is due


class Screen(Protocol):
    """Show a view that changes."""

    def start(self) -> None:
        """Begin to show it."""

    def stop(self) -> None:
        """Show how it ended; safe to call twice."""


class TerminalReporter:
    """Show where the run is and its figures, and lines above them."""

    def __init__(self, console: Console, next_save: NextSave) -> None:
        self._console = console
        self._next_save = next_save
        self._eta = Eta()
        self._step = self._total = 0
        self._left = ""
        self._row: Mapping[str, Any] = {}
        self._losses: list[float | None] = []
        self._live: Screen = Live(
            console=console, get_renderable=self._view, refresh_per_second=REDRAWS_PER_SECOND, transient=False
        )

    def begin(self, done: int, total: int) -> None:
        """Start showing a run of `total` steps of which `done` are done."""
        self._eta.begin(done, total)
        self._step, self._total = done, total
        self._live.start()

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        self._step, self._left = step, self._eta.after(step)

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        if "loss_spike" in metrics:
            self.say(f"step {metrics['step']}: loss {metrics['loss']:.4f} is a spike, far above those before it")
        if "eval_loss" in metrics:
            self.say(f"step {metrics['step']}: {evaluated(metrics).strip()}")
        self._losses = [*self._losses[1 - REMEMBERED :], metrics.get("loss")]
        self._row = metrics

    def say(self, text: str) -> None:
        """Show a line."""
        say(self._console, text)

    def end(self) -> None:
        """Stop showing; safe to call twice."""
        self._live.stop()

    def _view(self) -> RenderableType:
        epoch = self._row.get("epoch")
        return view(
            step=self._step,
            total=self._total,
            epoch=epoch,
            left=self._left,
            losses=self._losses,
            row=self._row,
            next_save=self._next_save(self._step),
        )


def view(
    step: int,
    total: int,
    epoch: float | None,
    left: str,
    losses: list[float | None],
    row: Mapping[str, Any],
    next_save: str,
) -> RenderableType:
    """Lay the two lines out; too narrow a terminal cuts the second one short."""
    first = Table.grid(padding=(0, 2), expand=True)
    first.add_column(no_wrap=True)
    first.add_column(ratio=1, vertical="middle")
    first.add_column(no_wrap=True, justify="right")
    where = Text(f"step {step}/{total}", style="bold")
    where.append(f"  epoch {epoch:.2f}" if epoch is not None else "", style="not bold")
    share = step / total if total else 0.0
    first.add_row(where, ProgressBar(total=max(total, 1), completed=step), f"{share:.0%}  {left}".rstrip())
    return Group(first, figures_line(losses, row, next_save))


def figures_line(losses: list[float | None], row: Mapping[str, Any], next_save: str) -> Text:
    """Write the smoothed loss with its sparkline, the other figures of the newest row, and what is due next."""
    loss = current(losses)
    parts = [
        f"loss {loss:.4f} {sparkline(losses, SPARK_WIDTH)}" if loss is not None else "",
        f"lr {row['learning_rate']:.2e}" if "learning_rate" in row else "",
        f"{row['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in row else "",
        f"{row['peak_memory_bytes'] / 1e9:.1f} GB" if "peak_memory_bytes" in row else "",
        next_save,
    ]
    return Text("  ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")


def make_reporter(console: Console, events: TextIO | None, next_save: NextSave) -> Reporter:
    """Choose JSON where it is asked for, the live view on a terminal, a widget in a notebook, lines elsewhere."""
    if events:
        return JsonReporter(events, console)
    if console.is_jupyter:
        from common.view.notebook import NotebookReporter

        return NotebookReporter(console, next_save)
    return TerminalReporter(console, next_save) if console.is_terminal else PlainReporter(console)
