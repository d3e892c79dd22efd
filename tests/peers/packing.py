"""How much packing gains: supervised tokens a second of packed and unpacked steps in turn, on both engines.

Run: python tests/peers/packing.py [--steps 8] [--engine mlx|torch]. The data is the quickstart's, about 64 tokens an
example; a packed step is one row of 1024 tokens, an unpacked one 4, 8 or 16 examples. `gain` is packed over unpacked;
`possible` is what leaving out that step's padding would gain if every position cost the same.
"""

import argparse
import statistics
import time
from pathlib import Path

from common.batches import BatchPlan
from common.config import TrainConfig, load_config
from common.data.chat import ChatTokenizer
from common.data.dataset import load_dataset
from common.engine import Engine, StepBatch, TrainState, open_engine
from common.initial import initial_weights

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
CAPACITY = 1024
EXAMPLES = (4, 8, 16)  # of an unpacked step; sixteen are about as many tokens as a packed row


def main() -> None:
    """Time both ways on each engine and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--engine", choices=("mlx", "torch"))
    options = parser.parse_args()
    config = load_config(ROOT / "configs/quickstart.yaml", ["packing=true", f"max_seq_length={CAPACITY}"])
    data, _ = load_dataset(str(ROOT / "configs/quickstart/train.jsonl"), config, ChatTokenizer(MODEL))
    plans = {f"{number} unpacked": BatchPlan(data, number, 1, config.seed, 1) for number in EXAMPLES}
    plans["packed"] = BatchPlan(data, 1, 1, config.seed, 1, capacity=CAPACITY)
    print(f"{'engine':8}{'step':14}{'step s':>8}{'supervised tok/s':>18}{'padding':>9}{'gain':>7}{'possible':>10}")
    for name in [options.engine] if options.engine else ["torch", "mlx"]:
        compare(name, config, plans, options.steps)


def compare(name: str, config: TrainConfig, plans: dict[str, BatchPlan], steps: int) -> None:
    """Run steps of all plans in turn, so that all meet the machine in the same moods, and print a line for each."""
    engine = open_engine(name, config, MODEL, config.lora)
    engine.load_state(TrainState.fresh(initial_weights(engine.adapter_shapes(), config.seed)))
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in plans}
    positions = dict.fromkeys(plans, 0)
    tokens = dict.fromkeys(plans, 0)
    for step in range(1, steps + 2):
        for kind, plan in plans.items():
            batch = plan.step_batch(step)
            seconds = timed(engine, batch, config.learning_rate)
            positions[kind] += sum(micro.token_ids.size for micro in batch.micro_batches)
            tokens[kind] += batch.num_tokens
            if step > 1:  # the first one warms up
                times[kind].append((seconds, batch.num_loss_tokens / seconds))
    rates = {kind: statistics.median(rate for _, rate in rows) for kind, rows in times.items()}
    for kind, rows in times.items():
        padding = 1 - tokens[kind] / positions[kind]
        gain, possible = rates["packed"] / rates[kind], positions[kind] / tokens[kind]
        seconds = statistics.median(seconds for seconds, _ in rows)
        print(
            f"{name:8}{kind:14}{seconds:8.2f}{rates[kind]:18.1f}{padding:9.1%}{gain:7.2f}{possible:10.2f}", flush=True
        )
    engine.close()


def timed(engine: Engine, batch: StepBatch, learning_rate: float) -> float:
    """Return the seconds of one step."""
    began = time.perf_counter()
    engine.fetch(engine.train_step(batch, learning_rate))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
