"""Which modules carry an adapter, what their tensors are called, and by what they are scaled.

Both engines ask here, so that one config means the same modules on either. Matching follows PEFT
(`peft.tuners.tuners_utils.check_target_module_exists`, `peft.utils.other.get_pattern_key`), which the tests use as
oracle; unlike PEFT, a name that matches nothing is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError

if TYPE_CHECKING:
    from common.config import LoraConfig
    from common.engine import Array
    from common.flat import FlatLayout

PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
HEAD = "lm_head"
MAGNITUDE = "lora_magnitude_vector"
# Modules that read what the module above them is called with, so that their adapters can share the reading.
READ_THE_INPUT = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    *("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's attention
    *("in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_ba"),  # Qwen's linear attention
)


def lora_a_key(module: str) -> str:
    """Name the (r, in) tensor of a module as PEFT stores it."""
    return f"{PREFIX}{module}.lora_A.weight"


def lora_b_key(module: str) -> str:
    """Name the (out, r) tensor of a module as PEFT stores it."""
    return f"{PREFIX}{module}.lora_B.weight"


def magnitude_key(module: str) -> str:
    """Name the (out,) tensor that DoRA adds to a module as PEFT stores it."""
    return f"{PREFIX}{module}.{MAGNITUDE}"


def saved_key(module: str) -> str:
    """Name the weight of a module that is trained whole as PEFT stores it."""
    return f"{PREFIX}{module}.weight"


def module_of_key(key: str) -> str:
    """Return the module that an adapter key belongs to."""
    return re.sub(r"(\.lora_.*|\.weight)$", "", key.removeprefix(PREFIX))


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module lies in, None for one outside all layers."""
    found = re.search(r"\.(\d+)\.", module)
    return int(found[1]) if found else None


def module_rank(module: str, lora: LoraConfig) -> int:
    """Return the rank of a module's adapter: that of the first pattern which matches its name, else `r`."""
    return lora.rank_pattern.get(_pattern(module, lora.rank_pattern), lora.r)


def module_scaling(module: str, lora: LoraConfig) -> float:
    """Return the factor on a module's B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    rank = module_rank(module, lora)
    alpha = lora.alpha_pattern.get(_pattern(module, lora.alpha_pattern), lora.lora_alpha)
    return alpha / (math.sqrt(rank) if lora.use_rslora else rank)


def num_trainable(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the weights of an adapter."""
    return sum(math.prod(shape) for shape in shapes.values())


def as_stored(lora: LoraConfig) -> LoraConfig:
    """Return the plain LoRA that an adapter is in memory and in files.

    PiSSA and OLoRA start from a part of the base, B0 A0, and train B A - B0 A0. As one product that is [B, B0] and
    [A; -A0], of twice the rank and alpha: no base is ever changed, and every reader of LoRA reads it.
    """
    if not keeps_start(lora):
        return lora.model_copy(update={"init_lora_weights": True})
    grown = math.sqrt(2) if lora.use_rslora else 2
    return lora.model_copy(
        update={
            "r": 2 * lora.r,
            "lora_alpha": grown * lora.lora_alpha,
            "rank_pattern": {name: 2 * rank for name, rank in lora.rank_pattern.items()},
            "alpha_pattern": {name: grown * alpha for name, alpha in lora.alpha_pattern.items()},
            "init_lora_weights": True,
        }
    )


def keeps_start(lora: LoraConfig) -> bool:
    """Tell whether the second half of every A and B is the start that training is relative to, and stays."""
    return lora.init_lora_weights not in (True, "gaussian")


def trainable_entries(layout: FlatLayout, lora: LoraConfig) -> Array | None:
    """Return 1.0 where an entry of the flat adapter is trained and 0.0 where it stays; None where all are."""
    if not keeps_start(lora):
        return None
    mask = np.ones(layout.size, np.float32)
    for key, value in layout.unflatten(mask).items():
        if ".lora_A." in key:
            value[len(value) // 2 :] = 0
        elif ".lora_B." in key:
            value[:, value.shape[1] // 2 :] = 0
    return mask


def select_modules(
    linear: Sequence[str], head: str | None, lora: LoraConfig, parameters: Sequence[str] = ()
) -> list[str]:
    """Return the linear modules that the config targets, in model order.

    `linear` names every linear module of the model, `head` the output head, which `all-linear` leaves out, and
    `parameters` the stacks of experts that are adapted too, for which a pattern of ranks may be meant.
    Raises UserError where nothing matches, or one of several names, with what there is to choose from.
    """
    wanted = [name for name in linear if not lora.modules_to_save or not _matches(name, lora.modules_to_save, None)]
    chosen = [
        name
        for name in wanted
        if _targeted(name, lora.target_modules, lora.layers_to_transform, head)
        and not (lora.exclude_modules and _matches(name, lora.exclude_modules, None))
    ]
    if not chosen:
        raise _unmatched(lora.target_modules, linear)
    if not isinstance(lora.target_modules, str):
        for name in lora.target_modules:
            if not any(_matches(each, (name,), None) for each in linear):
                raise _unmatched(name, linear)
    _refuse_idle_patterns([*chosen, *parameters], lora)
    return chosen


def select_saved(modules: Sequence[str], tied_embedding: str | None, lora: LoraConfig) -> list[str]:
    """Return the modules that the config wants trained whole, in model order.

    `modules` names those that have a weight. Where embedding and head are one matrix, `tied_embedding`, either name
    means that. Raises UserError for a name that matches nothing.
    """
    chosen = set()
    for name in lora.modules_to_save or ():
        means = tied_embedding if tied_embedding and name == HEAD else name
        matching = [module for module in modules if _matches(module, (means,), None)]
        if not matching:
            raise UserError(
                f"lora.modules_to_save: {name!r} matches no module with a weight of its own; "
                f"choose among: {', '.join(_suffixes(modules))}"
            )
        chosen.update(matching)
    return [module for module in modules if module in chosen]


def select_parameters(parameters: Sequence[str], lora: LoraConfig) -> dict[str, str]:
    """Return the stacks of experts that the config targets: the name of each, and the module its adapter is filed as.

    `parameters` names all there are, in model order. PEFT wraps the module that holds several as often as it has
    adapted stacks, so that all but the last are filed under `base_layer`. Raises UserError for a name without a match.
    """
    for name in lora.target_parameters or ():
        if not any(_matches(each, (name,), None) for each in parameters):
            there = ", ".join(sorted({".".join(each.split(".")[-3:]) for each in parameters}))
            raise UserError(
                f"lora.target_parameters: {name!r} matches no stack of experts of this model; "
                + (f"choose among: {there}" if there else "it has none: delete the key")
            )
    chosen = [each for each in parameters if _matches(each, lora.target_parameters or (), None)]
    holders = [each.rpartition(".")[0] for each in chosen]
    return {
        each: holder + ".base_layer" * holders[place + 1 :].count(holder)
        for place, (each, holder) in enumerate(zip(chosen, holders, strict=True))
    }


def not_trainable_whole(module: str, quantised: bool) -> UserError:
    """Return the error for a module of `modules_to_save` that is quantised, or has more than a weight."""
    what = "is quantised, and can't be" if quantised else "has a bias, which can't be"
    return UserError(f"lora.modules_to_save: {module} {what} trained whole; target it with lora.target_modules")


def portable_target_modules(chosen: Sequence[str], linear: Sequence[str], lora: LoraConfig) -> list[str]:
    """Return the shortest `target_modules` that mean exactly `chosen` to a PEFT reader.

    Last names (`q_proj`) where they select the same modules, which every reader understands; else full paths.
    """
    names = _suffixes(chosen)
    selected = [name for name in linear if _targeted(name, names, lora.layers_to_transform, None)]
    return names if selected == list(chosen) else sorted(chosen)


def seed_of(name: str) -> int:
    """Return 64 bits that belong to a name, for generators which must not depend on the order of calls."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _targeted(name: str, pattern: str | Sequence[str], layers: int | Sequence[int] | None, head: str | None) -> bool:
    if not isinstance(pattern, str) and name in pattern:
        return True  # a full name is meant whatever the layers, such as lm_head
    return _matches(name, pattern, head) and _layer_wanted(name, layers)


def _matches(name: str, pattern: str | Sequence[str], head: str | None) -> bool:
    if pattern == ALL_LINEAR:
        return name != head
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in pattern)


def _pattern(module: str, patterns: Mapping[str, float]) -> str:
    return next((each for each in patterns if re.match(rf"(.*\.)?({each})$", module)), "")


def _refuse_idle_patterns(chosen: Sequence[str], lora: LoraConfig) -> None:
    for option, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        used = {_pattern(module, patterns) for module in chosen}
        idle = [each for each in patterns if each not in used]
        if idle:
            raise UserError(
                f"lora.{option}: {idle[0]!r} is the pattern of no targeted module, or an earlier one takes them all; "
                f"expected the end of a name such as {_suffixes(chosen)[0]}"
            )


def _unmatched(pattern: str | Sequence[str], linear: Sequence[str]) -> UserError:
    is_vocabulary = pattern in ("embed_tokens", HEAD)
    whole = f"; to train {pattern} whole, write modules_to_save: [{pattern}]" if is_vocabulary else ""
    return UserError(
        f"lora.target_modules: {pattern!r} matches no linear module of this model; "
        f"choose among: {', '.join(_suffixes(linear))}, or {ALL_LINEAR}{whole}"
    )


def _layer_wanted(name: str, layers: int | Sequence[int] | None) -> bool:
    if layers is None:
        return True
    return layer_of(name) in ([layers] if isinstance(layers, int) else layers)


def _suffixes(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})
