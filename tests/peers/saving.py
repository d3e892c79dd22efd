"""What checkpoints cost: the seconds of a save beside those of the ten steps before it.

Run: python tests/peers/saving.py [--engine mlx|torch] [--saves 3]. Model, data and adapter are the quickstart's: 4.9
million trainable weights, thus 59 MB a checkpoint, written, synced, hashed and read back.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common.adapters.adapter import peft_config
from common.batches import BatchPlan
from common.config import load_config
from common.data.chat import ChatTokenizer
from common.data.dataset import load_dataset
from common.engine import TrainState, open_engine
from common.initial import initial_weights
from common.runs.checkpoint import AdapterFiles
from common.runs.run import Identity, RunFolder
from common.trainer import Progress

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
BETWEEN = 10  # steps from one save to the next


def main() -> None:
    """Time steps and saves in turn and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("mlx", "torch"), default="torch")
    parser.add_argument("--saves", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / "outputs" if (ROOT / "outputs").is_dir() else None) as output:
        config = load_config(ROOT / "configs/quickstart.yaml", [f"output_dir={output}/run"])
        tokenizer = ChatTokenizer(MODEL)
        data, _ = load_dataset(str(ROOT / "configs/quickstart/train.jsonl"), config, tokenizer)
        plan = BatchPlan.of(data, config)
        engine = open_engine(options.engine, config, MODEL, config.lora)
        weights = initial_weights(engine.adapter_shapes(), config.seed)
        engine.load_state(TrainState.fresh(weights))
        adapter = peft_config(config.lora, engine.target_modules(), str(MODEL), None)
        folder = RunFolder(config, Identity("data", "base"), AdapterFiles(adapter, tokenizer.files), plan.total_steps)
        steps, saves = [], []
        for save in range(options.saves):
            began = time.perf_counter()
            for step in range(save * BETWEEN + 1, (save + 1) * BETWEEN + 1):
                engine.fetch(engine.train_step(plan.step_batch(step), config.learning_rate))
            trained = time.perf_counter()
            folder.save(engine, Progress(step=step))
            steps.append(trained - began)
            saves.append(time.perf_counter() - trained)
        train, kept = statistics.median(steps), statistics.median(saves)
        share = kept / (train + kept)
        print(f"{options.engine}: {BETWEEN} steps {train:.2f} s, a save {kept:.3f} s: {share:.1%} of the run")


if __name__ == "__main__":
    main()
