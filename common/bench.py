"""How fast an engine trains here: real batches of a config through real steps, after a warm-up."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from rich.console import Console

from common.base.hub import resolve_model
from common.batches import BatchPlan
from common.config import TrainConfig, require_trainable
from common.data.chat import ChatTokenizer
from common.data.dataset import load_training
from common.engine import Engine, TrainState, choose_engine, open_engine
from common.initial import starting_weights
from common.lora import as_stored
from common.view.display import say

WARM_UP = 2  # steps: the first compiles, and on some devices the second does too


def bench(config: TrainConfig, source: str, steps: int, as_json: bool) -> None:
    """Time `steps` optimizer steps and print the figures, for people or as one JSON object."""
    model_dir = resolve_model(require_trainable(config, source), config.revision)
    tokenizer = ChatTokenizer(model_dir)
    data, _, _ = load_training(config, tokenizer)
    engine = open_engine(choose_engine(config.engine), config, model_dir, as_stored(config.lora))
    engine.load_state(TrainState.fresh(starting_weights(engine, config.lora, config.seed)))
    figures = measure(engine, BatchPlan.of(data, config), steps, config.learning_rate)
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        say(Console(), f"{name.replace('_', ' '):>28}  {shown}")


def measure(engine: Engine, plan: BatchPlan, steps: int, learning_rate: float) -> dict[str, Any]:
    """Run and time steps one at a time; seconds are medians, tokens are counted without padding."""
    seconds, launches, tokens, supervised = [], [], 0, 0
    for step in range(1, WARM_UP + steps + 1):
        batch = plan.step_batch(step)
        began = time.perf_counter()
        handle = engine.train_step(batch, learning_rate)
        launched = time.perf_counter()
        engine.fetch(handle)
        if step > WARM_UP:
            seconds.append(time.perf_counter() - began)
            launches.append(launched - began)
            tokens += batch.num_tokens
            supervised += batch.num_loss_tokens
    return {
        "engine": engine.name,
        "device": engine.device,
        "dtype": engine.dtype,
        **engine.versions,
        "steps": steps,
        "step_seconds": statistics.median(seconds),
        "launch_seconds": statistics.median(launches),
        "tokens_per_second": tokens / sum(seconds),
        "supervised_tokens_per_second": supervised / sum(seconds),
        "peak_memory_bytes": engine.memory().peak_bytes,
    }
