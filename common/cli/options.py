"""Options that several verbs share, stated once, and the config that they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

if TYPE_CHECKING:
    from common.config import TrainConfig

Verb = TypeVar("Verb", bound=Callable[..., Any])

ConfigOption = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="The config, YAML or JSON.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. lora.r=8; repeatable."),
]
EngineOption = Annotated[
    Literal["auto", "mlx", "torch"] | None, typer.Option("--engine", help="What computes.", show_default=False)
]
DeviceOption = Annotated[
    Literal["auto", "cuda", "mps", "cpu", "gpu"] | None,
    typer.Option("--device", help="Where it computes.", show_default=False),
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter's folder, PEFT's or mlx-lm's.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Base model: folder or Hub name; else the adapter's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON lines on stdout.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="System prompt.")]


def example(line: str) -> Callable[[Verb], Verb]:
    """Show a line as example below the help of a verb."""

    def mark(verb: Verb) -> Verb:
        verb.example = line  # type: ignore[attr-defined]
        return verb

    return mark


def load(config: Path, engine: str | None, device: str | None, overrides: list[str] | None) -> TrainConfig:
    """Read the config that a verb was given, with its options laid over it."""
    from common.config import load_config

    return load_config(config, with_options(engine, device, overrides))


def with_options(engine: str | None, device: str | None, overrides: list[str] | None) -> list[str]:
    """Return the overrides, those among them that have options of their own last."""
    options = {"engine": engine, "device": device}
    return [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value)]
