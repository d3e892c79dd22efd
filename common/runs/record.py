"""run.json: what a run is and what came of it, beside the metrics, for `status`, `report` and other programs.

Written some four times a run: at its start, at its end, and when answers are there. It is for looking at, and nothing
resumes from it: where it is missing or the disk is full, a run goes on as well, and its readers show less.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import DiskError, Interrupted
from common.files import write_text

RECORD_NAME = "run.json"


class RunRecord:
    """Keep the record of one run, over all its starts."""

    def __init__(self, folder: Path) -> None:
        """Take up what an earlier start has written."""
        self._path = folder / RECORD_NAME
        self._values = read_record(folder)
        self._seconds_before = float(self._values.get("seconds", 0.0))
        self._began: float | None = None

    @property
    def id(self) -> str:
        """Give the name under which trackers know the run over all its starts."""
        return str(self._values.setdefault("id", uuid.uuid4().hex[:12]))

    @property
    def scores(self) -> Mapping[str, Any] | None:
        """Give the scores of base and adapter, None before they are measured."""
        return self._values.get("scores")

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Note a start: its steps begin now, and nothing has ended."""
        self._began = time.time()
        began = self._values.get("began", _now())
        self.add({"id": self.id, "began": began, "steps_began": self._began, "ended": None, **facts})

    def add(self, values: Mapping[str, Any]) -> None:
        """Write more values; a full disk takes none, which the checkpoints have told or will tell."""
        self._values |= values
        with contextlib.suppress(DiskError):
            write_text(self._path, json.dumps(self._values, indent=2) + "\n")

    @contextmanager
    def until_the_end(self) -> Iterator[None]:
        """Note how what goes on inside ends: finished, interrupted or failed, and with which message."""
        try:
            yield
        except (Interrupted, KeyboardInterrupt) as error:
            self._end("interrupted", str(error))
            raise
        except Exception as error:
            self._end("failed", str(error) or type(error).__name__)
            raise
        self._end("finished", "")

    def _end(self, how: str, message: str) -> None:
        if self._began is None:
            return  # no step was to be done: what the record says stays true
        seconds = self._seconds_before + time.time() - self._began
        self.add({"seconds": round(seconds, 1), "ended": {"how": how, "message": message, "at": _now()}})


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a run; empty where there is none, or none that can be read."""
    try:
        values = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _now() -> str:
    return f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S%z}"
