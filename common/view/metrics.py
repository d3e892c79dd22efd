"""metrics.jsonl: one JSON object a logged step, appended and flushed, so that it can be followed while it grows.

A full disk doesn't end a run for a line of metrics: rows wait in memory until there is room.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import DiskError
from common.files import append_text, write_text

RECENT = 50  # logged losses that a new one is compared with
FEWEST = 10  # of them that say something


class MetricsLog:
    """Append to the metrics of a run."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Open the log of a run that goes on after a step; what an interrupted run logged beyond it is dropped."""
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= after_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        losses = (row.get("loss") for row in kept)
        self.losses = deque((loss for loss in losses if loss is not None), maxlen=RECENT)
        self._waiting = ""

    def append(self, row: dict[str, Any]) -> str | None:
        """Write one row, or keep it until the disk takes it; returns what to tell of that, once."""
        if row.get("loss") is not None:
            self.losses.append(row["loss"])
        is_new, self._waiting = not self._waiting, self._waiting + json.dumps(row) + "\n"
        try:
            append_text(self._path, self._waiting)
        except DiskError as error:
            return f"{error}. The rows of metrics wait in memory until then" if is_new else None
        self._waiting = ""
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def is_spike(loss: float | None, earlier: Sequence[float]) -> bool:
    """Tell whether a loss stands out from the `RECENT` logged ones before it.

    It does above their mean plus 6 standard deviations, and plus a tenth of the mean. Batches differ, so that 2 or 3
    deviations are exceeded every few hundred steps of a healthy run; 6 is what a broken batch or a diverging run gives.
    The tenth keeps losses that hardly move from raising alarm over nothing. Spikes count among the earlier losses
    themselves: a jump that lasts becomes the new normal after a few rows. The cost: while the loss falls fast, and for
    50 rows after a spike, only a greater one is seen; an alarm is worth something as long as it is rare.
    """
    if loss is None or len(earlier) < FEWEST:
        return False
    mean = statistics.fmean(earlier)
    deviation = math.sqrt(sum((each - mean) * (each - mean) for each in earlier) / len(earlier))  # pstdev is slow
    return loss > mean + max(6 * deviation, 0.1 * mean)
