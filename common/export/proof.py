"""The proof of an export: the logits that an engine computes from it, beside those of the adapter itself.

The tolerance has two sources and no third. Noise: the engine adds the same numbers in another order, which costs a
share of the largest logit. Rounding: what is stored in fewer bits is off by up to half a unit in the last place;
for an adapter that is a share of what the adapter changes, for merged weights of everything. Random tokens make
harder inputs than text does, and they need no tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.engine import Array, Engine, TrainState
from common.errors import UserError
from common.export.adapter import Adapter, Part, to_tensors

ROWS, TOKENS = 2, 24
# Shares of the largest logit. Measured on SmolLM2-135M, merged against not merged: 3e-7, 0.006, 0.09.
NOISE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2.5e-1}
# Shares of what is rounded: some ten units in the last place, as roundings pile up through the layers. In few bits it
# is a sanity bound: whether the export is nearer to the adapter than to its base is what is left to prove.
ROUNDING = {"float32": 0.0, "float16": 1e-2, "bfloat16": 8e-2, "q8_0": 8e-2}
ROUNDING |= {"8 bits": 0.25, "6 bits": 0.5, "5 bits": 0.75, "4 bits": 1.0}


@dataclass(frozen=True)
class Reference:
    """Hold what the adapter computes on an engine: tokens (B, T), logits (B, T, V), and those of the base alone."""

    token_ids: Array
    logits: Array
    base_logits: Array
    dtype: str  # the engine computes in

    @property
    def largest(self) -> float:
        """Give the largest logit."""
        return float(np.abs(self.logits).max())

    @property
    def effect(self) -> float:
        """Give the most that the adapter moves a logit."""
        return float(np.abs(self.logits - self.base_logits).max())


@dataclass(frozen=True)
class Proof:
    """Report a comparison that held; `share` is the root mean square of the difference over that of the effect."""

    difference: float
    tolerance: float
    largest: float
    effect: float
    share: float
    reason: str

    def __str__(self) -> str:
        return (
            f"read back, its logits (up to {self.largest:.3g}) differ from the adapter's by at most "
            f"{self.difference:.2g}, where the adapter moves them by up to {self.effect:.3g}; allowed: "
            f"{self.tolerance:.2g}, {self.reason}"
        )

    def figures(self) -> dict[str, float | str]:
        """Return the comparison as JSON's types."""
        return {
            "largest_difference": self.difference,
            "tolerance": self.tolerance,
            "largest_logit": self.largest,
            "adapter_effect": self.effect,
            "share_of_effect": self.share,
            "tolerance_reason": self.reason,
        }


def take_reference(engine: Engine, adapter: Adapter, vocabulary: int) -> Reference:
    """Compute the logits of an adapter, and of the base without it, on an engine that was opened with it."""
    token_ids = np.random.default_rng(0).integers(0, vocabulary, (ROWS, TOKENS)).astype(np.int32)
    engine.load_state(TrainState.fresh(to_tensors(without_effect(adapter, engine))))
    base = engine.logits(token_ids)
    engine.load_state(TrainState.fresh(to_tensors(adapter)))
    return Reference(token_ids, engine.logits(token_ids), base, engine.dtype)


def without_effect(adapter: Adapter, engine: Engine) -> Adapter:
    """Return an adapter of the same shapes that leaves the base as it is."""
    parts = {module: _neutral(part, engine, module) for module, part in adapter.parts.items()}
    return Adapter(adapter.lora, parts, {module: engine.base_weight(module) for module in adapter.saved})


def prove(reference: Reference, logits: Array, stored: str, what: Literal["adapter", "weights"]) -> Proof:
    """Hold logits computed from an export, stored in a dtype, against the adapter's.

    Raises UserError where they differ by more than the tolerance, or where rounding left the base without the adapter.
    """
    difference = float(np.abs(logits - reference.logits).max())
    rounded, of = (reference.effect, "the adapter's effect") if what == "adapter" else (reference.largest, "the logits")
    if stored.endswith("bits"):
        rounded = reference.largest + reference.effect
    tolerance = NOISE[reference.dtype] * reference.largest + ROUNDING[stored] * rounded
    reason = f"{NOISE[reference.dtype]:.0e} of the logits for sums in {reference.dtype}"
    if reference.dtype != "float32":
        reason += " (--device cpu computes in float32)"
    if ROUNDING[stored]:
        reason += f" and {ROUNDING[stored]:.0e} of {of} for {stored} on the disk"
    share = _root_mean_square(logits - reference.logits) / _root_mean_square(reference.logits - reference.base_logits)
    proof = Proof(difference, tolerance, reference.largest, reference.effect, float(share), reason)
    if not difference <= tolerance:  # NaN is not
        raise UserError(f"the export computes something else than the adapter, and was removed: {proof}")
    if share > 1 and _nearer_to_base(reference, logits):
        raise UserError(
            f"the export was removed: rounding to {stored} takes away what the adapter changes, and leaves the base "
            f"({proof}); write it with --dtype float32"
        )
    return proof


def _nearer_to_base(reference: Reference, logits: Array) -> bool:
    return _root_mean_square(logits - reference.base_logits) < _root_mean_square(logits - reference.logits)


def _root_mean_square(values: Array) -> np.floating:
    return np.sqrt(np.mean(np.square(values, dtype=np.float64)))


def _neutral(part: Part, engine: Engine, module: str) -> Part:
    magnitude = None if part.magnitude is None else np.linalg.norm(engine.base_weight(module), axis=1)
    return Part(part.a, np.zeros_like(part.b), part.scale, magnitude)
