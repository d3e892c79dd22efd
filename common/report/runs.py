"""What a report knows of a run, read from its folder; what an older or unfinished run doesn't have is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.runs.checkpoint import STATE_NAME, checkpoints
from common.runs.lock import holder
from common.runs.record import read_record
from common.runs.run import CONFIG_NAME, FINAL_NAME
from common.view.metrics import read_metrics
from common.view.status import look, status_of


@dataclass(frozen=True)
class RunData:
    """Hold all that a report shows of one run."""

    folder: Path
    name: str  # unlike that of any other run on the page
    state: str
    rows: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    has_final: bool

    @property
    def base(self) -> str:
        """Name the base model."""
        return str(self.config.get("model_name_or_path") or "")

    @property
    def adapter(self) -> str:
        """Name the folder of the adapter to load."""
        return str(self.folder / FINAL_NAME)

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Give the scores on held-out examples by model, "base" and "adapter"; empty where none were measured."""
        return self.record.get("scores") or {}

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was logged, and its values."""
        known = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        return [step for step, _ in known], [float(value) for _, value in known]

    def last(self, key: str) -> float | None:
        """Return the last logged value of a metric."""
        values = self.series(key)[1]
        return values[-1] if values else None


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read runs to be shown together; raises UserError for a folder without one, or without a row of metrics."""
    return [_read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Name folders by as many of their last parts as tell them apart; raises UserError where one is given twice."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(folder for at, folder in enumerate(folders) if parts[at] in parts[:at])
        raise UserError(f"{twice}: given twice; name each run once")
    count = next(n for n in range(1, max(map(len, parts)) + 1) if len({each[-n:] for each in parts}) == len(parts))
    return ["/".join(each[-count:]) for each in parts]


def _read_run(folder: Path, name: str) -> RunData:
    status = status_of(look(folder))
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise UserError(
            f"{folder}: nothing to plot yet: metrics.jsonl has no row; "
            + ("wait for its first steps" if holder(folder) else "expected a run that has done a step")
        )
    config = _read_json(folder / CONFIG_NAME)
    record = read_record(folder) or _from_checkpoint(folder)
    return RunData(folder, config.get("run_name") or name, status.state, rows, config, record, bool(status.final))


def _from_checkpoint(folder: Path) -> dict[str, Any]:
    """Take from the newest checkpoint what run.json would say, for a run that has none."""
    for checkpoint in checkpoints(folder):
        state = _read_json(checkpoint / STATE_NAME)
        return {key: state[key] for key in ("engine", "versions", "total_steps") if key in state}
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
