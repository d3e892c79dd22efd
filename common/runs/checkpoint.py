"""Checkpoints: a PEFT adapter folder that also holds all that resuming needs, on whichever engine.

A checkpoint appears by one rename, with a manifest of sha256 over its files; reading trusts none whose files
differ from their manifest. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from common.adapters.adapter import WEIGHTS_NAME, check_adapter, read_adapter, save_tensors, write_adapter
from common.engine import TrainState
from common.errors import UserError
from common.files import new_folder, remove_folder

OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "trainer_state.json"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class TrainerState:
    """Hold what the Trainer knows beside the weights; the position in the data follows from `step` and `seed`."""

    step: int
    epoch: float
    seed: int
    supervised_tokens: int
    batch_hash: str  # of every batch so far, see batches.chain_hash
    update_count: int
    total_steps: int
    config: Mapping[str, Any]
    data_fingerprint: str
    base_fingerprint: str
    engine: str
    versions: Mapping[str, str]
    best_metric: float | None = None  # the lowest validation loss so far
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    nonfinite_steps: int = 0
    adapter_fingerprint: str = ""  # of the weights the run began from; none: a fresh adapter


@dataclass(frozen=True)
class AdapterFiles:
    """Hold what goes beside the weights into every adapter folder: PEFT's config and the tokenizer's files."""

    config: Mapping[str, Any]
    tokenizer: Sequence[Path] = field(default=())

    def write(self, directory: Path, state: TrainState, trained: bool = False) -> None:
        """Write a loadable adapter folder and read it back; raises UserError where what came back is broken.

        `trained` says that an adapter which changes nothing counts as broken.
        """
        write_adapter(directory, state.weights, self.config)
        shapes = {key: value.shape for key, value in state.weights.items()}
        check_adapter(read_adapter(directory)[0], shapes, directory, trained)
        for path in self.tokenizer:
            shutil.copyfile(path, directory / path.name)


def save_checkpoint(output_dir: Path, state: TrainState, trainer: TrainerState, files: AdapterFiles) -> Path:
    """Write checkpoint-<step>, atomically; raises DiskError when the disk is full or can't be written."""
    directory = output_dir / f"checkpoint-{trainer.step}"
    num_bytes = 3 * sum(array.nbytes for array in state.weights.values())
    num_bytes += sum(path.stat().st_size for path in files.tokenizer) + 100_000
    with new_folder(directory, num_bytes, replace=True) as folder:
        files.write(folder, state)
        moments = {f"moment1.{key}": value for key, value in state.moment1.items()}
        moments |= {f"moment2.{key}": value for key, value in state.moment2.items()}
        save_tensors(folder / OPTIMIZER_NAME, moments)
        (folder / STATE_NAME).write_text(json.dumps(asdict(trainer), indent=2) + "\n", encoding="utf-8")
        hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        (folder / MANIFEST_NAME).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    return directory


def load_checkpoint(directory: Path) -> tuple[TrainState, TrainerState]:
    """Read a checkpoint; raises UserError that says what is damaged."""
    problem = damage(directory)
    if problem:
        raise UserError(f"{directory}: damaged: {problem}; resume from an earlier checkpoint")
    try:
        trainer = TrainerState(**json.loads((directory / STATE_NAME).read_text(encoding="utf-8")))
    except TypeError as error:
        raise UserError(f"{directory / STATE_NAME}: of another version of twintune ({error})") from None
    moments = load_file(directory / OPTIMIZER_NAME)
    weights = load_file(directory / WEIGHTS_NAME)
    first, second = ({key: moments[f"{name}.{key}"] for key in weights} for name in ("moment1", "moment2"))
    return TrainState(weights, first, second, trainer.update_count), trainer


def damage(directory: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, None where they are as they were written."""
    try:
        hashes = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name in (WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME):
            if name not in hashes:
                return f"{MANIFEST_NAME} does not name {name}"
        for name, expected in hashes.items():
            if not (directory / name).is_file():
                return f"{name} is missing"
            if _sha256(directory / name) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST_NAME} can't be read ({error})"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Give the step in the name of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def newest_intact(output_dir: Path, damaged: list[str]) -> Path | None:
    """Find the newest checkpoint that is whole; the ones passed over are told in `damaged`."""
    for path in checkpoints(output_dir):
        problem = damage(path)
        if problem is None:
            return path
        damaged.append(f"{path}: passed over: {problem}")
    return None


def remove_old(output_dir: Path, keep: int | None, newest: int | None = None, best: int | None = None) -> None:
    """Delete all but the `keep` newest checkpoints and, besides, that of step `best`.

    Those beyond step `newest`, where the run stands, are damaged or of a course that the run has left when it was
    resumed from an earlier one: they count as the oldest.
    """
    found = sorted(checkpoints(output_dir), key=lambda path: newest is not None and step_of(path) > newest)
    for path in found[keep:] if keep else []:
        if step_of(path) != best:
            remove_folder(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
