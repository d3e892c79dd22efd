"""`twintune evaluate --compare`: several runs on the same held-out questions, and how sure it is which is better.

Each is measured on the base that it was trained on, held as it was then; one after the other, so that only one is in
memory. What they are measured by (data, metrics, engine, batch sizes) is one config's: that of `--config`, else the
first run's. Losses are left out where tokenizers differ, as a token is not the same thing then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import TrainConfig, load_config
from common.data.chat import ChatTokenizer
from common.errors import UserError
from common.evaluate.beside_base import measure
from common.evaluate.pairs import Difference, compare
from common.evaluate.questions import Question
from common.evaluate.scores import Evaluation, Scores
from common.evaluate.subject import Subject
from common.inputs import read_test
from common.runs.checkpoint import checkpoints
from common.runs.run import CONFIG_NAME, FINAL_NAME
from common.view import tables
from common.view.display import say

OF_THE_RUN = ("model_name_or_path", "revision", "quantization", "dtype", "fp16", "bf16")  # the base, and how it is held


@dataclass(frozen=True)
class Contender:
    """Hold one of the adapters to compare: what it is called here, and the config of its run."""

    name: str
    adapter: Path
    config: TrainConfig


@dataclass(frozen=True)
class Contest:
    """Hold what came out: scores, differences from the first, and the examples that were not judged alike."""

    scores: dict[str, Scores]
    differences: list[Difference]
    examples: list[dict[str, Any]]


def compare_runs(
    places: Sequence[Path], config: Path | None, data: Sequence[str], overrides: Sequence[str], console: Console
) -> Contest:
    """Measure runs or adapters on the same questions and show them side by side."""
    if len(places) < 2:
        raise UserError("--compare: expected two runs or adapters or more, e.g. --compare outputs/one outputs/two")
    contenders = [
        _contender(place, name, config, overrides) for place, name in zip(places, _names(places), strict=True)
    ]
    measured_by = load_config(config, overrides) if config else contenders[0].config
    paths = data or measured_by.data.test or measured_by.data.validation
    if not paths:
        raise UserError("--compare: there is no data to measure on; add --data FILE, or --config FILE with data.test")
    if not (config or data):
        _require_same_data(contenders)
    contest = _judged(*_measure_all(contenders, measured_by, paths, console))
    tables.scores(contest.scores, console)
    tables.differences(contest.differences, console)
    tables.differing(contest.examples, measured_by.evaluation.samples, console)
    return contest


def _contender(place: Path, name: str, config: Path | None, overrides: Sequence[str]) -> Contender:
    """Find the adapter that a run's folder, or an adapter's own, means, and the config that tells of its base."""
    own = place / CONFIG_NAME
    if own.is_file() and (place / FINAL_NAME).is_dir():
        return Contender(name, place / FINAL_NAME, load_config(own, overrides))
    if saved := checkpoints(place):
        raise UserError(f"{place}: has no {FINAL_NAME}: its run isn't finished; name a checkpoint, e.g. {saved[0]}")
    if not own.is_file():  # a checkpoint's is the run's
        own = place.parent / CONFIG_NAME
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; expected a run's output_dir or an adapter's folder")
    if not own.is_file() and config is None:
        raise UserError(f"{place}: has no {CONFIG_NAME} that names its base; add --config FILE with one that does")
    return Contender(name, place, load_config(own if own.is_file() else config or own, overrides))


def _names(places: Sequence[Path]) -> list[str]:
    """Call runs by their folders' names, by their whole paths where these are the same."""
    short = [place.absolute().name for place in places]
    names = short if len({*short}) == len(short) else [str(place) for place in places]
    if len({*names}) < len(names):
        raise UserError(f"--compare: {max(names, key=names.count)} is named twice")
    return names


def _require_same_data(contenders: Sequence[Contender]) -> None:
    first, *others = contenders
    for other in others:
        if other.config.data.test != first.config.data.test:
            raise UserError(
                f"--compare: {first.name} has data.test: {', '.join(first.config.data.test) or 'none'}, {other.name} "
                f"{', '.join(other.config.data.test) or 'none'}; add --data FILE, or --config FILE with data.test"
            )


def _measure_all(
    contenders: Sequence[Contender], measured_by: TrainConfig, paths: Sequence[str], console: Console
) -> tuple[Sequence[Question], dict[str, Evaluation]]:
    """Measure one after the other, with `exact_match` where no metric is named; returns what was asked and found."""
    if not measured_by.evaluation.metrics:
        asking = measured_by.evaluation.model_copy(update={"metrics": ("exact_match",)})
        measured_by = measured_by.model_copy(update={"evaluation": asking})
    subjects = {each.name: Subject.of(_config_of(each, measured_by), each.adapter) for each in contenders}
    tokenizers = {each.model_dir: ChatTokenizer(each.model_dir) for each in subjects.values()}
    tests = {folder: read_test(paths, measured_by, tokenizer, console) for folder, tokenizer in tokenizers.items()}
    if len({test.data.fingerprint() for test in tests.values() if test.data}) > 1:
        say(console, "The bases have other tokenizers: losses a token can't be compared, and are left out.")
        tests = {folder: replace(test, data=None) for folder, test in tests.items()}
    first, *others = tests.values()
    if any([q.source for q in first.questions] != [q.source for q in other.questions] for other in others):
        raise UserError("--compare: the chat templates of the bases refuse different examples; use data that all take")
    found: dict[str, Evaluation] = {}
    for name, subject in subjects.items():
        test, tokenizer = tests[subject.model_dir], tokenizers[subject.model_dir]
        engine = subject.open(console)
        found[name] = measure(name, engine, subject.config, test, tokenizer, console)
        engine.close()
    return first.questions, found


def _config_of(contender: Contender, measured_by: TrainConfig) -> TrainConfig:
    return measured_by.model_copy(update={key: getattr(contender.config, key) for key in OF_THE_RUN})


def _judged(questions: Sequence[Question], found: dict[str, Evaluation]) -> Contest:
    """Hold all against the first."""
    (first, base), *others = found.items()
    differences = [each for name, other in others for each in compare((first, name), base.judgements, other.judgements)]
    examples = []
    for index, question in enumerate(questions):
        judged = {name: each.judgements[index] for name, each in found.items()}
        if any(other != judged[first] for other in judged.values()):
            answers = {name: each.answers[index] for name, each in found.items()}
            told = {"source": question.source, "prompt": question.shown, "expected": question.expected}
            examples.append({**told, "answers": answers})
    return Contest({name: each.scores for name, each in found.items()}, differences, examples)
