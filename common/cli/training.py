"""Verbs of a run: see its data, what it needs, how fast it goes, and train."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from common.cli.given import resume_command
from common.cli.options import (
    ConfigOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    SetOption,
    example,
    load,
)
from common.runs.signals import outlive_terminal


@example("twintune train --config configs/quickstart.yaml --set learning_rate=2e-4")
def train(
    config: ConfigOption,
    engine: EngineOption = None,
    device: DeviceOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|DIR]", help="Go on from the newest intact checkpoint, from this one, or from an adapter."
        ),
    ] = None,
    allow_changed: Annotated[bool, typer.Option(help="Resume although config, data or base changed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Try although the estimate says that it can't fit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but an error.")] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Train an adapter and write checkpoints, metrics and final/ into the config's output_dir."""
    from rich.console import Console

    from common import launch

    settings = load(config, engine, device, overrides)
    with outlive_terminal():
        events = sys.stdout if as_json else None
        request = launch.Request(str(config), resume, allow_changed, resume_command(sys.argv[1:]), events, force)
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # libraries print too
            launch.train(settings, request, Console(quiet=quiet))


@example("twintune preview --config configs/quickstart.yaml -n 3")
def preview(
    config: ConfigOption,
    number: Annotated[int, typer.Option("-n", min=0, help="How many examples to show.")] = 5,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Show training examples as the model sees them, with the supervised tokens marked."""
    from common.view.preview import preview_data

    preview_data(load(config, None, None, overrides), number, as_json)


@example("twintune estimate --config configs/quickstart.yaml")
def estimate(
    config: ConfigOption,
    engine: EngineOption = None,
    device: DeviceOption = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write a config that fits beside this one.")] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Say how much memory and time a run takes, and what makes it fit, before anything is loaded or downloaded."""
    from common.estimate.verb import estimate as run_estimate

    run_estimate(load(config, engine, device, overrides), config, as_json, fix)


@example("twintune bench --config configs/quickstart.yaml --engine torch --steps 8")
def bench(
    config: ConfigOption,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to time.")] = 8,
    engine: EngineOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Time training steps on this machine; nothing is saved."""
    from common.bench import bench as run_bench

    run_bench(load(config, engine, device, overrides), str(config), steps, as_json)
