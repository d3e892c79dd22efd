"""The config's `evaluation` group: what `twintune evaluate` measures and shows."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from common.config.group import Count, Group, as_texts


def known_metric(value: str) -> str:
    """Accept the names of the metrics that `evaluate` can compute."""
    kind, _, detail = value.partition(":")
    if value in ("valid_json", "exact_match", "json_fields") or (kind == "json_field" and detail):
        return value
    if kind == "regex" and detail:
        try:
            re.compile(detail)
        except re.error as error:
            raise ValueError(f"{detail!r} is no regular expression ({error}); write e.g. 'regex:#### (.+)'") from None
        return value
    if kind == "python" and re.fullmatch(r".+:[A-Za-z_]\w*", detail):
        return value
    raise ValueError(
        "expected valid_json, exact_match, json_fields, json_field:<name>, regex:<pattern>, "
        "python:<file.py>:<function> or python:<module>:<function>"
    )


class EvaluationConfig(Group):
    """Say what `twintune evaluate` measures and shows."""

    metrics: Annotated[tuple[Annotated[str, AfterValidator(known_metric)], ...], BeforeValidator(as_texts)] = ()
    """Beyond loss: valid_json, exact_match, json_fields, json_field:<name>, regex:<pattern>, python:<file>:<function>.

    README.md, "Scores", says what each means.
    """

    samples: Annotated[int, Field(ge=0)] = 5
    """Held-out examples to show with the model's answers."""

    max_new_tokens: Count = 128
    """Longest answer to generate, in tokens."""

    batch_size: Count = 32
    """Answers generated at a time."""
