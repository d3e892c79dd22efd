"""What a run reads: training, validation and test data, and the base, with what a person should know said aloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.base.weights import vocabulary_size
from common.config import TrainConfig
from common.data.chat import ChatTokenizer
from common.data.dataset import load_dataset, load_training, report_lines
from common.data.records import read_examples
from common.data.sources import Split
from common.data.tokenise import DataReport
from common.data.tokens import TokenDataset
from common.engine import Engine, open_engine
from common.errors import UserError
from common.evaluate.metrics import make_metrics
from common.evaluate.questions import make_questions
from common.evaluate.scores import HeldOut
from common.lora import as_stored, num_trainable
from common.view import display
from common.view.display import say


@dataclass(frozen=True)
class TrainingData:
    """Hold what is trained on, what it is validated on, and what was lost while reading."""

    data: TokenDataset
    validation: TokenDataset | None
    report: DataReport


def read_training(config: TrainConfig, tokenizer: ChatTokenizer, console: Console) -> TrainingData:
    """Read the training data, and the validation data where there is any or a share of it is held out."""
    with display.counter("reading the training data", None, console) as advance:
        data, held_out, report = load_training(config, tokenizer, advance)
    _say_data("training", data, report, config, tokenizer, console)
    if held_out:
        say(console, f"{len(held_out):,} of them held out for validation")
    if config.data.validation:
        held_out = _read_data("validation", config.data.validation, config, tokenizer, console)
    return TrainingData(data, held_out, report)


def _read_data(
    split: Split, paths: Sequence[str], config: TrainConfig, tokenizer: ChatTokenizer, console: Console
) -> TokenDataset:
    with display.counter(f"reading the {split} data", None, console) as advance:
        data, report = load_dataset(paths, config, tokenizer, split, advance)
    _say_data(split, data, report, config, tokenizer, console)
    return data


def _say_data(
    what: str, data: TokenDataset, report: DataReport, config: TrainConfig, tokenizer: ChatTokenizer, console: Console
) -> None:
    """Print what a data set holds; raises UserError where its tokens are not the model's."""
    highest, known = data.highest_token, vocabulary_size(tokenizer.directory)
    if known and highest >= known:
        raise UserError(
            f"{tokenizer.directory}: its tokenizer makes token {highest}, its model knows only 0 to {known - 1}; "
            "put the model's own tokenizer beside it"
        )
    share = data.num_loss_tokens / data.num_tokens
    say(console, f"{len(data):,} {what} examples, {data.num_tokens:,} tokens, {share:.0%} of them supervised")
    for line in report_lines(report, config):
        say(console, f"  {line}")


def read_test(paths: Sequence[str], config: TrainConfig, tokenizer: ChatTokenizer, console: Console) -> HeldOut:
    """Read the held-out examples, and make what judges the answers; raises UserError where they don't fit."""
    data = _read_data("test", paths, config, tokenizer, console)
    examples = read_examples(paths, config.data, [], "test")
    questions = make_questions(examples, tokenizer, skip=config.data.on_error == "skip")
    return HeldOut(data, questions, make_metrics(config.evaluation.metrics, questions))


def read_base(name: str, config: TrainConfig, model_dir: Path, console: Console) -> Engine:
    """Open an engine with the base and the config's adapter."""
    say(console, f"Loading {model_dir} with the {name} engine ...")
    engine = open_engine(name, config, model_dir, as_stored(config.lora))
    trainable = num_trainable(engine.adapter_shapes())
    versions = ", ".join(f"{library} {version}" for library, version in engine.versions.items())
    say(
        console,
        f"Base in {engine.dtype} on {engine.device}; {trainable / 1e6:.2f} million trainable weights ({versions})",
    )
    return engine
