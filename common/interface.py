"""Training from Python, for notebooks and scripts: what the command line's `train` does, with the same names.

    from common import load_config, train

    run = train(load_config("configs/quickstart.yaml", max_steps=20, lora={"r": 8}))
    run.adapter, run.losses

A notebook shows the progress as a widget (common/view/notebook.py). What the command line ends with a message raises
here: UserError and MachineError, and Interrupted for Ctrl-C and the notebook's stop button, once everything is saved.
Options that a message names by their flags are arguments: --resume is resume="auto", --force is force=True.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from common import launch
from common.config import TrainConfig
from common.config.errors import ConfigInput, validated
from common.config.file import read_config_file
from common.errors import UserError
from common.runs.record import read_record
from common.runs.run import FINAL_NAME
from common.runs.start import is_plain_adapter
from common.view.metrics import read_metrics


@dataclass(frozen=True)
class TrainedRun:
    """Hold what a finished run left behind."""

    run_dir: Path
    metrics: list[dict[str, Any]] = field(repr=False)  # the rows of metrics.jsonl
    scores: Mapping[str, Mapping[str, float]] | None  # of base and adapter on data.test, where the config has one

    @property
    def adapter(self) -> Path:
        """Give the folder of the adapter to ship."""
        return self.run_dir / FINAL_NAME

    @property
    def losses(self) -> dict[int, float]:
        """Give the training loss in nats a token by logged step."""
        return {row["step"]: row["loss"] for row in self.metrics if row["loss"] is not None}

    @property
    def eval_losses(self) -> dict[int, float]:
        """Give the validation loss likewise, by the steps that have one."""
        return {row["step"]: row["eval_loss"] for row in self.metrics if row.get("eval_loss") is not None}


def load_config(path: str | Path, **changes: Any) -> TrainConfig:
    """Read a YAML or JSON config and change keys of it: `max_steps=20`, of a group `lora={"r": 8}`.

    Raises UserError with all problems at once.
    """
    values = read_config_file(Path(path))
    changed: dict[str, str] = {}  # what to blame for a key
    for key, value in _plain(changes).items():
        changed[key] = f"load_config: {key}"
        old = values.get(key)
        if isinstance(value, dict):
            changed |= {f"{key}.{name}": f"load_config: {key}.{name}" for name in value}
            value = {**(old if isinstance(old, dict) else {}), **value}
        values[key] = value
    return validated(TrainConfig, ConfigInput(values, str(path), changed))


def _plain(value: Any) -> Any:
    """Turn what Python has beside a config's types into those: paths into text, tuples into lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def train(
    config: TrainConfig,
    resume: str | None = None,
    allow_changed: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> TrainedRun:
    """Train as the config says; `resume` is "auto" for the newest intact checkpoint, or the folder of one.

    Raises UserError and MachineError; Interrupted once a signal stopped the run and its checkpoint is saved.
    """
    if resume and is_plain_adapter(resume):
        raise UserError(f"resume: {resume}: an adapter and no checkpoint; name it in the config, adapter_name_or_path")
    command = 'train(config, resume="auto")'
    request = launch.Request("the config", resume, allow_changed, command, force=force)
    launch.train(config, request, Console(quiet=quiet))
    output = Path(config.output_dir)
    return TrainedRun(output, read_metrics(output / "metrics.jsonl"), read_record(output).get("scores"))
