"""What can be told of an adapter without its model: whether it is whole, finite, and of the rank it says.

PEFT loads a broken adapter with a warning at most. These checks come before a base is loaded, so that they cost
seconds; whether the adapter fits a model is for `adapter.check_adapter`, once there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.engine import Array
from common.errors import UserError
from common.lora import PREFIX, lora_a_key, lora_b_key, module_of_key, saved_key

BASE_COPY = ".base_layer.weight"
# A copy was saved in the trainer's dtype, bfloat16 at worst: 8 bits of mantissa.
COPY_TOLERANCE = 2.0**-7


def check_whole(weights: Mapping[str, Array], config: Mapping[str, Any], source: Path) -> None:
    """Raise UserError where a module lacks one of its matrices, a rank is not the config's, or a value is no number."""
    modules = adapted_modules(weights)
    if not modules:
        raise UserError(
            f"{source}: holds no LoRA weights; expected names such as {lora_a_key('model.layers.0.self_attn.q_proj')}"
        )
    for module in modules:
        _check_pair(module, weights, config, source)
    for key, value in weights.items():
        if not np.isfinite(value).all():
            raise UserError(
                f"{source}: {key} holds NaN or infinity; this adapter is broken, take an earlier one or train it again"
            )


def adapted_modules(weights: Mapping[str, Array]) -> list[str]:
    """List the modules that have an A or a B, sorted."""
    return sorted({module_of_key(key) for key in weights if ".lora_A." in key or ".lora_B." in key})


def deduced_rank(weights: Mapping[str, Array], source: Path) -> int:
    """Return the rank that every A (r, in) and B (out, r) has; raises UserError where they differ or there is none."""
    ranks = {value.shape[0] for key, value in weights.items() if ".lora_A." in key and value.ndim == 2}
    ranks |= {value.shape[1] for key, value in weights.items() if ".lora_B." in key and value.ndim == 2}
    if len(ranks) != 1:
        found = f"its weights have ranks {', '.join(map(str, sorted(ranks)))}" if ranks else "it has no LoRA weights"
        raise UserError(f"{source}: names no rank, and {found}; add the rank that the adapter was trained with")
    return int(ranks.pop())


def without_base_copies(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Return the weights without copies of the base's own, which PEFT saves where a head is targeted."""
    return {key: value for key, value in weights.items() if not key.endswith(BASE_COPY)}


def check_base_copies(weights: Mapping[str, Array], base_weight: Callable[[str], Array], source: Path) -> None:
    """Raise UserError where such a copy is not the base's weight: then the base was trained too, or is another.

    `base_weight` is that of an engine which has all modules that the weights adapt.
    """
    for key in sorted(weights.keys() - without_base_copies(weights).keys()):
        module = key.removeprefix(PREFIX).removesuffix(BASE_COPY)
        if lora_a_key(module) not in weights and saved_key(module) not in weights:
            raise UserError(f"{source}: holds a copy of the base's {module} but no adapter of it; save it again")
        ours, theirs = base_weight(module), weights[key]
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > COPY_TOLERANCE * np.abs(ours).max():
            raise UserError(
                f"{source}: {key} is not the weight {ours.shape} of this base; was it trained on another base, or on "
                "one with more tokens? Name that base"
            )


def _check_pair(module: str, weights: Mapping[str, Array], config: Mapping[str, Any], source: Path) -> None:
    a, b = weights.get(lora_a_key(module)), weights.get(lora_b_key(module))
    if a is None or b is None:
        lacking = lora_b_key(module) if b is None else lora_a_key(module)
        raise UserError(f"{source}: lacks {lacking}; the file is incomplete, copy or save the adapter again")
    for key, value, form in ((lora_a_key(module), a, "(r, in)"), (lora_b_key(module), b, "(out, r)")):
        if value.ndim != 2 or 0 in value.shape:
            raise UserError(
                f"{source}: {key} has shape {value.shape}; expected {form}; was it saved from a sharded model "
                "(DeepSpeed ZeRO-3, FSDP) without gathering its parts?"
            )
    if a.shape[0] != b.shape[1]:
        raise UserError(
            f"{source}: {lora_a_key(module)} has shape {a.shape} and its B {b.shape}: ranks {a.shape[0]} and "
            f"{b.shape[1]}; expected the same, A (r, in) and B (out, r)"
        )
    by_itself = config.get("rank_pattern") or config.get("target_parameters")  # of such the model alone tells the rank
    if not by_itself and a.shape[0] != config["r"]:
        raise UserError(
            f"{source}: {lora_a_key(module)} has rank {a.shape[0]}, but the config says {config['r']!r:.20}; "
            "bring the config that belongs to these weights"
        )
