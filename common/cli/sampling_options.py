"""Options of the command line that several verbs share as a group, stated once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from common.sampling import Sampling


@dataclass(frozen=True)
class SamplingOptions:
    """Hold how a person wants tokens chosen; each field is an option of the verbs that `take_sampling`."""

    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy and deterministic.")] = 0.0
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of the probability.")] = 1.0
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the likeliest k tokens; 0 for all.")] = 0
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out tokens below this share of the likeliest one's probability.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, help="Above 1, tokens that were there before are less likely.")
    ] = 1.0
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0

    def sampling(self) -> Sampling:
        """Return what an engine is told; NumPy is imported with it, which `--help` shouldn't wait for."""
        from common.sampling import Sampling

        return Sampling(**vars(self))


def take_sampling(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `SamplingOptions`; it takes them together, as its parameter `sampling`."""
    own = inspect.signature(verb, eval_str=True)
    options = inspect.signature(SamplingOptions, eval_str=True).parameters
    parameters = [each for name, each in own.parameters.items() if name != "sampling"] + list(options.values())

    @functools.wraps(verb)
    def command(**values: Any) -> None:
        sampling = SamplingOptions(**{name: values.pop(name) for name in options})
        verb(**values, sampling=sampling)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
