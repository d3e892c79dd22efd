"""The config's `lora` group: the adapter, in PEFT's names."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.config.group import Count, Fraction, Group, Name, as_texts


def as_modules(value: Any) -> str | tuple[str, ...]:
    """Check a regular expression, or turn a list of module names into a tuple."""
    if not isinstance(value, str):
        names = as_texts(value)
        if not names:
            raise ValueError("expected at least one name, e.g. [q_proj, v_proj]")
        return names
    if not value:
        raise ValueError("expected all-linear, a regular expression, or a list of names such as [q_proj]")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error}); write all-linear or a list of names") from None
    return value


def as_layers(value: Any) -> Any:
    """Turn one layer number or a list of them into a tuple; pydantic checks the numbers."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def check_patterns(value: dict[str, Any]) -> dict[str, Any]:
    """Accept names that are regular expressions."""
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error}); write e.g. down_proj: 8") from None
    return value


def known_initialisation(value: bool | str) -> bool | str:
    """Accept the starting points of an adapter that need neither data nor another base."""
    if value in (True, "gaussian", "pissa", "olora") or re.fullmatch(r"pissa_niter_\d+", str(value)):
        return value
    if value == "loftq":
        raise ValueError("LoftQ needs a base that is quantised anew around the adapter, so none is exact; write pissa")
    raise ValueError("expected true, gaussian, pissa, pissa_niter_<n> or olora")


Alpha = Annotated[int, Field(ge=1, le=10**9)] | Annotated[float, Field(gt=0, le=1e9)]
Modules = Annotated[str | tuple[str, ...], BeforeValidator(as_modules)]


class LoraConfig(Group):
    """Describe the adapter, in PEFT's names."""

    r: Count = 16
    """Rank: the width of the adapter."""

    lora_alpha: Alpha = 32
    """Numerator of the scale alpha / r (alpha / sqrt(r) with `use_rslora`)."""

    lora_dropout: Fraction = 0.0
    """Share of the adapter's inputs set to zero while training."""

    target_modules: Modules = "all-linear"
    """Which modules get an adapter: all-linear, a regular expression on full names, a list of last names."""

    target_parameters: Annotated[tuple[Name, ...], BeforeValidator(as_texts)] | None = Field(
        default=None, examples=[["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]]
    )
    """Stacks of experts to adapt besides, by the end of their names in transformers' model; every expert gets `r`."""

    exclude_modules: Modules | None = None
    """Modules to leave out of those, as a regular expression or a list of last names."""

    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_layers)] | None = Field(
        default=None, examples=[[0, 1]]
    )
    """Layer number or numbers, from 0, to adapt; null for all."""

    rank_pattern: Annotated[dict[Name, Count], AfterValidator(check_patterns)] = Field(
        default={}, examples=[{"down_proj": 8}]
    )
    """Other ranks for modules whose name ends with a regular expression; the first that matches counts."""

    alpha_pattern: Annotated[dict[Name, Alpha], AfterValidator(check_patterns)] = Field(
        default={}, examples=[{"down_proj": 16}]
    )
    """Other alphas likewise."""

    modules_to_save: Annotated[tuple[Name, ...], BeforeValidator(as_texts)] | None = Field(
        default=None, examples=[["embed_tokens", "lm_head"]]
    )
    """Modules to train whole instead, by last name: embeddings and head for new tokens, norms."""

    init_lora_weights: Annotated[bool | Name, AfterValidator(known_initialisation)] = True
    """Where the adapter starts: true (A as a linear layer, B zero), gaussian, pissa, pissa_niter_4, olora."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks stable (arXiv:2312.03732)."""

    use_dora: bool = False
    """Learn magnitude and direction of each row apart (arXiv:2402.09353)."""

    bias: Literal["none"] = "none"
    """Which biases are trained."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """What the model does."""
