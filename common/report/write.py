"""`twintune report`: from folders of runs to a page and, beside it, a folder with each plot as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.errors import DiskError
from common.files import explain, write_text
from common.report.page import render_page
from common.report.plots import Plot, draw_plots
from common.report.runs import read_runs

PAGE_NAME = "report.html"


def write_report(folders: Sequence[Path], output: Path | None) -> Path:
    """Write the page of some runs; returns its path.

    Raises UserError for what is no run, MachineError where matplotlib is missing, DiskError where it can't be written.
    """
    runs = read_runs(folders)
    page = output or (folders[0] / PAGE_NAME if len(folders) == 1 else Path(PAGE_NAME))
    plots = draw_plots(runs)
    write_text(page, render_page(runs, plots))
    _write_pictures(page.with_name(f"{page.stem}-plots"), plots)
    return page


def _write_pictures(folder: Path, plots: Sequence[Plot]) -> None:
    try:
        folder.mkdir(exist_ok=True)
        for plot in plots:
            (folder / f"{plot.name}.png").write_bytes(plot.png)
    except OSError as error:
        raise DiskError(explain(folder, error)) from error
