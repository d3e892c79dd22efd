"""The config's `data` group: which files hold the examples, and how an example becomes tokens."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.config.group import Group, Name, NonNegative, Positive, Texts


def as_sources(value: Any) -> tuple[Any, ...]:
    """Turn one path or `{path, weight}`, or a list of these, into a tuple; a weight of 1 needs no group."""
    items = value if isinstance(value, list | tuple) else (value,)
    if not all(_is_source(item) for item in items):
        raise ValueError("expected text or a list of texts, or of groups such as {path: a.jsonl, weight: 2}")
    return tuple(item["path"] if isinstance(item, dict) and item.get("weight", 1) == 1 else item for item in items)


def _is_source(item: Any) -> bool:
    if not isinstance(item, dict):
        return isinstance(item, str) and bool(item)
    path, weight = item.get("path"), item.get("weight", 1)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
    return set(item) <= {"path", "weight"} and isinstance(path, str) and bool(path) and is_number


def check_split(value: float) -> float:
    """Accept a share below 1, or a whole number of examples."""
    if value > 1 and value != int(value):
        raise ValueError("expected a share below 1, e.g. 0.05, or a whole number of examples, e.g. 200")
    return value


_FIELDS = (
    *("messages", "conversations", "system", "tools", "prompt", "completion", "text"),
    *("instruction", "input", "output", "history", "input_ids", "labels", "attention_mask"),
)


def check_columns(value: dict[str, str]) -> dict[str, str]:
    """Accept names for the fields that an example can have, and no others."""
    *others, last = _FIELDS
    if not set(value) <= set(_FIELDS):
        raise ValueError(f"expected names for {', '.join(others)} or {last}, e.g. {{prompt: question}}")
    return value


class WeightedPath(Group):
    """Name a source of training examples that counts more or less than once."""

    path: Name
    weight: Positive = 1.0

    def __str__(self) -> str:
        return f"{self.path} (weight {self.weight:g})"


class DataConfig(Group):
    """Say which files hold the examples and how an example becomes tokens."""

    train: Annotated[tuple[Name | WeightedPath, ...], BeforeValidator(as_sources)] = ()
    """Path or list of paths of the training examples; README.md, "Data", lists the kinds.

    `{path: a.jsonl, weight: 2}` shows each example twice an epoch, 0.5 a seeded half of them once.
    """

    validation: Texts = ()
    """Path or list of paths for the loss during training."""

    validation_split: Annotated[NonNegative, AfterValidator(check_split)] = 0.0
    """Hold out training examples as validation: a share below 1 of them, or a whole number of examples."""

    test: Texts = ()
    """Path or list of paths for `twintune evaluate`."""

    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized"] = "auto"
    """What a record holds, as README.md, "Data", shows; auto looks at the fields of each."""

    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens count in the loss: every assistant turn, the last one only, or everything."""

    truncation: Literal["truncate", "error", "drop", "split"] = "truncate"
    """What happens to an example longer than `max_seq_length`."""

    on_error: Literal["stop", "skip"] = "stop"
    """Whether unusable lines end the run or are left out and counted."""

    columns: Annotated[dict[str, Name], AfterValidator(check_columns)] = Field(
        default={}, examples=[{"prompt": "question"}]
    )
    """Your own names of the fields, e.g. `{prompt: question, completion: answer}`."""
