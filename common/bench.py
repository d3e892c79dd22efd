"""How fast an engine trains here: real batches of a config through real steps, launched one ahead as `train` does.

The share of the machine is that of its own matrix products, measured first: what has to be multiplied by weights,
forward and back, over what the machine multiplies in that time. Padding and what is computed twice don't count.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import time
from typing import Any

from rich.console import Console

from common.base.hub import resolve_model
from common.batches import BatchPlan
from common.config import TrainConfig, require_trainable
from common.data.chat import ChatTokenizer
from common.data.dataset import load_training
from common.doctor.machine import about_machine
from common.engine import Engine, TrainState, choose_engine, matmul_rate, open_engine
from common.errors import UserError
from common.estimate.shape import read_shape
from common.initial import starting_weights
from common.lora import as_stored
from common.view.display import say

WARM_UP = 2  # steps after the first one, which compiles: on some devices the second does too

Figures = dict[str, Any]


def bench(config: TrainConfig, source: str, steps: int, as_json: bool) -> None:
    """Time `steps` optimizer steps and print the figures, for people or as one JSON object."""
    model_dir = resolve_model(require_trainable(config, source), config.revision)
    tokenizer = ChatTokenizer(model_dir)
    data, _, _ = load_training(config, tokenizer)
    name = choose_engine(config.engine)
    rate = matmul_rate(name, config.device)  # while the memory is free
    began = time.perf_counter()
    engine = open_engine(name, config, model_dir, as_stored(config.lora))
    engine.load_state(TrainState.fresh(starting_weights(engine, config.lora, config.seed)))
    opened = time.perf_counter() - began
    flops = flops_per_token(str(model_dir), engine)
    figures = about(engine, config, model_dir.name, steps)
    figures |= {"matmul_flops_per_second": rate, "open_seconds": opened}
    figures |= measure(engine, BatchPlan.of(data, config), steps, config.learning_rate)
    figures |= {"matmul_share": share(figures, flops, rate)}
    if as_json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        say(Console(), f"{key.replace('_', ' '):>28}  {shown}")
    if platform.system() == "Darwin":
        say(Console(), f"\nFor an issue or a table, ready to paste:\n\n{as_markdown(figures)}")


def about(engine: Engine, config: TrainConfig, model: str, steps: int) -> Figures:
    """Say what the figures are of."""
    return {
        "machine": about_machine(),
        "engine": engine.name,
        "device": engine.device,
        "versions": dict(engine.versions),
        "model": model,
        "dtype": engine.dtype,
        "setting": setting(config),
        "steps": steps,
    }


def setting(config: TrainConfig) -> str:
    """Write what of a config decides speed and memory in few words."""
    rows, way = config.per_device_train_batch_size, config.quantization.way
    parts = [
        f"{rows} x {config.max_seq_length} packed" if config.packing else f"{rows} examples",
        f"x {config.gradient_accumulation_steps}" if config.gradient_accumulation_steps > 1 else "",
        f"r={config.lora.r}",
        way.removeprefix("quantization.") if way else "",
        *(key for key in ("prefix_sharing", "gradient_checkpointing", "activation_offloading") if getattr(config, key)),
    ]
    return ", ".join(part for part in parts if part)


def measure(engine: Engine, plan: BatchPlan, steps: int, learning_rate: float) -> Figures:
    """Run steps and time them from one idle moment to the next; tokens are counted without padding.

    `step_seconds` is the median from one fetched result to the next one's. `host_seconds` is the median in which a
    batch is built and its step launched: a GPU works on the step before meanwhile, a CPU computes in it.
    """
    began = time.perf_counter()
    engine.fetch(engine.train_step(plan.step_batch(1), learning_rate))
    first = time.perf_counter() - began
    for step in range(2, WARM_UP + 2):
        engine.fetch(engine.train_step(plan.step_batch(step), learning_rate))
    ends, host, tokens, supervised, pending = [time.perf_counter()], [], 0, 0, None
    for step in range(WARM_UP + 2, WARM_UP + steps + 2):
        began = time.perf_counter()
        batch = plan.step_batch(step)
        launched = engine.train_step(batch, learning_rate)
        host.append(time.perf_counter() - began)
        tokens, supervised = tokens + batch.num_tokens, supervised + batch.num_loss_tokens
        if pending is not None:
            engine.fetch(pending)
            ends.append(time.perf_counter())
        pending = launched
    engine.fetch(pending)
    ends.append(time.perf_counter())
    seconds = ends[-1] - ends[0]
    return {
        "first_step_seconds": first,
        "step_seconds": statistics.median(after - before for before, after in itertools.pairwise(ends)),
        "host_seconds": statistics.median(host),
        "tokens_per_second": tokens / seconds,
        "supervised_tokens_per_second": supervised / seconds,
        "peak_memory_bytes": engine.memory().peak_bytes,
    }


def flops_per_token(model: str, engine: Engine) -> tuple[float, float] | None:
    """Count what a token costs in the layers, and a supervised one in the head; None for an uncertain shape.

    A product with a weight takes 2 FLOPs an element forward and 2 for its input's gradient; the adapter's, whose own
    gradient is wanted, 2 more. Attention is left out: it has no weights.
    """
    try:
        shape = read_shape(model)
    except UserError:
        return None
    adapter = sum(math.prod(each) for each in engine.adapter_shapes().values())
    head = 4.0 * shape.vocabulary * shape.hidden
    return (4.0 * shape.quantisable + 6.0 * adapter, head) if shape.certain else None


def share(figures: Figures, flops: tuple[float, float] | None, rate: float) -> float | None:
    """Return the share of the machine's matrix products that training reached, None where it can't be counted."""
    if flops is None:
        return None
    layers, head = flops
    return (layers * figures["tokens_per_second"] + head * figures["supervised_tokens_per_second"]) / rate


def as_markdown(figures: Figures) -> str:
    """Write the figures as a table of one row."""
    columns = {
        "machine": figures["machine"],
        "versions": ", ".join(f"{name} {version}" for name, version in figures["versions"].items()),
        "model": f"{figures['model']}, {figures['dtype']}",
        "setting": figures["setting"],
        "tokens/s": f"{figures['tokens_per_second']:,.0f}",
        "supervised": f"{figures['supervised_tokens_per_second']:,.0f}",
        "step s": f"{figures['step_seconds']:.3g}",
        "peak GB": f"{figures['peak_memory_bytes'] / 1e9:.2f}",
        "of matmuls": f"{figures['matmul_share']:.0%}" if figures["matmul_share"] is not None else "",
    }
    rows = (columns.keys(), ["---"] * len(columns), columns.values())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
