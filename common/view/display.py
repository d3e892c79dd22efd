"""Tables for people: what the base and the tuned model answer, and their scores, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from common.evaluate import Question

LONGEST_ANSWER = 200  # characters of one answer; a base model rambles
COUNTS = ("num_loss_tokens", "num_examples")
LOSSES = ("loss", "perplexity")


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours guessed, no line breaks put in."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def answers(questions: Sequence[Question], base: Sequence[str], tuned: Sequence[str], console: Console) -> None:
    """Print held-out questions with the base's answer and the tuned one, which says whether it is as expected."""
    if not questions:
        return
    table = Table(title="Held-out examples, before and after", show_lines=True, expand=True)
    for heading, ratio in (("prompt", 2), ("base", 3), ("tuned", 3)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    for question, before, after in zip(questions, base, tuned, strict=False):
        right = after.strip() == question.expected.strip()
        verdict = "\n= as expected" if right else f"\nexpected: {question.expected}"
        table.add_row(Text(question.shown), _shortened(before), _shortened(after).append(verdict, style="dim"))
    console.print(table)


def scores(columns: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print scores, one column a model."""
    table = Table(title="Scores on held-out examples")
    table.add_column("")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for metric in next(iter(columns.values())):
        table.add_row(metric, *(figure(metric, column[metric]) for column in columns.values()))
    console.print(table)


@contextmanager
def counter(what: str, total: int | None, console: Console) -> Iterator[Callable[[int], None]]:
    """Show how many of `total`, if that is known, are done, where there is a terminal; yields the function to tell."""
    with _bar(what, total, console, MofNCompleteColumn(), TimeElapsedColumn()) as tell:
        yield tell


@contextmanager
def byte_counter(what: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Show likewise how many bytes are done, and the time left."""
    with _bar(what, total, console, DownloadColumn(), TimeRemainingColumn()) as tell:
        yield tell


@contextmanager
def _bar(what: str, total: int | None, console: Console, *figures: ProgressColumn) -> Iterator[Callable[[int], None]]:
    if not console.is_terminal:
        if total:
            say(console, f"{what} ...")
        yield lambda done: None
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), *figures, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def figure(metric: str, value: float) -> str:
    """Format a score: counts whole, losses with decimals, shares in per cent."""
    if metric in COUNTS:
        return f"{value:,}"
    return f"{value:.4f}" if metric in LOSSES else f"{value:.1%}"


def _shortened(answer: str) -> Text:
    return Text(answer if len(answer) <= LONGEST_ANSWER else answer[:LONGEST_ANSWER] + " ...")
