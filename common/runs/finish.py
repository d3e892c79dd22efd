"""How a run ends: final/ from the best weights or the last, or an error that says what is saved and how to go on.

An error comes last: all that still fits on the disk is written before it.
"""

from __future__ import annotations

from common.config import TrainConfig
from common.engine import Engine
from common.errors import DiskError, Interrupted, TwintuneError, UserError
from common.runs.best import Best
from common.runs.checkpoint import newest_intact, step_of
from common.runs.run import RunFolder
from common.trainer import Trainer
from common.view.card import model_card
from common.view.progress import Reporter


class Ending:
    """End a run whose Trainer has stopped, for whatever reason."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        folder: RunFolder,
        trainer: Trainer,
        reporter: Reporter,
        resume_command: str,
    ) -> None:
        self._config = config
        self._engine = engine
        self._folder = folder
        self._trainer = trainer
        self._reporter = reporter
        self._resume_command = resume_command

    def interrupted(self, signal_name: str | None, total_steps: int) -> TwintuneError:
        """Return the error that ends a run which a signal stopped: Interrupted where everything is saved."""
        where = f"stopped by {signal_name} after step {self._trainer.progress.step} of {total_steps}"
        if self._trainer.unsaved:
            return UserError(f"{where}, but {self._trainer.unsaved}.\n{self._loss()}")
        return Interrupted(f"{where}; everything is saved. Continue with:\n  {self._resume_command}")

    def ship(self) -> None:
        """Write final/ and leave in the engine the weights that it holds.

        Raises UserError where the disk has no room for it, or had none for the last checkpoint.
        """
        best = self._load_best()
        card = model_card(self._config, self._engine, self._trainer.progress, self._folder, best)
        try:
            self._folder.write_final(self._engine.read_state(), card)
        except DiskError as error:
            raise UserError(f"{error}.\n{self._loss()}") from error
        if self._trainer.unsaved:
            raise UserError(
                f"{self._trainer.unsaved}.\n{self._folder.final} is written and whole; what is missing is the "
                f"checkpoint of the last step, from which the run could be made longer.\n{self._loss()}"
            )

    def _load_best(self) -> Best | None:
        """Load the best weights where they are wanted and not those in the engine; returns None for the last ones."""
        progress = self._trainer.progress
        best = progress.best
        if not self._config.load_best_model_at_end:
            return None
        last = f"final/ holds the weights of the last step, {progress.step}"
        if best.step is None:
            self._reporter.say(f"There is {best} to choose by: {last}")
            return None
        try:
            if best.step != progress.step:
                self._engine.load_state(self._folder.best_state(best))
        except UserError as error:
            self._reporter.say(f"The best weights can't be had: {error}. Instead {last}")
            return None
        self._reporter.say(f"final/ holds the best weights: {best}")
        return best

    def _loss(self) -> str:
        """Say what a full disk has cost, and how to go on."""
        step = self._trainer.progress.step
        newest = newest_intact(self._folder.path, [])
        if newest is None:
            lost = f"No checkpoint of this run is saved: its {step} steps have to be trained again"
        elif step_of(newest) >= step:
            lost = f"Every step is saved in {newest}: nothing is lost"
        else:
            lost = f"{newest} is good: nothing is lost but the {step - step_of(newest)} steps after it"
        return f"{lost}. Once there is room, continue with:\n  {self._resume_command}"
