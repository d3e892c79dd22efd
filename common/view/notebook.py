"""The terminal's two lines in a notebook: HTML under the cell, replaced in place, which a saved notebook keeps.

rich's own live view would need ipywidgets there, and a thread to redraw it, whose output IPython may put under another
cell. Here it is redrawn as steps end, at most four times a second.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, RenderableType

from common.view.live import REDRAWS_PER_SECOND, NextSave, TerminalReporter

WIDTH = 100  # characters
STYLE = "font-family: monospace; line-height: 1.4; white-space: pre; overflow-x: auto; background: none"
PAGE = f'<pre style="{STYLE}">{{code}}</pre>'


class NotebookReporter(TerminalReporter):
    """Show under a cell what a terminal shows."""

    def __init__(self, console: Console, next_save: NextSave) -> None:
        super().__init__(console, next_save)
        self._live = self._widget = Widget(self._view)

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        super().advance(step)
        self._widget.redraw_if_due()

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        super().row(metrics)
        self._widget.redraw_if_due()


class Widget:
    """Show something under the cell that runs, and replace it there."""

    def __init__(self, view: Callable[[], RenderableType]) -> None:
        """Take what gives the thing to be shown now."""
        self._view = view
        self._handle: Any = None
        self._drawn = 0.0

    def start(self) -> None:
        """Begin to show it."""
        from IPython.display import HTML, display

        self._handle = display(HTML(as_html(self._view())), display_id=True)

    def redraw_if_due(self) -> None:
        """Show how it is now, unless that was done a moment ago."""
        if time.monotonic() - self._drawn >= 1 / REDRAWS_PER_SECOND:
            self._redraw()

    def stop(self) -> None:
        """Show how it ended; safe to call twice, or before anything was shown."""
        if self._handle is not None:
            self._redraw()
            self._handle = None

    def _redraw(self) -> None:
        from IPython.display import HTML

        self._drawn = time.monotonic()
        self._handle.update(HTML(as_html(self._view())))


def as_html(shown: RenderableType) -> str:
    """Write what rich would print as HTML whose text has the page's own colour."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_jupyter=False, color_system="truecolor")
    console.print(shown)
    return console.export_html(inline_styles=True, code_format=PAGE)
