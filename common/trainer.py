"""The training loop, once for both engines: schedule, order of the data, metrics, evaluation, checkpoints.

It launches step n and then fetches step n - 1, so that host work hides behind the device's; before anything that
reads the weights (evaluation, checkpoint) it fetches the step under way. The cost is that trouble in a step is
noticed one step later; the engine itself skips a non-finite update, so nothing is spoilt meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.batches import BatchPlan, chain_hash, evaluation_batches
from common.config import TrainConfig
from common.data.tokens import TokenDataset
from common.engine import Engine, Handle, StepBatch, StepResult
from common.errors import DiskError, UserError
from common.estimate.guard import explained
from common.runs.best import Best
from common.runs.checkpoint import newest_intact
from common.runs.saving import Clock, Saver
from common.runs.signals import StopRequest
from common.schedule import learning_rate_at, warmup_step_count
from common.view.metrics import MetricsLog, is_spike
from common.view.progress import Reporter


@dataclass
class Progress:
    """Hold how far a run is: what a checkpoint keeps of the Trainer."""

    step: int = 0
    epoch: float = 0.0
    supervised_tokens: int = 0
    batch_hash: str = ""
    nonfinite_steps: int = 0
    best: Best = field(default_factory=Best)


@dataclass
class Window:
    """Add up what happened since the last row of metrics."""

    loss_sum: float = 0.0
    num_loss_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0  # to launch its steps and to wait for them: an engine computes in one or the other


@dataclass(frozen=True)
class Launched:
    """Hold a step that the engine works on."""

    batch: StepBatch
    learning_rate: float
    handle: Handle
    seconds: float  # to build the batch and to launch it


class Trainer:
    """Drive an engine through a run."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        plan: BatchPlan,
        validation: TokenDataset | None,
        log: MetricsLog,
        reporter: Reporter,
        save: Callable[[Progress], object],
        stop: StopRequest,
        clock: Clock = time.monotonic,
    ) -> None:
        """Take everything a run needs; `save` writes a checkpoint of a moment when no step is under way.

        `clock` gives the seconds that `save_minutes` counts.
        """
        self._config = config
        self._engine = engine
        self._plan = plan
        self._validation = validation
        self._log = log
        self._reporter = reporter
        self._saver = Saver(config, save, reporter, clock)
        self._stop = stop
        self._window = Window()
        self._launched: Launched | None = None
        self.progress = Progress()

    @property
    def unsaved(self) -> DiskError | None:
        """Say why the checkpoint that was due at the last step is missing, None where it is not."""
        return self._saver.failure

    def run(self, progress: Progress) -> bool:
        """Train from where `progress` stands to the end or out of patience; returns False when a signal stopped it.

        Either way the last step is saved where that was due, or `unsaved` says why not.
        """
        self.progress = progress
        self._saver.begin(progress)
        self._reporter.begin(progress.step, self._plan.total_steps)
        try:
            for step in range(progress.step + 1, self._plan.total_steps + 1):
                if self._out_of_patience():
                    since = self.progress.best.evaluations_since
                    self._reporter.say(f"stopped early: {since} evaluations no better than {self.progress.best}")
                    return True
                self._saver.leave(self.progress)
                self._launch(step)
                stopping = self._stop.signal_name is not None
                if stopping or self._is_boundary(step):
                    self._at_boundary(step, stopping)
                if stopping:
                    return False
            return True
        finally:
            self._reporter.end()

    def _launch(self, step: int) -> None:
        started = time.perf_counter()
        batch = self._plan.step_batch(step)
        rate = self._learning_rate(step)
        with self._memory_explained(batch):
            handle = self._engine.train_step(batch, rate)
        launched = Launched(batch, rate, handle, time.perf_counter() - started)
        previous, self._launched = self._launched, launched
        if previous:
            self._finish(previous)

    def _drain(self) -> None:
        previous, self._launched = self._launched, None
        if previous:
            self._finish(previous)

    def _finish(self, launched: Launched) -> None:
        """Wait for a step, account for it, and log it where it is due."""
        started = time.perf_counter()
        batch, progress, window = launched.batch, self.progress, self._window
        with self._memory_explained(batch):
            result = self._engine.fetch(launched.handle)
        window.seconds += launched.seconds + time.perf_counter() - started
        progress.step, progress.epoch = batch.step, batch.epoch
        progress.batch_hash = chain_hash(progress.batch_hash, batch)
        progress.supervised_tokens += result.num_loss_tokens
        if not result.updated:
            self._count_nonfinite(batch, result)
        else:
            window.loss_sum += result.loss_sum
            window.num_loss_tokens += result.num_loss_tokens
        window.num_tokens += batch.num_tokens
        self._reporter.advance(batch.step)
        due = batch.step % self._config.logging_steps == 0 or batch.step in (1, self._plan.total_steps)
        if self._evaluation_due(batch.step) or (due and window.num_loss_tokens):
            self._log_row(launched, result)

    def _memory_explained(self, batch: StepBatch) -> contextlib.AbstractContextManager[None]:
        """Let memory that runs out in a step end the run with what to do about it."""
        return explained(self._config, self._engine.name, batch, self._newest_checkpoint)

    def _newest_checkpoint(self) -> str:
        newest = newest_intact(Path(self._config.output_dir), [])
        return f"{newest} is good, continue from it with --resume" if newest else "no checkpoint is saved yet"

    def _log_row(self, launched: Launched, result: StepResult) -> None:
        window, batch = self._window, launched.batch
        row: dict[str, Any] = {
            "step": batch.step,
            "epoch": round(batch.epoch, 4),
            "loss": window.loss_sum / window.num_loss_tokens if window.num_loss_tokens else None,  # JSON has no NaN
            "learning_rate": launched.learning_rate,
            "grad_norm": result.grad_norm if result.updated else None,
            "tokens_per_second": window.num_tokens / window.seconds,
            "supervised_tokens": self.progress.supervised_tokens,
            "peak_memory_bytes": self._engine.memory().peak_bytes,
        }
        if is_spike(row["loss"], self._log.losses):
            row["loss_spike"] = True
        if self._validation is not None and self._evaluation_due(batch.step):
            row["eval_loss"] = self._evaluate(self._validation)
        trouble = self._log.append(row)
        self._reporter.row(row)
        if trouble:
            self._reporter.say(trouble)
        self._window = Window()

    def _evaluate(self, data: TokenDataset) -> float | None:
        """Measure the validation loss and compare it with the best; None where it is not finite."""
        config, progress = self._config, self.progress
        batch_size = config.per_device_eval_batch_size
        loss = mean_loss(self._engine, data, batch_size, config.row_capacity, config.prefix_sharing)
        progress.best = progress.best.after(loss, progress.step)
        return loss if math.isfinite(loss) else None

    def _at_boundary(self, step: int, stopping: bool) -> None:
        self._drain()
        is_best = self._config.load_best_model_at_end and self.progress.best.step == step
        if stopping or is_best or self._save_due(step):
            self._saver.save(self.progress)

    def _out_of_patience(self) -> bool:
        return self.progress.best.out_of_patience(self._config.early_stopping_patience)

    def _is_boundary(self, step: int) -> bool:
        return self._save_due(step) or self._evaluation_due(step) or step == self._plan.total_steps

    def _save_due(self, step: int) -> bool:
        strategy = self._config.save_strategy
        is_last = self._out_of_patience() and strategy != "no"
        return is_last or self._saver.time_is_up() or self._due(step, strategy, self._config.save_steps)

    def _evaluation_due(self, step: int) -> bool:
        return self._validation is not None and self._due(step, self._config.eval_strategy, self._config.eval_steps)

    def _due(self, step: int, strategy: str, every: int) -> bool:
        """Tell whether an interval ends at a step; every run's last step ends one, unless the strategy is "no"."""
        if strategy == "no":
            return False
        last = step == self._plan.total_steps
        return last or step % (self._plan.steps_per_epoch if strategy == "epoch" else every) == 0

    def _learning_rate(self, step: int) -> float:
        config, total = self._config, self._plan.total_steps
        warmup = warmup_step_count(total, config.warmup_steps, config.warmup_ratio)
        return learning_rate_at(step - 1, total, config.learning_rate, config.lr_scheduler_type, warmup)

    def _count_nonfinite(self, batch: StepBatch, result: StepResult) -> None:
        """Skip a non-finite update, or stop the run with a good checkpoint where there were too many."""
        self.progress.nonfinite_steps += 1
        where = (
            f"step {batch.step}: loss {result.loss_sum:g}, gradient norm {result.grad_norm:g}: the update was skipped"
        )
        if self.progress.nonfinite_steps <= self._config.max_nonfinite_steps:
            self._reporter.say(where)
            return
        with contextlib.suppress(UserError):  # the step under way may be no better; this one is told
            self._drain()
        self._saver.save(self.progress)
        kept = "are saved" if self.unsaved is None else f"could not be saved: {self.unsaved}"
        sources = [self._plan.data.places[row] for row in batch.examples[:8]]
        raise UserError(
            f"{where} and the run stopped; the weights of the last good step {kept}.\n"
            f"examples of that step: {', '.join(sources)}\n"
            "try a lower learning_rate, dtype: bfloat16 or float32 instead of float16, or a lower max_grad_norm"
        )


def mean_loss(
    engine: Engine, data: TokenDataset, batch_size: int, capacity: int | None = None, prefix_sharing: bool = False
) -> float:
    """Return the loss in nats a supervised token over a whole data set."""
    loss_sum, count = total_loss(engine, data, batch_size, capacity, prefix_sharing)
    return loss_sum / count


def total_loss(
    engine: Engine, data: TokenDataset, batch_size: int, capacity: int | None = None, prefix_sharing: bool = False
) -> tuple[float, int]:
    """Return the summed loss in nats and the number of supervised tokens of a data set."""
    loss_sum, count, pending = 0.0, 0, None
    batches = evaluation_batches(data, batch_size, capacity, prefix_sharing)
    for batch in itertools.chain(batches, [None]):
        launched = engine.eval_step(batch) if batch else None
        if pending is not None:
            result = engine.fetch(pending)
            loss_sum, count = loss_sum + result.loss_sum, count + result.num_loss_tokens
        pending = launched
    return loss_sum, count
