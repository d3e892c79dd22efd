"""The best evaluation so far and how long ago it was: what early stopping and the choice of the weights to ship need.

Lower is better: the metric is the validation loss. As in transformers' EarlyStoppingCallback with a threshold of 0, any
improvement counts, an equal loss is none, and patience is counted in evaluations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """Hold the best metric, its step, and the evaluations since then that were no better."""

    metric: float | None = None
    step: int | None = None
    evaluations_since: int = 0

    def after(self, metric: float, step: int) -> Best:
        """Take in the evaluation of a step; one that is not finite is never the best."""
        if math.isfinite(metric) and (self.metric is None or metric < self.metric):
            return Best(metric, step)
        return replace(self, evaluations_since=self.evaluations_since + 1)

    def out_of_patience(self, patience: int | None) -> bool:
        """Tell whether `patience` evaluations in a row brought nothing better; None never ends."""
        return patience is not None and self.evaluations_since >= patience

    def __str__(self) -> str:
        if self.metric is None:
            return "no finite validation loss"
        return f"validation loss {self.metric:.4f} of step {self.step}"
