"""When a checkpoint is due by the clock, and what happens where the disk takes none: the run goes on.

A disk that is full at step 500 may have room again at step 600, and the weights are safe in memory meanwhile; stopping
would lose more than going on. The cost: whoever looks away long enough finds the error only when the run ends, where
common/runs/finish.py makes it one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from common.config import TrainConfig
from common.errors import DiskError
from common.view.progress import Reporter

if TYPE_CHECKING:
    from common.trainer import Progress

Clock = Callable[[], float]  # seconds from any start


class Saver:
    """Write checkpoints as long as the disk takes them, and remember where it didn't."""

    def __init__(
        self,
        config: TrainConfig,
        save: Callable[[Progress], object],
        reporter: Reporter,
        clock: Clock = time.monotonic,
    ) -> None:
        """Take what writes a checkpoint, which raises DiskError where it can't."""
        self._config = config
        self._save = save
        self._reporter = reporter
        self._clock = clock
        self.failure: DiskError | None = None  # why the weights of this step are not saved, though due

    def begin(self, progress: Progress) -> None:
        """Start the clock of a run; `progress` is what a checkpoint holds, or nothing."""
        self._last = self._clock()
        self._kept = progress.best

    def time_is_up(self) -> bool:
        """Tell whether the latest checkpoint, or attempt at one, is `save_minutes` old."""
        minutes = self._config.save_minutes
        return minutes > 0 and self._clock() - self._last >= 60 * minutes

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, or say why there is none."""
        try:
            self._save(progress)
            self.failure, self._kept = None, progress.best
        except DiskError as error:
            self.failure = error
            self._reporter.say(f"step {progress.step} is not saved: {error}. The checkpoints before it are good")
        self._last = self._clock()

    def leave(self, progress: Progress) -> None:
        """Give up the weights of this step for the next: the best one that can be shipped is one that is saved."""
        is_lost = self.failure is not None and progress.best.step == progress.step
        if is_lost and self._config.load_best_model_at_end:
            progress.best = replace(self._kept, evaluations_since=0)
        self.failure = None


def next_save(config: TrainConfig, steps_per_epoch: int, total_steps: int, step: int) -> int | None:
    """Return the first step after this one at which `save_strategy` saves, None where it never does again."""
    if config.save_strategy == "no" or step >= total_steps:
        return None
    every = steps_per_epoch if config.save_strategy == "epoch" else config.save_steps
    return min(total_steps, step - step % every + every)


def next_save_text(config: TrainConfig, steps_per_epoch: int, total_steps: int, step: int) -> str:
    """Say when the next checkpoint is due, nothing where none is."""
    due = next_save(config, steps_per_epoch, total_steps, step)
    by_clock = f"every {config.save_minutes:g} min" if config.save_minutes > 0 and step < total_steps else ""
    by_step = f"step {due}" if due is not None else ""
    when = " and ".join(part for part in (by_step, by_clock) if part)
    return f"next save: {when}" if when else ""
