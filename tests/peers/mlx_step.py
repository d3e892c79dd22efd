"""mlx-lm's own trainer and twintune's MLX engine on the same base, data, LoRA and device, in one table.

Run: python tests/peers/mlx_step.py                                      the quickstart: SmolLM2 and its data
     python tests/peers/mlx_step.py --shape 3b --rows 4                  Llama-3.2-3B's shape, for a GPU
     python tests/peers/mlx_step.py --shape 8b --longest 32 --settings "4 bits, checkpointing"
                                                                         the longest row of an 8B within 32 GB
     python tests/peers/mlx_step.py --shape small --lengths 1024 2048 4096 8192    how memory grows with the length

mlx-lm runs as its users run it: `mlx_lm.tuner.trainer.train` with its loss, its padded batches and its LoRA layers, on
all linear modules; it has no packing and gets as many examples a step as ours has.
twintune launches each step before it waits for the last, as `train` does. Both compute in the same dtype, float32 on a
CPU and bfloat16 on a GPU, and on a Linux CPU both have OpenBLAS. Weights and tokens of shapes are random. Each
measurement is a process of its own; times are medians of single steps, tokens are counted without padding.
`MLX GB` is the peak of MLX's allocator from the first step on, `process GB` the highest resident memory of the process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.batches import BatchPlan
from common.config import TrainConfig, load_config
from common.data.chat import ChatTokenizer
from common.data.dataset import load_dataset
from common.data.tokens import TokenDataset, build_dataset
from common.engine import TrainState, open_engine
from common.initial import initial_weights
from common.memory import process_memory
from mlx_backend.blas import use_fast_blas

ROOT = Path(__file__).parents[2]
QUICKSTART, SMOLLM2 = ROOT / "configs/quickstart.yaml", ROOT / "models/smollm2-135m-instruct"
SHAPES: dict[str, dict[str, int]] = {
    "3b": {
        **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    },
    "8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    },
    "small": {
        **{"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 8192},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    },
}
SETTINGS: dict[str, list[str]] = {
    "plain": [],
    "checkpointing": ["gradient_checkpointing=true"],
    "4 bits": ["quantization.bits=4"],
    "4 bits, checkpointing": ["quantization.bits=4", "gradient_checkpointing=true"],
    "packed": ["packing=true"],
    "shared": ["packing=true", "prefix_sharing=true"],
}
OF_QUICKSTART = {"rows": 2, "settings": ["shared"]}  # configs/quickstart.yaml itself
TRAINERS = ("mlx-lm", "twintune")
UNTIMED = 3  # steps that warm up
EXAMPLE, SHARED = (45, 81), 24  # tokens of an example where rows are packed, and those that all begin with
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure each setting with both trainers and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["quickstart", *SHAPES], default="quickstart")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--rows", type=int, help="of a step; 1 if left out, for the quickstart its own")
    parser.add_argument("--lengths", nargs="+", type=int, help="of a row, in tokens")
    parser.add_argument(
        "--longest", type=float, metavar="GB", help="search the longest row that fits, from --lengths on"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run(**json.loads(options.job))))
        return
    quick = options.shape == "quickstart"
    with tempfile.TemporaryDirectory() as folder:
        base = SMOLLM2 if quick else Path(folder)
        if not quick:
            in_a_process(job="write", base=folder, shape=SHAPES[options.shape])
        of_shapes: dict[str, Any] = {"rows": 1, "settings": [each for each in SETTINGS if each != "shared"]}
        usual = OF_QUICKSTART if quick else of_shapes
        rows, settings = options.rows or usual["rows"], options.settings or usual["settings"]
        jobs = [
            {"job": trainer, "base": str(base), "setting": setting, "rows": rows, "length": length}
            for setting in settings
            for length in options.lengths or [192 if quick else 2048]
            for trainer in options.trainers
        ]
        if options.longest:
            for job in jobs:
                show_longest(job, options.longest)
            return
        print(f"{'setting':24}{'rows':>12}  {'trainer':9}{'step s':>8}{'tokens/s':>10}{'supervised/s':>13}", end="")
        print(f"{'MLX GB':>8}{'process GB':>12}")
        for job in jobs:
            show(job | {"steps": options.steps})


def in_a_process(**job: Any) -> dict[str, Any]:
    """Run one job in a process of its own; returns its figures, or the last line of what it said when it failed."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1][:120]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(job: dict[str, Any]) -> None:
    """Measure and print one line of the table."""
    figures = in_a_process(**job)
    print(f"{job['setting']:24}{job['rows']:>4} x {job['length']:<5}  {job['job']:9}", end="")
    if "error" in figures:
        print(figures["error"], flush=True)
        return
    print(f"{figures['step_seconds']:8.2f}{figures['tokens_per_second']:10,.0f}", end="")
    print(f"{figures['supervised_tokens_per_second']:13,.0f}{figures['mlx_bytes'] / 1e9:8.2f}", end="")
    print(f"{figures['process_bytes'] / 1e9:12.2f}", flush=True)


def show_longest(job: dict[str, Any], limit: float) -> None:
    """Double the length until it fails or needs more than a limit in GB, then halve the gap to a quarter."""
    fits, fails, length = 0, 0, job["length"]
    while not fails or fails - fits > fits // 4:
        figures = in_a_process(**job | {"length": length, "steps": 1})
        if figures.get("mlx_bytes", 1e30) <= limit * 1e9:
            fits = length
        else:
            fails = length
        if not fits:
            break
        length = (fits + fails) // 2 // 128 * 128 if fails else 2 * fits
    print(f"{job['setting']:24}{job['rows']:>4} rows      {job['job']:9} up to {fits} tokens a row", flush=True)


def run(job: str, base: str, shape: dict[str, int] | None = None, **how: Any) -> dict[str, Any]:
    """Do one job in this process."""
    use_fast_blas()
    if job == "write":
        write_random(Path(base), shape or {})
        return {}
    setting, rows, length, steps = (how[name] for name in ("setting", "rows", "length", "steps"))
    fixed = [f"max_seq_length={length}", f"per_device_train_batch_size={rows}", "gradient_accumulation_steps=1"]
    config = load_config(QUICKSTART, [*fixed, "packing=false", "prefix_sharing=false", *SETTINGS[setting]])
    if base == str(SMOLLM2):
        data, _ = load_dataset(str(ROOT / "configs/quickstart/train.jsonl"), config, ChatTokenizer(SMOLLM2))
    else:
        data = random_data(rows * (UNTIMED + steps + 1), length, config.packing)
    figures = ours(Path(base), config, data, steps) if job == "twintune" else theirs(Path(base), config, data, steps)
    import mlx.core as mx

    return figures | {"mlx_bytes": mx.get_peak_memory(), "process_bytes": process_memory().peak_bytes}


def write_random(folder: Path, shape: dict[str, int]) -> None:
    """Write a Llama of random bfloat16 weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, **shape}
    config["max_position_embeddings"] = 2**20
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def random_data(rows: int, length: int, packed: bool) -> TokenDataset:
    """Make examples that fill rows, wholly supervised, or short ones of which two fifths are, like the quickstart's."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(*EXAMPLE, 2 * rows * length // EXAMPLE[0]) if packed else [length + 1] * rows
    share, shared = (0.6, SHARED) if packed else (0.0, 0)
    return build_dataset(
        [
            (
                [*range(shared), *rng.integers(0, 8000, size - shared).tolist()],
                [place >= share * size for place in range(size)],
                f"made:{number}",
            )
            for number, size in enumerate(map(int, lengths))
        ]
    )


def ours(base: Path, config: TrainConfig, data: TokenDataset, steps: int) -> dict[str, Any]:
    """Run steps as `train` does: each is launched before the one before it is waited for.

    One more than is timed: launching waits for the device, and so the last one is nearly done when it is launched.
    """
    engine = open_engine("mlx", config, base, config.lora)
    import mlx.core as mx

    engine.load_state(TrainState.fresh(initial_weights(engine.adapter_shapes(), config.seed)))
    mx.clear_cache()
    mx.reset_peak_memory()
    plan = BatchPlan.of(data, config)
    ends = [time.perf_counter()]
    counts: list[tuple[int, int]] = []
    launched: Any = None
    for step in range(1, UNTIMED + steps + 2):
        batch = plan.step_batch(step)
        counts.append((batch.num_tokens, batch.num_loss_tokens))
        before, launched = launched, engine.train_step(batch, config.learning_rate)
        if before:
            engine.fetch(before)
            ends.append(time.perf_counter())
    engine.fetch(launched)
    return rates([end - begin for begin, end in itertools.pairwise(ends)], counts, steps)


def rates(seconds: list[float], counts: list[tuple[int, int]], steps: int) -> dict[str, float]:
    """Put together the seconds, tokens and supervised tokens of the steps that count."""
    seconds, counts = seconds[UNTIMED:], counts[UNTIMED : UNTIMED + steps]
    return {
        "step_seconds": statistics.median(seconds),
        "tokens_per_second": sum(tokens for tokens, _ in counts) / sum(seconds),
        "supervised_tokens_per_second": sum(supervised for _, supervised in counts) / sum(seconds),
    }


def theirs(base: Path, config: TrainConfig, data: TokenDataset, steps: int) -> dict[str, Any]:
    """Run mlx-lm's trainer and take the seconds of each step from its own report."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    model.set_dtype(mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32)
    if config.quantization.bits:
        nn.quantize(model, group_size=64, bits=config.quantization.bits)
    model.freeze()
    keys = {path for path, _ in model.layers[0].named_modules() if path.rsplit(".", 1)[-1] in LINEAR}
    lora = {"rank": config.lora.r, "scale": config.lora.lora_alpha / config.lora.r, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), lora)
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds: list[float] = []
    counts: list[tuple[int, int]] = []  # tokens, supervised ones

    class Watch(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            seconds.append(1 / train_info["iterations_per_second"])

    def batches(*args: Any, **kwargs: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for batch, spans in trainer.iterate_batches(*args, **kwargs):
            first, last = np.array(spans).T
            width = batch.shape[1] - 1
            last = np.minimum(last, width)
            counts.append((int(last.sum()), int((last - np.maximum(first, 1) + 1).sum())))
            yield batch, spans

    plan, each = BatchPlan.of(data, config), np.mean([data.mask(number).sum() for number in range(len(data))])
    rows = round(np.mean([plan.step_batch(step).num_loss_tokens for step in range(1, 1 + steps)]) / each)
    examples = [(data.tokens(each).tolist(), int(data.mask(each).argmax())) for each in range(len(data))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.TrainingArgs(
            batch_size=rows,
            iters=UNTIMED + steps,
            steps_per_report=1,
            max_seq_length=config.max_seq_length + 1,
            adapter_file=f"{folder}/adapters.safetensors",
            grad_checkpoint=config.gradient_checkpointing,
        )
        optimizer = optimizers.AdamW(learning_rate=config.learning_rate)
        trainer.train(model, optimizer, examples, args=arguments, iterate_batches=batches, training_callback=Watch())
    return rates(seconds, counts, steps)


if __name__ == "__main__":
    main()
