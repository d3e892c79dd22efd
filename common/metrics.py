"""metrics.jsonl: one JSON object a logged step, appended and flushed, so that it can be followed while it grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.files import write_text


class MetricsLog:
    """Append to the metrics of a run."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Open the log of a run that goes on after a step; what an interrupted run logged beyond it is dropped."""
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= after_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Write one row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
