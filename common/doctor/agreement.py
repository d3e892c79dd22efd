"""Whether both engines compute the same with a model: logits and a gradient of random tokens under a random adapter.

Both run on the CPU in float32, one after the other, on a shortened checkpoint (common/doctor/shorten.py): what differs
there is a matter of names, config and code, not of rounding. The cost: longer contexts than a few tokens are not tried.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from common.base.weights import read_header, vocabulary_size, weight_files
from common.config import LoraConfig, TrainConfig
from common.data.tokens import build_dataset
from common.doctor.finding import Finding
from common.doctor.shorten import write_shortened
from common.engine import EXTRAS, Array, StepBatch, TrainState, installed, open_engine
from common.errors import MachineError, TwintuneError
from common.initial import starting_weights
from common.layout import make_micro_batch

ENGINES = ("mlx", "torch")
ROWS, LENGTH = 8, 12
# Relative to the largest logit, and to the length of the gradient. Float32 rounding through 30 layers gives 1e-5; a
# wrong activation gives 4e-4, a wrong theta, scale or window 1e-2 and more.
LOGIT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
# Of the rows: two experts of a mixture may be equal but for rounding, and a token go to the one or the other.
ROWS_THAT_MUST_AGREE = 0.75
BYTES_A_WEIGHT = 6  # float32, and what it is read from


@dataclass(frozen=True)
class Observed:
    """Hold what one engine makes of a model."""

    shapes: dict[str, tuple[int, ...]]
    logits: Array  # (rows, length, vocabulary)
    gradient: dict[str, Array]


def examine_model(model: Path) -> Iterator[Finding]:
    """Open a model on both engines and say whether they agree on it.

    Raises MachineError where an engine or the memory is missing.
    """
    if missing := [name for name in ENGINES if not installed(name)]:
        raise MachineError(
            f"doctor --model compares both engines, and {missing[0]} is not installed; "
            f"pip install 'twintune[{EXTRAS[missing[0]]}]', here or on another machine"
        )
    with tempfile.TemporaryDirectory(prefix="twintune-") as folder:
        kept = write_shortened(model, Path(folder))
        _require_memory(Path(folder))
        yield Finding("ok", "compared", f"{kept}, in float32 on the CPU")
        observed = {}
        for name in ENGINES:
            try:
                observed[name] = observe(name, Path(folder))
            except TwintuneError as error:
                reason = str(error).replace(folder, str(model))
                yield Finding("wrong", name, reason, f"train it with --engine {'torch' if name == 'mlx' else 'mlx'}")
        if len(observed) == len(ENGINES):
            yield from compare(observed["mlx"], observed["torch"])


def observe(name: str, model: Path) -> Observed:
    """Compute the logits and the gradient of random tokens under a random adapter."""
    lora = LoraConfig(r=4, lora_alpha=8)
    config = TrainConfig(device="cpu", dtype="float32", max_grad_norm=0.0, max_seq_length=LENGTH, lora=lora)
    engine = open_engine(name, config, model, lora)
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, vocabulary_size(model) or 100, (ROWS, LENGTH)).astype(np.int32)
    weights = starting_weights(engine, lora, config.seed)
    for key in sorted(weights):
        if ".lora_B." in key:
            weights[key] = (rng.standard_normal(weights[key].shape) * 0.02).astype(np.float32)
    engine.load_state(TrainState.fresh(weights))
    logits = engine.logits(token_ids)
    engine.fetch(engine.train_step(_one_step(token_ids), 0.0))
    observed = Observed(dict(engine.adapter_shapes()), logits, engine.read_state().moment1)
    engine.close()
    return observed


def compare(mlx: Observed, torch: Observed) -> Iterator[Finding]:
    """Say whether modules, logits and gradients are the same, with the figures."""
    if mlx.shapes != torch.shapes:
        differing = sorted(set(mlx.shapes.items()) ^ set(torch.shapes.items()))
        found = f"all-linear means other modules on the other engine: {differing[0][0]} and {len(differing) - 1} more"
        yield Finding("wrong", "agreement", found, "name target_modules that both have, such as [q_proj, v_proj]")
        return
    rows = np.abs(mlx.logits - torch.logits).max(axis=(1, 2)) / np.abs(torch.logits).max()
    logits = float(np.quantile(rows, ROWS_THAT_MUST_AGREE, method="higher"))
    gradient = _distance(mlx.gradient, torch.gradient)
    alike = logits <= LOGIT_TOLERANCE and (gradient <= GRADIENT_TOLERANCE or rows.max() > LOGIT_TOLERANCE)
    found = f"logits differ by {logits:.0e} of the largest, gradients by {gradient:.0e} of their length"
    if alike:
        yield Finding("ok", "agreement", f"both engines compute the same with this model: {found}")
    else:
        fix = "train and use it on one engine only; torch is the one that has transformers' code"
        yield Finding("wrong", "agreement", f"the engines differ on this model: {found}", fix)


def _distance(found: dict[str, Array], expected: dict[str, Array]) -> float:
    squares = sum(float(np.square(found[key] - expected[key]).sum()) for key in expected)
    length = sum(float(np.square(each).sum()) for each in expected.values())
    return float(np.sqrt(squares / length)) if length else float("inf")


def _one_step(token_ids: Array) -> StepBatch:
    rows = [(row.tolist(), [place > 0 for place in range(len(row))], "made:1") for row in token_ids]
    micro = make_micro_batch(build_dataset(rows), [[row] for row in range(len(rows))])
    supervised = int(micro.loss_mask.sum())
    return StepBatch(1, 1.0, (micro,), supervised, token_ids.size, tuple(range(len(rows))))


def _require_memory(model: Path) -> None:
    entries = [entry for path in weight_files(model) for entry in read_header(path).values()]
    needed = BYTES_A_WEIGHT * sum(math.prod(entry["shape"]) for entry in entries)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MachineError(
            f"comparing the engines on this model takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "close other programs, or ask on a larger machine"
        )
