"""Other shapes of the same adapter: one alpha, one rank, all layers. None changes what the adapter computes.

Readers differ in what they read beside the matrices: many know no rsLoRA, no pattern of ranks or alphas, some drop
a module unless every layer has it. What they don't read goes into B, or becomes zeros that they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from common.engine import Engine
from common.errors import UserError
from common.export.adapter import Adapter, Part

LAYER = re.compile(r"(?P<stack>.*\blayers)\.(?P<number>\d+)\.(?P<module>.+)")


def one_alpha(adapter: Adapter) -> Adapter:
    """Return the adapter with one whole alpha, which is divided by the rank: no rsLoRA, no alpha_pattern.

    Where the factors ask for another alpha, or for a fraction, the ratio goes into B.
    """
    rank = common_rank(adapter)
    alpha = max(1, round(next(iter(adapter.parts.values())).scale * rank))
    parts = {module: part.with_scale(alpha / part.rank) for module, part in adapter.parts.items()}
    others = {module: part.rank for module, part in parts.items() if part.rank != rank}
    changes = {"r": rank, "lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": others}
    return replace(adapter, lora=adapter.lora.model_copy(update=changes), parts=parts)


def one_rank(adapter: Adapter, rank: int | None = None) -> Adapter:
    """Return the adapter with zeros up to one rank, the highest unless told, and one alpha."""
    rank = rank or max(adapter.ranks)
    parts = {module: part.with_rank(rank) for module, part in adapter.parts.items()}
    return one_alpha(replace(adapter, parts=parts))


def common_rank(adapter: Adapter) -> int:
    """Return the rank that most parts have, of several the highest: the `r` beside a pattern of others."""
    ranks = [part.rank for part in adapter.parts.values()]
    return max(adapter.ranks, key=lambda rank: (ranks.count(rank), rank))


def with_every_layer(adapter: Adapter, known: Iterable[str], engine: Engine) -> Adapter:
    """Return the adapter with parts of zeros wherever one layer has a module and another has not.

    `known` names the modules of the base: what a layer doesn't have needs no zeros.
    """
    names = {match["module"] for module in adapter.parts if (match := LAYER.fullmatch(module))}
    wanted = [module for module in known if (match := LAYER.fullmatch(module)) and match["module"] in names]
    return with_zeros(adapter, wanted, engine)


def with_zeros(adapter: Adapter, modules: Iterable[str], engine: Engine) -> Adapter:
    """Return the adapter with parts that change nothing for those of `modules` that have none."""
    missing = [module for module in modules if module not in adapter.parts]
    if not missing:
        return adapter
    rank, some = common_rank(adapter), next(iter(adapter.parts.values()))
    new = {module: _zero_part(engine, module, rank, some) for module in missing}
    lora = adapter.lora.model_copy(update={"layers_to_transform": None, "exclude_modules": None})
    return replace(adapter, lora=lora, parts={**adapter.parts, **new})


def layer_of(module: str) -> tuple[int, str] | None:
    """Split `model.layers.3.mlp.up_proj` into (3, "mlp.up_proj"); None for a module outside the layers."""
    match = LAYER.fullmatch(module)
    return (int(match["number"]), match["module"]) if match else None


def refuse(adapter: Adapter, what: str, dora: bool = True, instead: str = "merged") -> None:
    """Raise UserError for modules trained whole, and for magnitudes unless `dora`: `what` has no place for them."""
    advice = f"; write the whole model instead: --to {instead}"
    if adapter.saved:
        raise UserError(f"{what} can't hold modules_to_save ({', '.join(sorted(adapter.saved))}){advice}")
    if adapter.is_dora and not dora:
        raise UserError(f"{what} can't hold DoRA's magnitudes{advice}")


def _zero_part(engine: Engine, module: str, rank: int, like: Part) -> Part:
    weight = engine.base_weight(module)
    a, b = np.zeros((rank, weight.shape[1]), np.float32), np.zeros((weight.shape[0], rank), np.float32)
    magnitude = None if like.magnitude is None else np.linalg.norm(weight, axis=1)
    return Part(a, b, like.scale * like.rank / rank, magnitude)
