"""Which modules carry an adapter, what their tensors are called, and the values they start from.

Both engines ask here, so that one config means the same modules and bit-equal initial weights on either.
Matching follows PEFT (`peft.tuners.tuners_utils.check_target_module_exists`), which the tests use as oracle.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.engine import Array
from common.errors import UserError

if TYPE_CHECKING:
    from common.config import LoraConfig

PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"


def lora_a_key(module: str) -> str:
    """Name the (r, in) tensor of a module as PEFT stores it."""
    return f"{PREFIX}{module}.lora_A.weight"


def lora_b_key(module: str) -> str:
    """Name the (out, r) tensor of a module as PEFT stores it."""
    return f"{PREFIX}{module}.lora_B.weight"


def module_of_key(key: str) -> str:
    """Return the module that an adapter key belongs to."""
    return key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]


def scaling(lora: LoraConfig) -> float:
    """Return the factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    return lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


def select_modules(linear: Sequence[str], head: str | None, lora: LoraConfig) -> list[str]:
    """Return the linear modules that the config targets, in model order.

    `linear` names every linear module of the model, `head` the output head, which `all-linear` leaves out.
    Raises UserError where nothing matches, with what there is to choose from.
    """
    chosen = [
        name
        for name in linear
        if _targeted(name, lora.target_modules, lora.layers_to_transform, head)
        and not (lora.exclude_modules and _matches(name, lora.exclude_modules, None))
    ]
    if not chosen:
        raise UserError(
            f"lora.target_modules: {lora.target_modules!r} matches no linear module of this model; "
            f"choose among: {', '.join(_suffixes(linear))}, or {ALL_LINEAR}"
        )
    return chosen


def portable_target_modules(chosen: Sequence[str], linear: Sequence[str], lora: LoraConfig) -> list[str]:
    """Return the shortest `target_modules` that mean exactly `chosen` to a PEFT reader.

    Last names (`q_proj`) where they select the same modules, which every reader understands; else full paths.
    """
    names = _suffixes(chosen)
    selected = [name for name in linear if _targeted(name, names, lora.layers_to_transform, None)]
    return names if selected == list(chosen) else sorted(chosen)


def initial_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """Draw the starting adapter: A uniform within 1 / sqrt(in_features) as PEFT does, B zero.

    Each tensor has a generator of its own, seeded by (seed, key): the order of modules doesn't matter.
    """
    return {key: _initial_tensor(key, shape, seed) for key, shape in shapes.items()}


def seed_of(name: str) -> int:
    """Return 64 bits that belong to a name, for generators which must not depend on the order of calls."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _initial_tensor(key: str, shape: tuple[int, ...], seed: int) -> Array:
    if ".lora_B." in key:
        return np.zeros(shape, np.float32)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    draw = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))).random(shape, np.float32)
    return (draw * 2 - 1) * np.float32(1 / math.sqrt(shape[-1]))


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


def _layer_wanted(name: str, layers: int | Sequence[int] | None) -> bool:
    if layers is None:
        return True
    found = re.search(r"\.(\d+)\.", name)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _suffixes(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})
