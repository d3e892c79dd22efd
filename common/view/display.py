"""What is said to a person: lines as they are, and how far a thing has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as it is: no markup, no emoji for :a:, no colours guessed, no line breaks put in."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


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
    if not console.is_terminal or console.is_jupyter:  # where rich would need ipywidgets
        if total:
            say(console, f"{what} ...")
        yield lambda done: None
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), *figures, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
