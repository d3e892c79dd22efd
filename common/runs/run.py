"""One training run in its folder: where it starts, what it saves, and what it leaves behind.

The folder is claimed by training_config.json before anything is trained; a run of another config is never
mixed into it. Resuming compares config, data, base and tokenizer with what the checkpoint was trained on.
"""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.adapters.adapter import CONFIG_NAME as ADAPTER_NAME
from common.config import TrainConfig, changed_keys
from common.data.chat import TOKENIZER_FILES
from common.engine import Engine, TrainState
from common.errors import UserError
from common.files import new_folder, sweep, write_text
from common.runs.best import Best
from common.runs.checkpoint import (
    MANIFEST_NAME,
    AdapterFiles,
    TrainerState,
    damage,
    load_checkpoint,
    newest_intact,
    remove_old,
    save_checkpoint,
)
from common.runs.lock import locked
from common.trainer import Progress

CONFIG_NAME = "training_config.json"
FINAL_NAME = "final"


@dataclass(frozen=True)
class Identity:
    """Hold the fingerprints of what a run is trained on."""

    data: str
    base: str
    adapter: str = ""  # that the run begins from; none: a fresh one


@dataclass(frozen=True)
class Start:
    """Hold where a run goes on: from a checkpoint, or from nothing."""

    progress: Progress
    state: TrainState | None = None
    checkpoint: Path | None = None


class RunFolder:
    """Own the output folder of one run."""

    def __init__(self, config: TrainConfig, identity: Identity, files: AdapterFiles, total_steps: int) -> None:
        self.path = Path(config.output_dir)
        self._config = config
        self.identity = identity
        self._files = files
        self._total_steps = total_steps

    @property
    def final(self) -> Path:
        """Give the folder of the adapter to ship."""
        return self.path / FINAL_NAME

    def find_start(self, resume: str | None, allow_changed: bool, notes: list[str]) -> Start:
        """Decide where the run starts: afresh, or from the checkpoint that `resume` ("auto" or a folder) means.

        Damaged checkpoints passed over are told in `notes`. Raises UserError where a resume would mix two runs.
        """
        if resume is None or resume == "auto":
            checkpoint = newest_intact(self.path, notes) if resume else None
        else:
            checkpoint = Path(resume)
        if checkpoint is None:
            return Start(Progress())
        state, trainer = load_checkpoint(checkpoint)
        changes = self._changes(trainer, checkpoint)
        if changes and not allow_changed:
            raise UserError(
                f"{checkpoint}: can't be resumed, this run differs from it:\n  "
                + "\n  ".join(changes)
                + "\nput back what changed, use another output_dir, or go on regardless with --allow-changed"
            )
        return Start(self._progress(trainer, notes), state, checkpoint)

    def is_finished(self, start: Start) -> bool:
        """Tell whether the run that starts here has nothing left to do: it had all its steps, or stopped early."""
        stopped_early = start.progress.best.out_of_patience(self._config.early_stopping_patience)
        return (stopped_early or start.progress.step >= self._total_steps) and self._final_is_of_this_length()

    def claim(self) -> None:
        """Write training_config.json, which makes the folder this run's."""
        write_text(self.path / CONFIG_NAME, as_json(self._config.to_dict()))

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Write a checkpoint of this moment and delete those beyond `save_total_limit`, the best one excepted.

        Raises DiskError where there is no room; all earlier ones are there then.
        """
        state = engine.read_state()
        trainer = TrainerState(
            step=progress.step,
            epoch=progress.epoch,
            seed=self._config.seed,
            supervised_tokens=progress.supervised_tokens,
            batch_hash=progress.batch_hash,
            nonfinite_steps=progress.nonfinite_steps,
            best_metric=progress.best.metric,
            best_step=progress.best.step,
            evaluations_without_improvement=progress.best.evaluations_since,
            update_count=state.update_count,
            total_steps=self._total_steps,
            config=self._config.to_dict(),
            data_fingerprint=self.identity.data,
            base_fingerprint=self.identity.base,
            adapter_fingerprint=self.identity.adapter,
            engine=engine.name,
            versions=engine.versions,
        )
        directory = save_checkpoint(self.path, state, trainer, self._files)
        self.remove_old(progress)
        return directory

    def remove_old(self, progress: Progress) -> None:
        """Delete the checkpoints beyond `save_total_limit`: after a save, and at the end, as a save may be killed."""
        wants_best = self._config.load_best_model_at_end or self._config.early_stopping_patience
        best = progress.best.step if wants_best else None
        remove_old(self.path, self._config.save_total_limit, progress.step, best)

    def best_state(self, best: Best) -> TrainState:
        """Read the checkpoint of the best step; raises UserError where it is damaged or gone."""
        return load_checkpoint(self._best_checkpoint(best))[0]

    def write_final(self, state: TrainState, card: str) -> None:
        """Write final/, replacing an older one, once its adapter was read back and found whole."""
        num_bytes = sum(array.nbytes for array in state.weights.values()) + 20_000_000
        with new_folder(self.final, num_bytes, replace=True) as folder:
            self._files.write(folder, state, trained=True)
            (folder / CONFIG_NAME).write_text(as_json(self._config.to_dict()), encoding="utf-8")
            (folder / "README.md").write_text(card, encoding="utf-8")

    def _best_checkpoint(self, best: Best) -> Path:
        return self.path / f"checkpoint-{best.step}"

    def _progress(self, trainer: TrainerState, notes: list[str]) -> Progress:
        """Take up what a checkpoint knows; a best whose weights are lost is none any more, which is told in `notes`."""
        best = Best(trainer.best_metric, trainer.best_step, trainer.evaluations_without_improvement)
        if self._config.load_best_model_at_end and best.step is not None:
            problem = damage(self._best_checkpoint(best))
            if problem:
                notes.append(
                    f"{self._best_checkpoint(best)}, the best so far, is lost: {problem}; a new best is sought"
                )
                best = Best()
        return Progress(
            trainer.step,
            trainer.epoch,
            trainer.supervised_tokens,
            trainer.batch_hash,
            trainer.nonfinite_steps,
            best,
        )

    def _final_is_of_this_length(self) -> bool:
        """Tell apart a final/ that a shorter run left here: one made longer may have been killed before its own."""
        path = self.final / CONFIG_NAME
        if not path.is_file():
            return False
        written, wanted = _read(path), self._config.to_dict()
        decisive = ("max_steps", "num_train_epochs", "early_stopping_patience", "load_best_model_at_end")
        return all(written.get(key) == wanted[key] for key in decisive)

    def _changes(self, trainer: TrainerState, checkpoint: Path) -> list[str]:
        changes = changed_keys(trainer.config, self._config.to_dict())
        if trainer.data_fingerprint != self.identity.data:
            changes.append("data.train: its tokens are not those the checkpoint was trained on (data or tokenizer)")
        if trainer.base_fingerprint != self.identity.base:
            changes.append("model_name_or_path: the weights of the base are not those the checkpoint was trained on")
        if trainer.adapter_fingerprint != self.identity.adapter:
            began = trainer.config.get("adapter_name_or_path") or "a fresh adapter"
            changes.append(f"adapter_name_or_path: its weights are not those the run began from, of {began}")
        changes += [f"tokenizer: {name} is not that of the checkpoint" for name in self._other_files(checkpoint)]
        return changes

    def _other_files(self, checkpoint: Path) -> list[str]:
        """Name the tokenizer's files that are not the same, byte for byte, in the base and beside the checkpoint."""
        ours = {path.name: path for path in self._files.tokenizer}
        theirs = {name: checkpoint / name for name in TOKENIZER_FILES if (checkpoint / name).is_file()}
        return [
            name
            for name in TOKENIZER_FILES
            if (name in ours) != (name in theirs)
            or (name in ours and not filecmp.cmp(ours[name], theirs[name], shallow=False))
        ]


@contextmanager
def alone_in(output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Have the output folder to this process alone, cleared of what a killed one left there half written.

    Raises UserError where another process has it, or it can't be written.
    """
    _refuse_unwritable(output)
    with locked(output, say) as held:
        if held:
            sweep(output)
        yield


def refuse_other_run(config: TrainConfig, resume: str | None, allow_changed: bool) -> None:
    """Raise UserError where the output folder holds a run that this one would overwrite or mix with.

    Also where it can't be written, or `resume` names no checkpoint. Needs nothing but the config, so that it is
    asked before any model is loaded.
    """
    output = Path(config.output_dir)
    _refuse_unwritable(output)
    if resume not in (None, "auto") and not (Path(resume) / MANIFEST_NAME).is_file():
        weights = f"; to begin with its weights alone, write adapter_name_or_path: {resume}"
        raise UserError(
            f"--resume {resume}: no checkpoint; expected a folder such as {output / 'checkpoint-40'}, "
            f"or --resume alone for the newest one{weights if (Path(resume) / ADAPTER_NAME).is_file() else ''}"
        )
    recorded = output / CONFIG_NAME
    if not recorded.is_file():
        return
    changes = changed_keys(_read(recorded), config.to_dict())
    if changes and not allow_changed:
        raise UserError(
            f"output_dir: {output} already holds a run of another config:\n  "
            + "\n  ".join(changes)
            + "\nuse another output_dir (--set output_dir=...), or delete that folder if you don't need it"
        )
    finished, resumable = (output / FINAL_NAME).is_dir(), any(output.glob("checkpoint-*"))
    if resume == "auto" and finished and not resumable:
        raise UserError(
            f"output_dir: {output} already holds this run, finished and without a checkpoint to go on from; "
            "use another output_dir, or delete the folder to train again"
        )
    if resume is None and (finished or resumable):
        raise UserError(
            f"output_dir: {output} already holds this run; continue it with --resume, use another output_dir, "
            "or delete the folder to train again from the start"
        )


def _refuse_unwritable(output: Path) -> None:
    there = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UserError(f"output_dir: {output}: {there} is a file; expected a folder to write the run into")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir: {output}: {there} can't be written; check its permissions and whether its disk is "
            "read-only, or use another output_dir (--set output_dir=...)"
        )


def as_json(value: Mapping[str, Any]) -> str:
    """Format as indented JSON with a final line end."""
    return json.dumps(value, indent=2) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error}); delete the folder, or use another output_dir") from None
