"""The config's `evaluation` group: what `twintune evaluate` measures and shows."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from common.config.group import Count, Group, as_texts


def known_metric(value: str) -> str:
    """Accept the names of the metrics that `evaluate` can compute."""
    if value in ("valid_json", "exact_match") or re.fullmatch(r"json_field:.+", value):
        return value
    raise ValueError("expected valid_json, exact_match or json_field:<name>, e.g. json_field:intent")


class EvaluationConfig(Group):
    """Say what `twintune evaluate` measures and shows."""

    metrics: Annotated[tuple[Annotated[str, AfterValidator(known_metric)], ...], BeforeValidator(as_texts)] = ()
    """Beyond loss: valid_json, exact_match, json_field:<name> (the share of answers whose field is right)."""

    samples: Annotated[int, Field(ge=0)] = 5
    """Held-out examples to show with the model's answers."""

    max_new_tokens: Count = 128
    """Longest answer to generate, in tokens."""

    batch_size: Count = 32
    """Answers generated at a time."""
