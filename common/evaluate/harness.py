"""`twintune evaluate --lm-eval`: the tasks of lm-evaluation-harness, answered by either engine, base beside adapter.

The harness brings data, prompts and scores; what it asks of a model is in `engine_model`. The package is imported here
alone, and only when it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import TrainConfig
from common.data.chat import ChatTokenizer
from common.engine import Engine
from common.errors import MachineError, UserError
from common.evaluate.engine_model import EngineModel
from common.evaluate.subject import Subject
from common.view import tables

Tasks = dict[str, dict[str, float]]  # task -> score, `<score>_stderr` -> value


def run_tasks(
    config: TrainConfig, adapter: Path | None, tasks: Sequence[str], limit: int | None, chat: bool, console: Console
) -> dict[str, Tasks]:
    """Score the base and, where there is one, an adapter; returns {"base": {task: scores}, "adapter": ...}.

    `limit` is the number of questions of each task, None for all; `chat` puts them through the chat template. Raises
    MachineError where lm_eval is not installed, UserError for a task that can't be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineError("--lm-eval: lm_eval is not installed in this environment; pip install 'twintune[lm-eval]'")
    subject = Subject.of(config, adapter)
    tokenizer = ChatTokenizer(subject.model_dir)
    if chat and not tokenizer.has_template:
        raise UserError(f"--apply-chat-template: {subject.model_dir} has no chat template; leave the option out")
    manager = _manager_of(tasks)
    engine = subject.open(console)
    model = make_model(engine, subject.config, tokenizer)
    score = partial(_scores, model, manager, tasks, limit, chat)
    found: dict[str, Tasks] = {}
    if subject.adapter:
        found["adapter"] = score()
        subject.load_base(engine)
    base = score()
    engine.close()
    tables.tasks({"base": base, **found}, console)
    return {"base": base, **found}


def make_model(engine: Engine, config: TrainConfig, tokenizer: ChatTokenizer) -> Any:
    """Return the engine as lm_eval's `LM`."""
    from lm_eval.api.model import LM

    class Model(EngineModel, LM):
        """Be what the harness takes for a model."""

    return Model(engine, config, tokenizer)


def _manager_of(names: Sequence[str]) -> Any:
    """Load tasks, which fetches their data, before a model is opened; raises UserError for what can't be had."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # whatever loading code and data from elsewhere raises
            raise UserError(f"--lm-eval {name}: {type(error).__name__}: {error}") from None
        if any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()):
            raise UserError(f"--lm-eval {name}: it runs code that the model writes; do that with lm_eval, in a sandbox")
    return manager


def _scores(model: Any, manager: Any, tasks: Sequence[str], limit: int | None, chat: bool) -> Tasks:
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model, tasks=list(tasks), limit=limit, apply_chat_template=chat, log_samples=False, task_manager=manager
    )
    return {task: dict(_plain(scores)) for task, scores in found["results"].items()}


def _plain(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Leave "none" out of lm_eval's names, which is its word for an answer taken as it is, and all but numbers."""
    for name, value in scores.items():
        score, _, taken = name.partition(",")
        if taken and isinstance(value, int | float):
            yield score if taken == "none" else f"{score},{taken}", float(value)
