"""Training steps of ours as `twintune train` takes them: the Trainer over packed or padded batches, metrics written."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch_shapes import TARGETS, WARM_UP, Example, Shape

from common.batches import BatchPlan
from common.config import LoraConfig, QuantizationConfig, TrainConfig
from common.data.tokens import build_dataset
from common.engine import Engine, TrainState, open_engine
from common.initial import starting_weights
from common.lora import as_stored
from common.runs.signals import StopRequest
from common.trainer import Progress, Trainer
from common.view.metrics import MetricsLog
from common.view.progress import Reporter


class Marks(Reporter):
    """Note when each step is done, and show nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def begin(self, done: int, total: int) -> None:
        pass

    def advance(self, step: int) -> None:
        self.times.append(time.perf_counter())

    def row(self, metrics: Mapping[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        print(text)

    def end(self) -> None:
        pass


def settings(shape: Shape, output: str, steps: int, on_card: bool) -> TrainConfig:
    """Write the config of a shape."""
    return TrainConfig(
        output_dir=output,
        dtype="bfloat16" if on_card else "float32",
        max_seq_length=max(shape.length, 1),
        packing=shape.short,
        per_device_train_batch_size=shape.rows,
        max_steps=WARM_UP + steps,
        learning_rate=1e-4,
        save_strategy="no",
        gradient_checkpointing=shape.checkpointing,
        activation_offloading=shape.offloading and on_card,
        lora=LoraConfig(r=shape.r, target_modules=tuple(TARGETS)),
        quantization=QuantizationConfig(load_in_4bit=shape.nf4, use_double_quant=shape.nf4),
    )


def opened(folder: Path, config: TrainConfig) -> Engine:
    """Open the engine with a fresh adapter."""
    engine = open_engine("torch", config, folder, as_stored(config.lora))
    engine.load_state(TrainState.fresh(starting_weights(engine, config.lora, config.seed)))
    return engine


def ours(
    folder: Path, shape: Shape, examples: list[Example], steps: int, on_card: bool
) -> Iterator[tuple[int, int, float]]:
    """Train through the Trainer; yields tokens, supervised tokens and the end of each step."""
    with tempfile.TemporaryDirectory() as output:
        config = settings(shape, output, steps, on_card)
        data = build_dataset([(tokens, supervised, "made:1") for tokens, supervised in examples])
        plan, engine, marks = BatchPlan.of(data, config), opened(folder, config), Marks()
        log = MetricsLog(Path(output) / "metrics.jsonl", 0)
        Trainer(config, engine, plan, None, log, marks, lambda progress: None, StopRequest()).run(Progress())
        for step, ended in enumerate(marks.times, start=1):
            batch = plan.step_batch(step)
            yield batch.num_tokens, batch.num_loss_tokens, ended
