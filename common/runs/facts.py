"""What is known of a run before its first step, gathered for run.json from everything that has been loaded by then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from common.batches import BatchPlan
from common.data.tokens import TokenDataset
from common.engine import Engine
from common.evaluate.scores import HeldOut
from common.inputs import TrainingData
from common.lora import num_trainable
from common.view.preview import sum_up


def gather_facts(
    engine: Engine, plan: BatchPlan, done: int, read: TrainingData, test: HeldOut | None, resume_command: str
) -> dict[str, Any]:
    """Return the facts of a start after `done` steps, in JSON's types; README.md, "Look at a run", lists them."""
    data: dict[str, Any] = {"training": asdict(sum_up(plan, read.report))}
    if read.validation:
        data["validation"] = _counts(read.validation)
    if test and test.data:
        data["test"] = _counts(test.data)
    return {
        "engine": engine.name,
        "device": engine.device,
        "dtype": engine.dtype,
        "versions": dict(engine.versions),
        "trainable_weights": num_trainable(engine.adapter_shapes()),
        "total_steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "first_step": done + 1,
        "resume_command": resume_command,
        "data": data,
    }


def _counts(data: TokenDataset) -> Mapping[str, int]:
    return {
        "num_examples": len(data),
        "num_tokens": data.num_tokens,
        "num_loss_tokens": data.num_loss_tokens,
        "shortest": int(data.lengths.min()),
        "longest": int(data.lengths.max()),
    }
