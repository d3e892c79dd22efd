"""A run as common.launch puts it together, in a folder, on the engine in NumPy: what the tests of the Trainer drive."""

from pathlib import Path

import numpy as np
from fake_engine import FakeEngine, FakeHandle

from common.adapters.adapter import peft_config
from common.batches import BatchPlan
from common.config import DataConfig, LoraConfig, TrainConfig
from common.data.tokens import TokenDataset, build_dataset
from common.engine import MicroBatch, StepResult, TrainState
from common.errors import DiskError
from common.initial import initial_weights
from common.runs.checkpoint import AdapterFiles, checkpoints, step_of
from common.runs.finish import Ending
from common.runs.run import Identity, RunFolder
from common.runs.signals import StopRequest
from common.trainer import Progress, Trainer
from common.view.metrics import MetricsLog, read_metrics

KEYS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "supervised_tokens",
    "peak_memory_bytes",
}


def examples(count: int, seed: int = 0, longest: int = 9) -> TokenDataset:
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(random.integers(2, longest + 1))
        mask = [False, *(random.random(length - 1) < 0.6).tolist()]
        mask[-1] = True
        rows.append((random.integers(1, 16, length).tolist(), mask, f"data.jsonl:{number + 1}"))
    return build_dataset(rows)


class NoteReporter:
    """Note what a person would be shown."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: list[dict] = []
        self.lines: list[str] = []
        self.shown: list[tuple] = []

    def begin(self, done: int, total: int) -> None:
        self.shown.append(("begin", done, total))

    def advance(self, step: int) -> None:
        self.steps.append(step)

    def row(self, metrics) -> None:
        self.rows.append(dict(metrics))

    def say(self, text: str) -> None:
        self.lines.append(text)

    def end(self) -> None:
        self.shown.append(("end",))


class ScriptedEngine(FakeEngine):
    """Find the validation losses that a test wants, by the step after which it is asked."""

    script: dict[int, float] | None = None

    def eval_step(self, batch: MicroBatch) -> FakeHandle:
        handle = super().eval_step(batch)
        step = next((int(call.split()[1]) for call in reversed(self.calls) if call.startswith("train ")), 0)
        if self.script is not None and step > 0:
            handle.result = StepResult(self.script[step], 1)
        return handle


class Run:
    """Put a Trainer together in a folder, as common.launch does, with an engine in NumPy.

    `script` holds validation losses by step, `full` the steps at which the disk takes no checkpoint; each step takes
    `step_seconds` on the Trainer's clock.
    """

    def __init__(
        self,
        folder: Path,
        data: TokenDataset | None = None,
        broken=(),
        script: dict[int, float] | None = None,
        full=(),
        step_seconds: float = 0.0,
        **settings,
    ) -> None:
        settings = {"num_train_epochs": 2.0, "learning_rate": 0.05, "per_device_train_batch_size": 2} | settings
        self.config = TrainConfig(
            output_dir=str(folder), data=DataConfig(validation="v"), lora=LoraConfig(r=2, lora_alpha=4), **settings
        )
        self.data = data or examples(11)
        self.engine = ScriptedEngine(self.config, broken_steps=frozenset(broken))
        self.engine.script, self.full, self._step_seconds = script, full, step_seconds
        self.plan = BatchPlan(
            self.data,
            self.config.per_device_train_batch_size,
            self.config.gradient_accumulation_steps,
            self.config.seed,
            self.config.num_train_epochs,
            self.config.max_steps,
        )
        self.validation = examples(5, seed=9)
        self.reporter, self.stop, self.saved = NoteReporter(), StopRequest(), []
        self.folder = RunFolder(self.config, Identity("d", "b"), adapter_files(), self.plan.total_steps)

    def save(self, progress: Progress) -> None:
        self.engine.calls.append(f"save {progress.step}")
        if progress.step in self.full:
            raise DiskError(f"checkpoint-{progress.step}: the disk is full")
        self.saved.append(progress.step)
        self.folder.save(self.engine, progress)

    def train(self, resume: bool = False) -> bool:
        self.notes: list[str] = []
        start = self.folder.find_start("auto" if resume else None, False, self.notes)
        fresh = TrainState.fresh(initial_weights(self.engine.adapter_shapes(), self.config.seed))
        self.engine.load_state(start.state or fresh)
        log = MetricsLog(self.folder.path / "metrics.jsonl", start.progress.step)
        arguments = (self.config, self.engine, self.plan, self.validation, log, self.reporter, self.save, self.stop)
        self.trainer = Trainer(*arguments, clock=self.clock)
        return self.trainer.run(start.progress)

    def clock(self) -> float:
        return self._step_seconds * sum(call.startswith("train ") for call in self.engine.calls)

    def checkpoints(self) -> list[int]:
        return sorted(map(step_of, checkpoints(self.folder.path)))

    def stop_at(self, step: int) -> None:
        """Have a signal ask for the end while a step is launched."""
        launch = self.engine.train_step

        def stopping(batch, rate):
            if batch.step == step:
                self.stop.signal_name = "SIGINT"
            return launch(batch, rate)

        self.engine.train_step = stopping

    def ending(self) -> Ending:
        arguments = (self.config, self.engine, self.folder, self.trainer, self.reporter)
        return Ending(*arguments, "twintune train --resume")

    @property
    def rows(self) -> list[dict]:
        return read_metrics(self.folder.path / "metrics.jsonl")

    @property
    def logged(self) -> list[int]:
        return [row["step"] for row in self.rows]

    @property
    def evaluated(self) -> list[int]:
        return [row["step"] for row in self.rows if "eval_loss" in row]


def adapter_files() -> AdapterFiles:
    return AdapterFiles(peft_config(LoraConfig(r=2, lora_alpha=4), ["proj"], "base", None))


def states_equal(one: TrainState, other: TrainState) -> bool:
    pairs = zip((one.weights, one.moment1, one.moment2), (other.weights, other.moment1, other.moment2), strict=True)
    equal = all(left[key].tobytes() == right[key].tobytes() for left, right in pairs for key in left)
    return equal and one.update_count == other.update_count


def untimed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]
