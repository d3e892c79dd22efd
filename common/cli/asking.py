"""Verbs that let a model answer: judged, once, or in a conversation."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.cli.options import (
    AdapterOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    ModelOption,
    SetOption,
    SystemOption,
    example,
    with_options,
)
from common.cli.sampling_options import SamplingOptions, take_sampling


@example("twintune evaluate --config configs/quickstart.yaml --adapter outputs/quickstart/final")
def evaluate(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN_DIR", help="With --compare: runs or adapters, two or more.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The config; --compare has the first run's.")
    ] = None,
    adapter: AdapterOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Examples; else the config's data.test."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="In place of the config's metrics: exact_match, ...; repeatable."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask several runs the same questions, and say how sure the difference is.")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-evaluation-harness instead.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of each --lm-eval task, this many questions.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put --lm-eval's prompts through the chat template.")
    ] = False,
    engine: EngineOption = None,
    device: DeviceOption = None,
    full_precision: Annotated[
        bool, typer.Option(help="Measure a base that the config quantises without that, too; it must fit in memory.")
    ] = True,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Measure loss, perplexity and answers of base and adapter, side by side; or runs with --compare."""
    from rich.console import Console

    from common.evaluate import verb

    asked = verb.Request(
        config, runs or [], adapter, data or [], metric or [], compare, lm_eval, limit, apply_chat_template
    )
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # libraries and your own metrics print too
        result = verb.run(asked, with_options(engine, device, overrides), full_precision, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))


@example('twintune generate --model models/smollm2-135m-instruct --prompt "turn on the light"')
@take_sampling
def generate(
    prompt: Annotated[str, typer.Option(help="What the user says.")],
    sampling: SamplingOptions,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
) -> None:
    """Print the model's answer to a prompt as it comes."""
    from common.talk import speaker

    speaker.answer_once(speaker.open_model(model, adapter, engine, device), prompt, system, sampling.sampling())


@example("twintune chat --adapter outputs/quickstart/final")
@take_sampling
def chat(
    sampling: SamplingOptions,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
) -> None:
    """Talk with the model; Tab switches between base and adapter, /help tells more, Ctrl-D ends."""
    from common.talk.chat import chat as converse
    from common.talk.speaker import open_model

    converse(open_model(model, adapter, engine, device), system, sampling.sampling())
