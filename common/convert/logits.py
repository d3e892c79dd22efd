"""The logits of a short text, computed from the source and from what was written, by an engine that loads both.

On the CPU, in float32 where that fits: a difference is then the formats' alone. The two are never loaded at a time.
Floats and MLX's 8 bits are judged by it. What fewer bits change, or LLM.int8, which rounds activations too, has no
bound worth the name; the figures say what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.base.quantized import BITSANDBYTES_8BIT, MLX, stored_format
from common.base.weights import read_model_config, vocabulary_size
from common.config import TrainConfig
from common.convert.from_mlx import SAME_LAYOUT
from common.convert.source import FolderSource, Source
from common.convert.target import Target
from common.engine import Array, choose_engine, device_memory, installed, open_engine
from common.errors import UserError
from common.export.proof import NOISE
from common.export.proof import ROUNDING as EXPORTED

PROMPT = "Water boils at 100 degrees Celsius at sea level. On a mountain it boils sooner, because the air is thinner."
TOKENS = 32  # at most
# Shares of the largest logit that rounding may change, as common/export/proof.py has them.
ROUNDING = {stored: EXPORTED[stored] for stored in (*NOISE, "8 bits")}


@dataclass(frozen=True)
class LogitsCheck:
    """Report logits beside those of the source: differences, and what they mean for the next token."""

    engine: str
    difference: float
    tolerance: float | None  # None: what such a format changes is not judged
    largest: float
    divergence: float  # mean over the positions of KL(source, written), in nats
    agreeing: int  # positions whose likeliest next token is the same
    positions: int

    def __str__(self) -> str:
        allowed = "" if self.tolerance is None else f" (allowed: {self.tolerance:.2g})"
        return (
            f"{self.engine} computes logits (up to {self.largest:.3g}) that differ by at most {self.difference:.2g}"
            f"{allowed}, {self.divergence:.2g} nats apart; the likeliest next token is the same at "
            f"{self.agreeing} of {self.positions} positions"
        )


def chosen_engine(source: Source, target: Target) -> str | None:
    """Name the engine here that loads both, None where there is none."""
    engines = _readers_of_source(source) & _readers_of_target(target)
    here = [name for name in ("mlx", "torch") if name in engines and installed(name)]
    if len(here) == 2:
        return choose_engine("auto")
    return here[0] if here else None


def affordable_dtype(source: Source, engine: str) -> str | None:
    """Return the dtype in which the source fits into free memory, None where none does."""
    numbers = sum(map(math.prod, source.shapes.values()))
    free = device_memory(engine, "cpu").free_bytes
    return next((dtype for dtype, size in (("float32", 4), ("bfloat16", 2)) if numbers * size * 1.2 < free), None)


def compare_logits(expected: Array, found: Array, engine: str, dtype: str, stored: str | None) -> LogitsCheck:
    """Hold logits (1, T, V) against those of the source; `stored` names what weights were rounded to, if they were.

    Raises UserError where they differ by more than that.
    """
    largest, difference = float(np.abs(expected).max()), float(np.abs(found - expected).max())
    rounding = ROUNDING.get(stored) if stored else 0.0
    check = LogitsCheck(
        engine=f"the {engine} engine",
        difference=difference,
        tolerance=None if rounding is None else (NOISE[dtype] + rounding) * largest,
        largest=largest,
        divergence=max(0.0, _divergence(expected, found)),
        agreeing=int((expected.argmax(-1) == found.argmax(-1)).sum()),
        positions=expected.shape[1],
    )
    if not difference <= (np.finfo(np.float32).max if check.tolerance is None else check.tolerance):  # NaN is not
        raise UserError(f"what was written computes something else than the source: {check}")
    return check


def prompt_tokens(folder: Path) -> Array:
    """Return the prompt's tokens (1, T), or others where the model has no tokenizer.json or knows fewer tokens.

    Raises UserError where the config doesn't say how many it knows.
    """
    size, path = vocabulary_size(folder), folder / "tokenizer.json"
    if size is None:
        raise UserError(f"{folder / 'config.json'}: names no vocab_size")
    ids = Tokenizer.from_file(str(path)).encode(PROMPT).ids[:TOKENS] if path.is_file() else []
    if not ids or max(ids) >= size:
        ids = list(np.random.default_rng(0).integers(0, size, TOKENS))
    return np.array([ids], np.int32)


def logits_of(path: Path, engine: str, dtype: str, token_ids: Array) -> Array:
    """Compute the logits (1, T, V) of a folder's model on the CPU."""
    settings = {"engine": engine, "device": "cpu", "dtype": dtype, "max_seq_length": TOKENS}
    config = TrainConfig.from_dict(settings, "convert")
    with closing(open_engine(engine, config, path, None)) as opened:
        return opened.logits(token_ids)


def _readers_of_source(source: Source) -> set[str]:
    if not source.path.is_dir():
        return set()  # none loads a GGUF
    return _readers(read_model_config(source.path), isinstance(source, FolderSource) and source.is_mlx)


def _readers_of_target(target: Target) -> set[str]:
    return {"mlx"} if target.layout == "mlx" else _readers(target.config, False)


def _readers(config: Mapping[str, Any], is_mlx: bool) -> set[str]:
    """Name the engines that load a folder of a config, of mlx-lm's names or not."""
    stored = stored_format(config)
    if stored == MLX or (is_mlx and config["model_type"] not in SAME_LAYOUT):
        return {"mlx"}
    return {"torch"} if stored == BITSANDBYTES_8BIT else {"mlx", "torch"}


def _divergence(before: Array, after: Array) -> float:
    first, second = _log_softmax(before), _log_softmax(after)
    return float((np.exp(first) * (first - second)).sum(-1).mean())


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
