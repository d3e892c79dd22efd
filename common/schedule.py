"""The learning rate at every step: one pure function, so that both engines and every resume agree."""

import math


def warmup_step_count(total_steps: int, warmup_steps: int, warmup_ratio: float) -> int:
    """Return the steps of linear warmup: `warmup_steps`, or `warmup_ratio` of all steps rounded up."""
    return warmup_steps or math.ceil(total_steps * warmup_ratio)


def learning_rate_at(step: int, total_steps: int, peak: float, kind: str, warmup: int) -> float:
    """Return the learning rate of a step.

    `step` counts updates already done (0 for the first), as in transformers' `get_*_schedule`: constant, linear
    and cosine decay to 0 at `total_steps`, after a linear rise from 0 over `warmup` steps.
    """
    if step < warmup:
        return peak * step / warmup
    if kind in ("constant", "constant_with_warmup"):
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    if kind == "linear":
        return peak * max(0.0, 1.0 - progress)
    if kind == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    raise AssertionError(f"unknown lr_scheduler_type {kind}; the config should have refused it")
