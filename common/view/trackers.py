"""The trackers of `report_to`, each a few calls of somebody else's package, imported only where it is asked for.

Names of metrics and of environment variables are those of Hugging Face's Trainer, so that runs stand beside others:
train/loss, eval/loss ..., in MLflow without the prefix; WANDB_PROJECT, TRACKIO_PROJECT, MLFLOW_EXPERIMENT_NAME and all
that the packages read themselves (WANDB_MODE, MLFLOW_TRACKING_URI). A resumed run goes on in its place by the id that
run.json holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.config.resume import flat
from common.errors import MachineError, UserError

PROJECT = "twintune"
Values = Mapping[str, float]


@dataclass(frozen=True)
class TrackedRun:
    """Hold what a tracker is told of a run."""

    name: str
    id: str  # the same over all starts of the run
    folder: Path
    config: Mapping[str, Any]
    first_step: int  # above 1: it goes on

    @property
    def flat_config(self) -> dict[str, str]:
        """Give the config as dotted keys and texts, groups resolved."""
        return {key: str(value) for key, value in flat(self.config).items()}


class Tracker(Protocol):
    """Send metrics somewhere; any of these calls may take its time, or fail with any exception."""

    name: str

    def start(self, run: TrackedRun) -> None:
        """Open the run."""

    def log(self, step: int, values: Values) -> None:
        """Send the finite figures of one row of metrics."""

    def finish(self) -> None:
        """Close the run."""


class Tensorboard:
    """Write event files into `runs/` of the run's folder, by tensorboardX, which needs no torch."""

    name = "tensorboard"

    def __init__(self) -> None:
        import tensorboardX

        self._library = tensorboardX

    def start(self, run: TrackedRun) -> None:
        """Open the run."""
        purge = run.first_step if run.first_step > 1 else None  # what was logged beyond the checkpoint is hidden
        self._writer = self._library.SummaryWriter(str(run.folder / "runs"), purge_step=purge)
        if purge is None:
            self._writer.add_text("config", "\n".join(f"- {key}: {value}" for key, value in run.flat_config.items()))

    def log(self, step: int, values: Values) -> None:
        """Send the finite figures of one row of metrics."""
        for key, value in prefixed(values).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the run."""
        self._writer.close()


class Wandb:
    """Send to Weights & Biases, or with WANDB_MODE=offline write into `wandb/` of the run's folder."""

    name = "wandb"

    def __init__(self) -> None:
        """Import it and find its key: it would ask for one at the terminal in the middle of a run."""
        import wandb

        self._library = wandb
        sends = os.environ.get("WANDB_MODE", "online") == "online"
        if sends and not wandb.login(prompt=False):
            raise UserError(
                "report_to: wandb: no API key found; log in with `wandb login`, set WANDB_API_KEY, "
                "or keep the metrics here with WANDB_MODE=offline"
            )

    def start(self, run: TrackedRun) -> None:
        """Open the run."""
        self._run = self._library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
        )

    def log(self, step: int, values: Values) -> None:
        """Send the finite figures of one row of metrics."""
        self._run.log(prefixed(values), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


class Trackio:
    """Write into trackio's own folder, or send to a Space with TRACKIO_SPACE_ID."""

    name = "trackio"

    def __init__(self) -> None:
        import trackio

        self._library = trackio

    def start(self, run: TrackedRun) -> None:
        """Open the run."""
        self._run = self._library.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run.id}",  # which is what it knows a run by
            resume="allow",
            config=dict(run.config),
            embed=False,
        )

    def log(self, step: int, values: Values) -> None:
        """Send the finite figures of one row of metrics."""
        self._run.log(prefixed(values), step=step)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()


class Mlflow:
    """Send to MLFLOW_TRACKING_URI, or write where MLflow does without one."""

    name = "mlflow"

    def __init__(self) -> None:
        import mlflow

        self._client_class = mlflow.MlflowClient

    def start(self, run: TrackedRun) -> None:
        """Open the run."""
        self._client = self._client_class()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.twintune_id = '{run.id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"twintune_id": run.id}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        for key, value in run.flat_config.items():
            self._client.log_param(self._id, key, value[:500])  # the longest that every store takes

    def log(self, step: int, values: Values) -> None:
        """Send the finite figures of one row of metrics."""
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=step)

    def finish(self) -> None:
        """Close the run."""
        self._client.set_terminated(self._id)


_CLASSES: Mapping[str, tuple[type[Tensorboard | Wandb | Trackio | Mlflow], str]] = {
    "tensorboard": (Tensorboard, "tensorboardX"),
    "wandb": (Wandb, "wandb"),
    "trackio": (Trackio, "trackio"),
    "mlflow": (Mlflow, "mlflow"),
}


def import_trackers(names: Sequence[str]) -> list[Tracker]:
    """Import the packages of some trackers; raises MachineError for one that is missing, UserError for no login."""
    trackers: list[Tracker] = []
    for name in names:
        tracker, package = _CLASSES[name]
        try:
            trackers.append(tracker())
        except ImportError as error:
            raise MachineError(
                f"report_to: {name}: the package {package} can't be imported ({error}); "
                f"install it with: pip install {package}; or take {name} out of report_to"
            ) from None
    return trackers


def prefixed(values: Values) -> dict[str, float]:
    """Name metrics as Hugging Face's Trainer does: eval_loss is eval/loss, all else train/..."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in values.items()
    }
