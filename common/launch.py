"""The verbs' work, from a config to what a person sees: the parts are put together here, and nowhere else.

Order matters: what can be wrong is looked at before what is slow. Config, output folder, model files and data
are checked, in seconds, before an engine is opened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from common import display
from common.adapter import check_adapter, lora_of, peft_config, read_adapter
from common.batches import BatchPlan
from common.card import model_card
from common.chat import ChatTokenizer
from common.checkpoint import AdapterFiles
from common.config import TrainConfig, require_trainable
from common.dataset import load_dataset, load_training, report_lines
from common.display import say
from common.engine import Array, Engine, TrainState, choose_engine, open_engine
from common.errors import Interrupted, UserError
from common.evaluate import Evaluation, Question, evaluate, make_questions
from common.hub import resolve_model
from common.lora import initial_weights
from common.metrics import MetricsLog
from common.progress import LoggedReporter, clock, make_reporter
from common.records import read_examples
from common.run import Identity, RunFolder, Start, refuse_other_run
from common.signals import stop_on_signals
from common.sources import Split
from common.tokenise import DataReport
from common.tokens import TokenDataset
from common.trainer import Trainer
from common.weights import fingerprint, vocabulary_size

# A LoRA step is forward and the backward of activations, twice a forward alone, and a little of its own.
STEP_PER_FORWARD = 2.4


@dataclass(frozen=True)
class TestSet:
    """Hold the held-out examples, as tokens where their loss is wanted, and as questions."""

    data: TokenDataset | None
    questions: list[Question]


@dataclass(frozen=True)
class Request:
    """Hold what the command line asked of a training run beside the config."""

    source: str  # the config's file, for messages
    resume: str | None = None  # "auto", a checkpoint's folder, or None to start afresh
    allow_changed: bool = False
    resume_command: str = ""  # what continues this run, to be shown when it is interrupted


def train(config: TrainConfig, request: Request, console: Console) -> None:
    """Train as the config says, write the run's folder, and end with base and adapter side by side.

    Raises Interrupted once a signal stopped the run and its checkpoint is saved.
    """
    base = require_trainable(config, request.source)
    refuse_other_run(config, request.resume, request.allow_changed)
    name = choose_engine(config.engine)
    model_dir = resolve_model(base, config.revision)
    tokenizer = ChatTokenizer(model_dir)
    data, validation = _read_training(config, tokenizer, console)
    test = _read_test(config.data.test, config, tokenizer, console) if config.data.test else None
    plan = BatchPlan.of(data, config)
    engine = _open(name, config, model_dir, console)
    adapter = peft_config(config.lora, engine.target_modules(), base, config.revision)
    folder = RunFolder(
        config,
        Identity(data.fingerprint(), fingerprint(model_dir)),
        AdapterFiles(adapter, tokenizer.files),
        plan.total_steps,
    )
    fresh = initial_weights(engine.adapter_shapes(), config.seed)
    start = _start(folder, request, fresh, engine, console)
    if folder.is_finished(start):
        say(
            console,
            f"This run is finished: {folder.final} holds its adapter. Delete {folder.path} to train again.",
        )
    else:
        _train(config, request, engine, plan, validation, folder, start, console)
    if test:
        # The person waits: where there are scores to show, the loss on the test file is left to `twintune evaluate`.
        shown = TestSet(None if config.evaluation.metrics else test.data, test.questions)
        _compare(engine, config, shown, tokenizer, TrainState.fresh(fresh), console)
    say(console, f"The adapter is in {folder.final}")
    engine.close()


def evaluate_adapter(
    config: TrainConfig, adapter: Path | None, data: Sequence[str], console: Console
) -> Mapping[str, Mapping[str, float]]:
    """Score the base and, where there is one, an adapter on a file; returns {"base": scores, "adapter": scores}."""
    paths = data or config.data.test or config.data.validation
    base = config.model_name_or_path
    if not base or not paths:
        raise UserError("evaluate needs model_name_or_path and data.test in the config, or --data FILE")
    if adapter is None and (Path(config.output_dir) / "final").is_dir():
        adapter = Path(config.output_dir) / "final"
    name = choose_engine(config.engine)
    weights, settings = read_adapter(adapter) if adapter else ({}, {})
    config = config.model_copy(update={"lora": lora_of(settings, adapter) if adapter else config.lora})
    model_dir = resolve_model(base, config.revision)
    tokenizer = ChatTokenizer(model_dir)
    test = _read_test(paths, config, tokenizer, console)
    engine = _open(name, config, model_dir, console)
    fresh = TrainState.fresh(initial_weights(engine.adapter_shapes(), config.seed))
    if adapter is None:
        engine.load_state(fresh)
        result = _evaluate("base", engine, config, test, tokenizer, console)
        display.scores({"base": result.scores}, console)
        return {"base": result.scores}
    check_adapter(weights, engine.adapter_shapes(), adapter, trained=False)
    engine.load_state(TrainState.fresh(weights))
    return _compare(engine, config, test, tokenizer, fresh, console)


def _train(
    config: TrainConfig,
    request: Request,
    engine: Engine,
    plan: BatchPlan,
    validation: TokenDataset | None,
    folder: RunFolder,
    start: Start,
    console: Console,
) -> None:
    folder.claim()
    _say_expected_time(engine, plan, start, console)
    reporter = LoggedReporter(make_reporter(console), folder.path / "training.log")
    log = MetricsLog(folder.path / "metrics.jsonl", start.progress.step)
    began, first = time.monotonic(), start.progress.step
    with stop_on_signals() as stop:
        save = partial(folder.save, engine)
        trainer = Trainer(config, engine, plan, validation, log, reporter, save, stop)
        finished = trainer.run(start.progress)
    progress = trainer.progress
    done = progress.step - first
    if not finished:
        raise Interrupted(
            f"stopped by {stop.signal_name} after step {progress.step} of {plan.total_steps}; everything is saved. "
            f"Continue with:\n  {request.resume_command}"
        )
    folder.write_final(engine.read_state(), model_card(config, engine, progress, folder.path / "metrics.jsonl"))
    reporter.say(
        f"Trained {done} steps in {clock(time.monotonic() - began)} "
        f"on {engine.device}; batches {progress.batch_hash[:16]}"
    )


def _start(folder: RunFolder, request: Request, fresh: Mapping[str, Array], engine: Engine, console: Console) -> Start:
    """Load the state the run starts from into the engine, and say where that is."""
    notes: list[str] = []
    start = folder.find_start(request.resume, request.allow_changed, notes)
    for note in notes:
        say(console, note)
    if start.state is None:
        engine.load_state(TrainState.fresh(fresh))
    else:
        check_adapter(start.state.weights, engine.adapter_shapes(), start.checkpoint or folder.path, trained=False)
        engine.load_state(start.state)
        say(console, f"Resuming {start.checkpoint} after step {start.progress.step}")
    return start


def _open(name: str, config: TrainConfig, model_dir: Path, console: Console) -> Engine:
    say(console, f"Loading {model_dir} with the {name} engine ...")
    engine = open_engine(name, config, model_dir, config.lora)
    trainable = sum(math.prod(shape) for shape in engine.adapter_shapes().values())
    versions = ", ".join(f"{library} {version}" for library, version in engine.versions.items())
    say(
        console,
        f"Base in {engine.dtype} on {engine.device}; {trainable / 1e6:.2f} million trainable weights ({versions})",
    )
    return engine


def _say_expected_time(engine: Engine, plan: BatchPlan, start: Start, console: Console) -> None:
    """On a CPU or MPS, measure a forward pass and say how long the run will take."""
    if engine.device_type not in ("cpu", "mps"):
        return
    micro = plan.step_batch(1).micro_batches[0]
    engine.fetch(engine.eval_step(micro))  # the first one warms up
    began = time.monotonic()
    engine.fetch(engine.eval_step(micro))
    steps = plan.total_steps - start.progress.step
    seconds = (time.monotonic() - began) * STEP_PER_FORWARD * steps * plan.accumulation
    why = "There is no CUDA device here: t" if engine.name == "torch" else "T"
    say(console, f"{why}raining on {engine.device} takes about {clock(seconds)} ({steps} steps)")


def _read_training(
    config: TrainConfig, tokenizer: ChatTokenizer, console: Console
) -> tuple[TokenDataset, TokenDataset | None]:
    with display.counter("reading the training data", None, console) as advance:
        data, held_out, report = load_training(config, tokenizer, advance)
    _say_data("training", data, report, config, tokenizer, console)
    if held_out:
        say(console, f"{len(held_out):,} of them held out for validation")
    if not config.data.validation:
        return data, held_out
    return data, _read_data("validation", config.data.validation, config, tokenizer, console)


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


def _read_test(paths: Sequence[str], config: TrainConfig, tokenizer: ChatTokenizer, console: Console) -> TestSet:
    data = _read_data("test", paths, config, tokenizer, console)
    examples = read_examples(paths, config.data, [], "test")
    return TestSet(data, make_questions(examples, tokenizer, skip=config.data.on_error == "skip"))


def _compare(
    engine: Engine,
    config: TrainConfig,
    test: TestSet,
    tokenizer: ChatTokenizer,
    base: TrainState,
    console: Console,
) -> Mapping[str, Mapping[str, float]]:
    """Evaluate the engine's adapter and then, with the untrained adapter, the base; show both."""
    tuned = _evaluate("adapter", engine, config, test, tokenizer, console)
    engine.load_state(base)
    before = _evaluate("base", engine, config, test, tokenizer, console)
    display.answers(test.questions[: config.evaluation.samples], before.answers, tuned.answers, console)
    scores = {"base": before.scores, "adapter": tuned.scores}
    display.scores(scores, console)
    return scores


def _evaluate(
    what: str, engine: Engine, config: TrainConfig, test: TestSet, tokenizer: ChatTokenizer, console: Console
) -> Evaluation:
    with display.counter(f"evaluating the {what}", len(test.questions), console) as advance:
        return evaluate(engine, config, test.data, test.questions, tokenizer, advance)
