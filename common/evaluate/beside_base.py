"""An adapter beside its base, on the same held-out questions: what `evaluate` shows, and `train` at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from common.base.quantized import stored_format
from common.base.weights import read_model_config
from common.config import QuantizationConfig, TrainConfig
from common.data.chat import ChatTokenizer
from common.engine import Engine, open_engine
from common.errors import UserError
from common.evaluate.scores import Evaluation, HeldOut, Scores, evaluate
from common.evaluate.subject import Subject
from common.initial import untrained
from common.inputs import read_test
from common.view import display, tables
from common.view.display import say

NO_SCORES: Mapping[str, Scores] = MappingProxyType({})


@dataclass(frozen=True)
class Comparison:
    """Hold base and adapter side by side: their scores, and some held-out examples with both answers."""

    scores: dict[str, Scores]  # "base" and "adapter"
    answers: list[dict[str, str]]  # prompt, expected, base, adapter


def evaluate_adapter(
    config: TrainConfig, adapter: Path | None, data: Sequence[str], console: Console, full_precision: bool = True
) -> Mapping[str, Scores]:
    """Score the base and, where there is one, an adapter on a file; returns {"base": scores, "adapter": scores}.

    Where the config quantises the base, "full_precision" comes before them, the base as it is, unless left out.
    """
    paths = data or config.data.test or config.data.validation
    if not config.model_name_or_path or not paths:
        raise UserError("evaluate needs model_name_or_path and data.test in the config, or --data FILE")
    subject = Subject.of(config, adapter)
    tokenizer = ChatTokenizer(subject.model_dir)
    test = read_test(paths, config, tokenizer, console)
    rounds = config.quantization.way and stored_format(read_model_config(subject.model_dir)) is None
    full = _full_precision(subject, test, tokenizer, console) if rounds and full_precision else NO_SCORES
    engine = subject.open(console)
    if subject.adapter:
        return compare_with_base(engine, subject.config, test, tokenizer, console, full).scores
    scores = {**full, "base": measure("the base", engine, subject.config, test, tokenizer, console).scores}
    tables.scores(scores, console)
    return scores


def compare_with_base(
    engine: Engine,
    config: TrainConfig,
    test: HeldOut,
    tokenizer: ChatTokenizer,
    console: Console,
    full: Mapping[str, Scores] = NO_SCORES,
) -> Comparison:
    """Evaluate the engine's adapter and then, with the untrained adapter, the base; show both beside `full`."""
    tuned = measure("the adapter", engine, config, test, tokenizer, console)
    engine.load_state(untrained(engine, config.lora, config.seed))
    before = measure("the base", engine, config, test, tokenizer, console)
    asked = test.questions[: config.evaluation.samples]
    tables.answers(asked, before.answers, tuned.answers, console)
    scores = {**full, "base": before.scores, "adapter": tuned.scores}
    tables.scores(scores, console)
    rows = zip(asked, before.answers, tuned.answers, strict=False)
    keys = ("prompt", "expected", "base", "adapter")
    return Comparison(scores, [dict(zip(keys, (row[0].shown, row[0].expected, *row[1:]), strict=True)) for row in rows])


def measure(
    what: str, engine: Engine, config: TrainConfig, test: HeldOut, tokenizer: ChatTokenizer, console: Console
) -> Evaluation:
    """Score the engine's current weights, and count the answers where there is a terminal."""
    with display.counter(f"evaluating {what}", len(test.asked(config)), console) as advance:
        return evaluate(engine, config, test, tokenizer, advance)


def _full_precision(
    subject: Subject, test: HeldOut, tokenizer: ChatTokenizer, console: Console
) -> Mapping[str, Scores]:
    """Score the base without its quantisation, and without what only shows its answers; let it go again."""
    where = f"Loading {subject.model_dir} in full precision, to compare with"
    say(console, f"{where} (--no-full-precision leaves it out) ...")
    config = subject.config
    plain = config.model_copy(update={"quantization": QuantizationConfig(), "dtype": config.compute_dtype})
    scored = replace(test, questions=test.questions if test.metrics else [])
    engine = open_engine(subject.engine, plain, subject.model_dir, None)
    try:
        found = measure("the base in full precision", engine, plain, scored, tokenizer, console)
    finally:
        engine.close()
    return {"full_precision": found.scores}
