"""The verbs' work, from a config to what a person sees: the parts are put together here, and nowhere else.

Order matters: what can be wrong is looked at before what is slow. Config, output folder, model files and data
are checked, in seconds, before an engine is opened.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from rich.console import Console

from common.adapters.adapter import check_adapter, peft_config, read_adapter
from common.base.hub import resolve_model
from common.base.weights import fingerprint
from common.batches import BatchPlan
from common.config import TrainConfig, require_trainable
from common.data.chat import ChatTokenizer
from common.data.tokens import TokenDataset
from common.engine import Engine, TrainState, choose_engine
from common.errors import Interrupted
from common.estimate.guard import refuse_hopeless
from common.estimate.workload import planned_workload
from common.evaluate.beside_base import compare_with_base
from common.initial import starting_weights
from common.inputs import read_base, read_test, read_training
from common.lora import as_stored
from common.runs.awake import kept_awake
from common.runs.checkpoint import AdapterFiles
from common.runs.facts import gather_facts
from common.runs.finish import Ending
from common.runs.record import RunRecord
from common.runs.run import Identity, RunFolder, Start, alone_in, refuse_other_run
from common.runs.saving import next_save_text
from common.runs.signals import stop_on_signals
from common.runs.start import StartAdapter, begin_from, is_plain_adapter, read_start
from common.trainer import Trainer
from common.view.display import say
from common.view.live import make_reporter
from common.view.metrics import MetricsLog
from common.view.progress import LoggedReporter, Reporter, clock, print_event
from common.view.trackers import TrackedRun, Tracker, import_trackers
from common.view.tracking import TrackedReporter

# A LoRA step is forward and the backward of activations, twice a forward alone, and a little of its own.
STEP_PER_FORWARD = 2.4


@dataclass(frozen=True)
class Request:
    """Hold what the command line asked of a training run beside the config."""

    source: str  # the config's file, for messages
    resume: str | None = None  # "auto", the folder of a checkpoint or an adapter, or None to start afresh
    allow_changed: bool = False
    resume_command: str = ""  # what continues this run, to be shown when it is interrupted
    events: TextIO | None = None  # where a program reads what happens, as JSON lines
    force: bool = False  # whether to try what can't fit

    def without_adapter(self) -> Request:
        """Return the request with its --resume of an adapter left to the config, which names it from now on."""
        named = shlex.quote(f"adapter_name_or_path={self.resume}")
        return replace(self, resume=None, resume_command=f"{self.resume_command} --set {named}")


def train(config: TrainConfig, request: Request, console: Console) -> None:
    """Train as the config says, write the run's folder, and end with base and adapter side by side.

    Raises Interrupted once a signal stopped the run and its checkpoint is saved.
    """
    base = require_trainable(config, request.source)
    if request.resume and is_plain_adapter(request.resume):
        config, request = begin_from(config, request.resume), request.without_adapter()
    tell = partial(say, console)
    with alone_in(Path(config.output_dir), tell):
        refuse_other_run(config, request.resume, request.allow_changed)
        try:
            with kept_awake(tell):
                _train_alone(base, config, request, console)
        except KeyboardInterrupt:
            kept = "stopped at once; every checkpoint saved before is whole. Continue with:"
            raise Interrupted(f"{kept}\n  {request.resume_command}") from None


def _train_alone(base: str, config: TrainConfig, request: Request, console: Console) -> None:
    name = choose_engine(config.engine)
    trackers = import_trackers(config.report_to)
    given = read_start(config)
    model_dir = resolve_model(base, config.revision)
    tokenizer = ChatTokenizer(model_dir)
    read = read_training(config, tokenizer, console)
    test = read_test(config.data.test, config, tokenizer, console) if config.data.test else None
    plan = BatchPlan.of(read.data, config)
    if not request.force:
        refuse_hopeless(config, name, str(model_dir), planned_workload(plan))
    engine = read_base(name, config, model_dir, console)
    adapter = peft_config(
        as_stored(config.lora), engine.target_modules(), base, config.revision, engine.tied_embeddings
    )
    folder = RunFolder(
        config,
        Identity(read.data.fingerprint(), fingerprint(model_dir), given.fingerprint if given else ""),
        AdapterFiles(adapter, tokenizer.files),
        plan.total_steps,
    )
    if given:
        given = given.fitted_to(engine, config.lora)
    start = _start(folder, request, given, config, engine, console)
    record = RunRecord(folder.path)
    with contextlib.closing(engine), record.until_the_end():
        if folder.is_finished(start):
            say(
                console,
                f"This run is finished: {folder.final} holds its adapter. Delete {folder.path} to train again.",
            )
            engine.load_state(TrainState.fresh(read_adapter(folder.final)[0]))  # the best, not always the last
        else:
            folder.claim()
            facts = gather_facts(engine, plan, start.progress.step, read, test, request.resume_command)
            record.begin(facts)
            reporter = _reporter(config, request, plan, folder, record, start.progress.step + 1, trackers, console)
            _train(config, request, engine, plan, read.validation, folder, start, reporter)
        if test:
            # The person waits: where there are scores to show, the loss on the test file is left to `evaluate`.
            shown = replace(test, data=None if test.metrics else test.data)
            record.add(asdict(compare_with_base(engine, config, shown, tokenizer, console)))
    say(console, f"The adapter is in {folder.final}")
    if request.events:
        print_event(request.events, "end", {"final": str(folder.final), "scores": record.scores})


def _train(
    config: TrainConfig,
    request: Request,
    engine: Engine,
    plan: BatchPlan,
    validation: TokenDataset | None,
    folder: RunFolder,
    start: Start,
    reporter: Reporter,
) -> None:
    _say_expected_time(engine, plan, start, reporter)
    log = MetricsLog(folder.path / "metrics.jsonl", start.progress.step)
    began, first = time.monotonic(), start.progress.step
    with stop_on_signals() as stop:
        save = partial(folder.save, engine)
        trainer = Trainer(config, engine, plan, validation, log, reporter, save, stop)
        finished = trainer.run(start.progress)
    progress = trainer.progress
    done = progress.step - first
    ending = Ending(config, engine, folder, trainer, reporter, request.resume_command)
    if not finished:
        raise ending.interrupted(stop.signal_name, plan.total_steps)
    ending.ship()
    folder.remove_old(progress)
    reporter.say(
        f"Trained {done} steps in {clock(time.monotonic() - began)} "
        f"on {engine.device}; batches {progress.batch_hash[:16]}"
    )


def _reporter(
    config: TrainConfig,
    request: Request,
    plan: BatchPlan,
    folder: RunFolder,
    record: RunRecord,
    first_step: int,
    trackers: Sequence[Tracker],
    console: Console,
) -> Reporter:
    """Put together who is told of a run's progress: the person or program, training.log, the trackers."""
    due = partial(next_save_text, config, plan.steps_per_epoch, plan.total_steps)
    shown = LoggedReporter(make_reporter(console, request.events, due), folder.path / "training.log")
    name = config.run_name or folder.path.absolute().name
    run = TrackedRun(name, record.id, folder.path, config.to_dict(), first_step)
    return TrackedReporter(shown, trackers, run) if trackers else shown


def _start(
    folder: RunFolder,
    request: Request,
    given: StartAdapter | None,
    config: TrainConfig,
    engine: Engine,
    console: Console,
) -> Start:
    """Load the state the run starts from into the engine, and say where that is."""
    notes: list[str] = []
    start = folder.find_start(request.resume, request.allow_changed, notes)
    for note in notes:
        say(console, note)
    if start.state is not None:
        check_adapter(start.state.weights, engine.adapter_shapes(), start.checkpoint or folder.path, trained=False)
        engine.load_state(start.state)
        say(console, f"Resuming {start.checkpoint} after step {start.progress.step}")
        return start
    if given:
        engine.load_state(TrainState.fresh(given.weights))
        say(console, f"Starting from {given}")
    else:
        engine.load_state(TrainState.fresh(starting_weights(engine, config.lora, config.seed)))
    return start


def _say_expected_time(engine: Engine, plan: BatchPlan, start: Start, reporter: Reporter) -> None:
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
    reporter.say(f"{why}raining on {engine.device} takes about {clock(seconds)} ({steps} steps)")
