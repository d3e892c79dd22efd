"""Verbs that look at the machine, at a run, at several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli.options import (
    JsonOption,
    example,
)


@example("twintune doctor --model models/smollm2-135m-instruct")
def doctor(
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Say whether both engines agree on this model: folder or Hub name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can run and what to mend, and train a tiny model on every engine here."""
    from common.doctor import doctor as examination

    if model:
        examination.examine_model(model, as_json)
    else:
        examination.examine(as_json)


@example("twintune status --json outputs/quickstart-mlx")
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output_dir.")], as_json: JsonOption = False
) -> None:
    """Show how a run stands, from another terminal; on a terminal, follow it until it ends or Ctrl-C."""
    from common.view.status import show

    show(run, as_json)


@example("twintune report --output both.html outputs/quickstart-mlx outputs/quickstart-torch")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="One output_dir, or several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; else report.html in the run's folder, for several here."),
    ] = None,
) -> None:
    """Write an HTML page with plots, data, answers and config of a run, and the plots as PNG in a folder beside it."""
    from common.report.write import write_report

    print(f"{write_report(runs, output)} is ready")
