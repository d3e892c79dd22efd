"""How a run stands, seen from another terminal: read from the files of its folder and its lock, which it disturbs not.

Rows of metrics carry no time: the time left is guessed from when the steps began (run.json) and when the newest row
was written (the time of metrics.jsonl). A killed run has no end written down and no lock: it is told as
stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from common.config import TrainConfig
from common.errors import UserError
from common.runs.checkpoint import checkpoints
from common.runs.lock import Holder, holder
from common.runs.record import read_record
from common.runs.run import CONFIG_NAME, FINAL_NAME
from common.runs.saving import next_save, next_save_text
from common.view.curves import current, last, sparkline
from common.view.display import say
from common.view.live import SPARK_WIDTH, view
from common.view.metrics import read_metrics
from common.view.progress import clock, evaluated, figures

State = Literal["starting", "running", "finishing", "finished", "interrupted", "failed", "stopped"]
LOOK_SECONDS = 1.0
KILLED = "Its process is gone and has not written why: killed, or the machine went down."


@dataclass(frozen=True)
class Status:
    """Hold how a run stands; figures that are not known are None."""

    run: str
    state: State
    pid: int | None
    host: str | None
    since: str | None
    step: int
    total_steps: int | None
    epoch: float | None
    loss: float | None
    smoothed_loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    seconds_left: float | None
    next_save_step: int | None
    newest_checkpoint: str | None
    final: str | None
    message: str | None  # how it ended, where it didn't finish
    resume_command: str | None


@dataclass(frozen=True)
class Look:
    """Hold all that one look at a folder has found."""

    folder: Path
    config: TrainConfig | None
    rows: list[dict[str, Any]]
    record: Mapping[str, Any]
    holder: Holder | None
    rows_written: float  # when the newest row was, in seconds since 1970

    @property
    def row(self) -> Mapping[str, Any]:
        """Give the newest row of metrics, empty before the first."""
        return self.rows[-1] if self.rows else {}

    @property
    def total_steps(self) -> int | None:
        """Count the steps of the whole run, where that is written down."""
        return self.record.get("total_steps")

    @property
    def next_save(self) -> int | None:
        """Tell the step of the next checkpoint."""
        per_epoch = self.record.get("steps_per_epoch")
        if self.config is None or self.total_steps is None or per_epoch is None:
            return None
        return next_save(self.config, per_epoch, self.total_steps, self.row.get("step", 0))


def look(folder: Path) -> Look:
    """Read what there is of a run; raises UserError where no run is."""
    held = holder(folder)
    record, config_file = read_record(folder), folder / CONFIG_NAME
    metrics = folder / "metrics.jsonl"
    if not (held or record or config_file.is_file() or metrics.is_file()):
        what = "holds no run" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; expected the output_dir of a `twintune train`")
    written = metrics.stat().st_mtime if metrics.is_file() else 0.0
    return Look(folder, _read_config(config_file), read_metrics(metrics), record, held, written)


def status_of(seen: Look) -> Status:
    """Say in figures how a run stands."""
    row, ended = seen.row, seen.record.get("ended") or {}
    state = _state(seen)
    alive = state in ("starting", "running", "finishing")
    found, final = checkpoints(seen.folder), seen.folder / FINAL_NAME
    losses = [each.get("loss") for each in seen.rows]
    named = seen.holder or Holder()
    return Status(
        run=str(seen.folder),
        state=state,
        pid=named.pid,
        host=named.host,
        since=named.since,
        step=row.get("step", 0),
        total_steps=seen.total_steps,
        epoch=row.get("epoch"),
        loss=last(losses),
        smoothed_loss=current(losses),
        eval_loss=last([each.get("eval_loss") for each in seen.rows]),
        learning_rate=row.get("learning_rate"),
        tokens_per_second=row.get("tokens_per_second"),
        peak_memory_bytes=row.get("peak_memory_bytes"),
        seconds_left=_seconds_left(seen) if state == "running" else None,
        next_save_step=seen.next_save if state == "running" else None,
        newest_checkpoint=str(found[0]) if found else None,
        final=str(final) if final.is_dir() else None,
        message=KILLED if state == "stopped" else None if alive else ended.get("message") or None,
        resume_command=seen.record.get("resume_command") if state in ("interrupted", "failed", "stopped") else None,
    )


def show(folder: Path, as_json: bool) -> None:
    """Print how a run stands: followed on a terminal until it ends, once and in a line or an object elsewhere."""
    console = Console()
    status = status_of(look(folder))
    if as_json:
        print(json.dumps(asdict(status)))
    elif console.is_terminal and status.state in ("starting", "running", "finishing"):
        _follow(folder, console)
    else:
        say(console, plain(look(folder)))


def plain(seen: Look) -> str:
    """Write how a run stands in one line, and how to go on in one more where it stopped."""
    status = status_of(seen)
    of = f"/{status.total_steps}" if status.total_steps else ""
    left = f"{clock(status.seconds_left)} left" if status.seconds_left is not None else ""
    losses = [row.get("loss") for row in seen.rows]
    parts = [
        f"{status.run}: {status.state}",
        f"step {status.step}{of}",
        f"epoch {status.epoch:.2f}" if status.epoch is not None else "",
        figures(seen.row),
        evaluated({"eval_loss": status.eval_loss}).strip() if status.eval_loss is not None else "",
        sparkline(losses, SPARK_WIDTH),
        left,
        f"next save: step {status.next_save_step}" if status.next_save_step is not None else "",
        f"newest checkpoint: {status.newest_checkpoint}" if status.newest_checkpoint else "no checkpoint",
    ]
    return "\n".join(["  ".join(part for part in parts if part), *_ending(status)])


def _follow(folder: Path, console: Console) -> None:
    """Redraw until the run ends or Ctrl-C, which ends the looking and nothing else."""
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                seen = look(folder)
                live.update(_view(seen), refresh=True)
                if seen.holder is None:
                    break
                time.sleep(LOOK_SECONDS)
        except KeyboardInterrupt:
            say(console, "The run goes on; only the looking has ended.")


def _view(seen: Look) -> RenderableType:
    status = status_of(seen)
    who = f", process {status.pid} on {status.host} since {status.since}" if status.pid else ""
    due = ""
    if seen.config and seen.total_steps and status.state == "running":
        due = next_save_text(seen.config, seen.record.get("steps_per_epoch", 1), seen.total_steps, status.step)
    lines = view(
        step=status.step,
        total=status.total_steps or 0,
        epoch=status.epoch,
        left=f"{clock(status.seconds_left)} left" if status.seconds_left is not None else "",
        losses=[row.get("loss") for row in seen.rows],
        row=seen.row,
        next_save=due,
    )
    validation = f"validation loss {status.eval_loss:.4f}  " if status.eval_loss is not None else ""
    kept = f"newest checkpoint: {status.newest_checkpoint}" if status.newest_checkpoint else "no checkpoint yet"
    rest = [Text(validation + kept), *(Text(line) for line in _ending(status))]
    return Group(Text(f"{status.run}: {status.state}{who}", style="bold"), lines, *rest)


def _ending(status: Status) -> list[str]:
    """Say how a run ended and how to go on; nothing while it lives."""
    if status.state == "finished":
        return [f"The adapter is in {status.final}"] if status.final else []
    lines = [status.message] if status.message else []
    if status.resume_command and status.resume_command not in (status.message or ""):
        lines.append(f"Continue with:\n  {status.resume_command}")
    return lines


def _state(seen: Look) -> State:
    ended = seen.record.get("ended")
    if seen.holder is None:
        if ended:
            return ended["how"]  # type: ignore[no-any-return]  # as common/runs/record.py writes it
        return "finished" if not seen.record and (seen.folder / FINAL_NAME).is_dir() else "stopped"
    if ended or not seen.record:
        return "starting"  # what was written is of an earlier start
    return "finishing" if seen.row.get("step") == seen.total_steps else "running"


def _seconds_left(seen: Look) -> float | None:
    """Guess from the pace of this start; None before its second row."""
    step, first, total = seen.row.get("step", 0), seen.record.get("first_step"), seen.total_steps
    began = seen.record.get("steps_began")
    if first is None or total is None or began is None or step <= first:
        return None
    pace = (seen.rows_written - began) / (step - first + 1)
    since = max(0.0, time.time() - seen.rows_written)
    return max(0.0, pace * (total - step) - since)


def _read_config(path: Path) -> TrainConfig | None:
    """Read the config of a run; None where there is none yet, or one of another version."""
    try:
        return TrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, UserError):
        return None
