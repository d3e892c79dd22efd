"""What the Trainer itself takes of a step: the processor's time outside the engine, for three kinds of data.

Run: PYTHONPATH=.:tests python tests/peers/host.py [--steps 300] [--profile]. A tiny random Llama trains on the CPU as
`twintune train` does, every step logged to metrics.jsonl, training.log and a console; what the engine takes is left
out. On a GPU all of this runs while the card computes the step before.
"""

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from pathlib import Path

import numpy as np
from engines import open_fresh
from rich.console import Console
from tiny_models import VOCABULARY, write_llama

from common.batches import BatchPlan
from common.config import TrainConfig
from common.data.tokens import TokenDataset, build_dataset
from common.engine import Engine, Handle, MemoryUse, StepBatch, StepResult
from common.runs.signals import StopRequest
from common.trainer import Progress, Trainer
from common.view.metrics import MetricsLog
from common.view.progress import LoggedReporter, PlainReporter

# Name: fewest and most tokens of an example, examples, packed into rows of so many tokens.
KINDS = {"4 x 2048": (2049, 2049, 64, None), "4 short": (45, 97, 3000, None), "4 x 2048 packed": (45, 97, 9000, 2048)}


class Clocked:
    """Pass everything on to an engine and add up the processor's time that its steps take."""

    def __init__(self, engine: Engine, computes: bool) -> None:
        """Take an engine; where it is not to compute, steps have a made-up loss."""
        self.name = engine.name
        self.seconds = 0.0
        self._engine = engine
        self._computes = computes

    def train_step(self, batch: StepBatch, learning_rate: float) -> Handle:
        if not self._computes:
            return StepResult(2.0 * batch.num_loss_tokens, batch.num_loss_tokens, 1.0)
        began = time.process_time()
        handle = self._engine.train_step(batch, learning_rate)
        self.seconds += time.process_time() - began
        return handle

    def fetch(self, handle: Handle) -> StepResult:
        if not self._computes:
            return handle
        began = time.process_time()
        result = self._engine.fetch(handle)
        self.seconds += time.process_time() - began
        return result

    def memory(self) -> MemoryUse:
        return self._engine.memory()


def made_data(shortest: int, longest: int, examples: int) -> TokenDataset:
    """Make examples of random tokens, the last two fifths of each supervised."""
    rng, rows = np.random.default_rng(0), []
    for number in range(examples):
        length = int(rng.integers(shortest, longest + 1))
        mask = [position >= 0.6 * length for position in range(length)]
        rows.append((rng.integers(0, VOCABULARY, length).tolist(), mask, f"made:{number + 1}"))
    return build_dataset(rows)


def milliseconds(engine: Clocked, config: TrainConfig, data: TokenDataset, profile: cProfile.Profile | None) -> float:
    """Train as a config says and return the time of a step outside the engine."""
    plan, output = BatchPlan.of(data, config), Path(config.output_dir)
    assert len(plan.rows)  # packed before the clock runs, as it is once a run
    with open(os.devnull, "w") as nowhere:
        reporter = LoggedReporter(PlainReporter(Console(file=nowhere, width=100)), output / "training.log")
        log = MetricsLog(output / "metrics.jsonl", 0)
        trainer = Trainer(config, engine, plan, None, log, reporter, lambda progress: None, StopRequest())
        engine.seconds, began = 0.0, time.process_time()
        if profile:
            profile.runcall(trainer.run, Progress())
        else:
            trainer.run(Progress())
        return (time.process_time() - began - engine.seconds) / plan.total_steps * 1e3


def main() -> None:
    """Print one line a kind of data; the long one is not computed, as a CPU would take minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="print what takes the time, by function")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = open_fresh("torch", write_llama(Path(folder) / "model"), device="cpu")
        for kind, (shortest, longest, examples, capacity) in KINDS.items():
            config = TrainConfig(
                output_dir=f"{folder}/{kind}".replace(" ", "-"),
                max_steps=options.steps,
                packing=capacity is not None,
                max_seq_length=capacity or 2048,
                per_device_train_batch_size=4,
                save_strategy="no",
            )
            data, clocked = made_data(shortest, longest, examples), Clocked(engine, computes=kind == "4 short")
            milliseconds(clocked, config, data, None)  # warms up
            profile = cProfile.Profile() if options.profile else None
            print(
                f"{kind:16} {milliseconds(clocked, config, data, profile):.3f} ms of the processor a step", flush=True
            )
            if profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
