"""`twintune evaluate`: what was asked for, checked for what doesn't go together, and who measures it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import load_config
from common.errors import UserError
from common.evaluate.beside_base import evaluate_adapter
from common.evaluate.compare import compare_runs
from common.evaluate.harness import run_tasks


@dataclass(frozen=True)
class Request:
    """Hold what the command line asked to be measured; raises UserError for what doesn't go together."""

    config: Path | None = None
    runs: Sequence[Path] = ()
    adapter: Path | None = None
    data: Sequence[Path] = ()
    metrics: Sequence[str] = ()
    compare: bool = False
    lm_eval: str | None = None
    limit: int | None = None
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        if self.runs and not self.compare:
            raise UserError(f"{self.runs[0]}: to score an adapter, say --adapter; to compare several, add --compare")
        if self.compare and (self.adapter or self.lm_eval):
            raise UserError("--compare takes runs or adapters after it; leave --adapter and --lm-eval out")
        if self.lm_eval and (self.data or self.metrics):
            raise UserError("--lm-eval: its tasks bring their own data and scores; leave --data and --metric out")
        if (self.limit or self.apply_chat_template) and not self.lm_eval:
            raise UserError("--limit and --apply-chat-template are for --lm-eval; add it, or leave them out")
        if not (self.config or self.compare):
            raise UserError("--config: missing; name the config of the run, e.g. --config configs/quickstart.yaml")


def run(asked: Request, overrides: Sequence[str], full_precision: bool, console: Console) -> Mapping[str, Any]:
    """Measure what was asked for, show it, and return what `--json` prints."""
    data = [str(path) for path in asked.data]
    if asked.metrics:
        overrides = [*overrides, f"evaluation.metrics={json.dumps(asked.metrics)}"]
    if asked.compare:
        return asdict(compare_runs(asked.runs, asked.config, data, overrides, console))
    assert asked.config
    config = load_config(asked.config, overrides)
    if asked.lm_eval:
        tasks = [task for task in asked.lm_eval.split(",") if task]
        return run_tasks(config, asked.adapter, tasks, asked.limit, asked.apply_chat_template, console)
    return evaluate_adapter(config, asked.adapter, data, console, full_precision)
