"""What architectures do to their logits after the output head, by the names that transformers gives the numbers.

Both engines leave the head out of the forward pass where they can compute its loss in chunks; whether one of these is
all that follows the head they measure, on a few tokens, before they rely on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROBED_TOKENS = 8
TILE = 128  # rows of a tile of a card's matrix products: for 261 rows they compute 384
SOFT_CAPS, FACTORS, DIVISORS = ("final_logit_softcapping",), ("logit_scale",), ("logits_scaling",)


@dataclass(frozen=True)
class AfterHead:
    """Say that logits are `soft_cap * tanh(factor * z / soft_cap)` of the head's output z, or `factor * z`."""

    factor: float = 1.0
    soft_cap: float | None = None


def candidates(config: Mapping[str, Any]) -> list[AfterHead]:
    """List what a model's config suggests may follow its head, and that nothing does."""
    settings = {**config, **(config.get("text_config") or {})}
    capped = [AfterHead(soft_cap=settings[name]) for name in SOFT_CAPS if settings.get(name)]
    scaled = [AfterHead(factor=settings[name]) for name in FACTORS if settings.get(name)]
    divided = [AfterHead(factor=1 / settings[name]) for name in DIVISORS if settings.get(name)]
    return [*capped, *scaled, *divided, AfterHead()]


def chunk_rows(vocabulary: int, chunk_bytes: int, bytes_each: int = 4) -> int:
    """Return how many rows of logits fill a chunk, in whole tiles where it holds as many."""
    rows = max(1, chunk_bytes // (bytes_each * vocabulary))
    return rows - rows % TILE if rows > TILE else rows


def agrees(largest_difference: float, largest_logit: float, dtype: str) -> bool:
    """Tell whether logits that a candidate gives are the model's.

    Half precision rounds between the head and what follows it; a factor that was forgotten is off by far more.
    """
    return largest_difference <= (1e-4 if dtype == "float32" else 2e-2) * largest_logit
