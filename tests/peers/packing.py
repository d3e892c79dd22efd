"""How much packing gains: supervised tokens a second of packed and unpacked steps in turn, on both engines.

Run: python tests/peers/packing.py [--steps 8] [--prompt 0] [--examples 4 8 16] [--engine mlx|torch]. The data is the
quickstart's, about 64 tokens an example, of which all begin with the same 24; a packed step is one row of 1024 tokens,
an unpacked one 4, 8 or 16 examples. `packed` and `shared` (with prefix_sharing) are how many times as many supervised
tokens a second they train; in brackets what they would if every position cost the same. `--prompt` puts so many more
tokens before each example, as a system prompt of one's own would. Each engine runs in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.batches import BatchPlan
from common.config import load_config
from common.data.chat import ChatTokenizer
from common.data.dataset import load_dataset
from common.data.tokens import TokenDataset, build_dataset
from common.engine import Engine, StepBatch, TrainState, open_engine
from common.initial import initial_weights

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
CAPACITY = 1024
PACKED = ("packed", "shared")
EXAMPLES = (4, 8, 16)  # of an unpacked step; sixteen are about as many tokens as a packed row


def main() -> None:
    """Time all ways on each engine and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--examples", type=int, nargs="+", default=EXAMPLES)
    parser.add_argument("--engine", choices=("mlx", "torch"))
    options = parser.parse_args()
    if options.engine:
        compare(options.engine, options.steps, options.prompt, options.examples)
        return
    print(f"{'engine':8}{'step':14}{'step s':>8}{'supervised tok/s':>18}{'padding':>9}{'packed':>14}{'shared':>14}")
    for name in ("torch", "mlx"):
        subprocess.run([sys.executable, __file__, "--engine", name, *sys.argv[1:]], check=True)


def compare(name: str, steps: int, prompt: int, examples: Sequence[int]) -> None:
    """Run steps of all plans in turn, so that all meet the machine in the same moods, and print a line for each."""
    config = load_config(ROOT / "configs/quickstart.yaml", ["packing=true", f"max_seq_length={CAPACITY}"])
    data, _ = load_dataset(str(ROOT / "configs/quickstart/train.jsonl"), config, ChatTokenizer(MODEL))
    data = opened_by(data, prompt) if prompt else data
    plans = {f"{number} unpacked": BatchPlan(data, number, 1, config.seed, 1) for number in examples}
    for kind in PACKED:
        plans[kind] = BatchPlan(data, 1, 1, config.seed, 1, capacity=CAPACITY, prefix_sharing=kind == "shared")
    engine = open_engine(name, config, MODEL, config.lora)
    engine.load_state(TrainState.fresh(initial_weights(engine.adapter_shapes(), config.seed)))
    times: dict[str, list[float]] = {kind: [] for kind in plans}
    counts = {kind: np.zeros(3, np.int64) for kind in plans}  # positions, tokens, supervised tokens
    for step in range(1, steps + 2):
        for kind, plan in plans.items():
            batch = plan.step_batch(step)
            seconds = timed(engine, batch, config.learning_rate)
            if step > 1:  # the first one warms up
                positions = sum(micro.token_ids.size for micro in batch.micro_batches)
                counts[kind] += positions, batch.num_tokens, batch.num_loss_tokens
                times[kind].append(seconds)
    rates = {kind: counts[kind][2] / steps / statistics.median(times[kind]) for kind in plans}
    density = {kind: counts[kind][2] / counts[kind][0] for kind in plans}  # supervised tokens a position
    for kind in plans:
        padding = 1 - counts[kind][1] / counts[kind][0]
        line = f"{name:8}{kind:14}{statistics.median(times[kind]):8.2f}{rates[kind]:18.1f}{padding:9.1%}"
        for other in PACKED if kind not in PACKED else ():
            line += f"{rates[other] / rates[kind]:7.2f} ({density[other] / density[kind]:.2f})"
        print(line, flush=True)
    engine.close()


def opened_by(data: TokenDataset, number: int) -> TokenDataset:
    """Put the same tokens, of which none is trained, before every example."""
    same = np.random.default_rng(0).integers(100, 9000, number).tolist()
    return build_dataset(
        [
            (same + data.tokens(each).tolist(), [False] * number + data.mask(each).tolist(), data.places[each])
            for each in range(len(data))
        ]
    )


def timed(engine: Engine, batch: StepBatch, learning_rate: float) -> float:
    """Return the seconds of one step."""
    began = time.perf_counter()
    engine.fetch(engine.train_step(batch, learning_rate))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
