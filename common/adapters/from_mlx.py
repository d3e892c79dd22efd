"""What mlx-lm's adapter files mean, said in PEFT's terms.

mlx-lm keeps lora_a (in, r) and lora_b (r, out), PEFT their transposes; its `scale` is PEFT's lora_alpha / r. Which way
round a matrix lies is known from the layout alone, never from its shape: square ones fit either way. The config says
little of which modules are adapted, so the tensors do; names of modules are taken to be the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.adapters.checks import adapted_modules, deduced_rank
from common.adapters.from_peft import whole
from common.engine import Array
from common.errors import UserError
from common.lora import MAGNITUDE, lora_a_key, lora_b_key, magnitude_key

KEYS = {"lora_a": lora_a_key, "lora_b": lora_b_key, "m": magnitude_key}
MAX_SCALE = 1e9  # more is a mistake
PARAMETERS = {"rank", "scale", "dropout", "keys"}
LAYER = re.compile(r"(?P<stack>.+?)\.(?P<number>\d+)\.(?P<path>.+)")


def from_mlx(
    config: Mapping[str, Any], tensors: Mapping[str, Array], source: Path
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return an mlx-lm adapter's tensors under PEFT's names and in its orientation, and an adapter_config to match.

    Raises UserError for whole weights, experts' matrices, and a config that doesn't say the scale.
    """
    parameters = _parameters(config, source)
    weights = dict(_in_peft_layout(name, tensor, source) for name, tensor in tensors.items())
    rank = parameters.get("rank") if parameters.get("rank") is not None else deduced_rank(weights, source)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise UserError(f"{source}: lora_parameters.rank: found {rank!r:.40}; expected an integer of at least 1")
    modules = adapted_modules(weights)
    _check_places(modules, config, parameters.get("keys"), source)
    targets, layers = _places(modules, config)
    return weights, {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        # Twelve digits: a scale that was written as alpha / r gives that alpha, and float32 knows no difference.
        "lora_alpha": whole(float(f"{parameters['scale'] * rank:.12g}")),
        "lora_dropout": parameters.get("dropout") or 0.0,
        "target_modules": targets,
        "layers_to_transform": layers,
        "use_dora": _is_dora(config, weights, source),
    }


def _parameters(config: Mapping[str, Any], source: Path) -> Mapping[str, Any]:
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        expected = "lora or dora: whole weights are a model of their own, which mlx_lm.fuse writes"
        raise UserError(f"{source}: has fine_tune_type {kind!r:.40}; expected {expected}")
    if not isinstance(parameters, dict):
        raise UserError(f"{source}: names no lora_parameters; add rank and scale that the adapter was trained with")
    others = sorted(key for key in parameters.keys() - PARAMETERS if parameters[key] is not None)
    if "alpha" in others:
        advice = "mlx-lm scales by `scale` alone today, by scale * alpha / rank early in 2024; write that as scale"
        raise UserError(f"{source}: lora_parameters.alpha: its meaning has changed: {advice}, and delete alpha")
    if others:
        raise UserError(f"{source}: lora_parameters.{others[0][:80]}: unknown to mlx-lm; delete it if it means nothing")
    scale = parameters.get("scale")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < MAX_SCALE:
        advice = "it can't be told from the weights; write the one it was trained with (mlx-lm's default is 20.0)"
        raise UserError(f"{source}: lora_parameters.scale: found {scale!r:.40}; expected a number above 0; {advice}")
    return parameters


def _in_peft_layout(name: str, tensor: Array, source: Path) -> tuple[str, Array]:
    module, _, kind = name.rpartition(".")
    if kind not in KEYS or not module:
        raise UserError(f"{source}: holds {name[:200]}; expected lora_a, lora_b (and DoRA's m) of modules alone")
    if kind == "m":
        return magnitude_key(module), tensor
    if tensor.ndim != 2:
        form = "(in, r)" if kind == "lora_a" else "(r, out)"
        experts = "; LoRA on stacked experts is not supported" if tensor.ndim == 3 else ""
        raise UserError(f"{source}: {name[:200]} has shape {tensor.shape}; expected {form}{experts}")
    return KEYS[kind](module), np.ascontiguousarray(tensor.T)


def _is_dora(config: Mapping[str, Any], weights: Mapping[str, Array], source: Path) -> bool:
    """Tell whether it is DoRA; an early mlx-lm wrote `use_dora`, which today's ignores."""
    said = config.get("fine_tune_type") == "dora" or bool(config.get("use_dora"))
    if said != any(key.endswith(MAGNITUDE) for key in weights):
        found, expected = ("no magnitudes m", "dora") if said else ("magnitudes m", "lora")
        raise UserError(f"{source}: has {found}, but fine_tune_type is {expected}; bring the config that belongs to it")
    return said


def _check_places(modules: Sequence[str], config: Mapping[str, Any], keys: Any, source: Path) -> None:
    """Raise UserError where the weights stand elsewhere than `keys` or in more layers than `num_layers` say."""
    known = set(keys) if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else set()
    layers = set()
    for module in modules:
        place = LAYER.fullmatch(module)
        if keys is not None and module not in known and (place is None or place["path"] not in known):
            raise UserError(f"{source}: has weights of {module[:200]}, which lora_parameters.keys don't name")
        if place and module not in known:  # a full name is meant whatever the number of layers
            layers.add(place["number"])
    number = _num_layers(config)
    if isinstance(number, int) and 0 < number < len(layers):
        raise UserError(f"{source}: has weights of {len(layers)} layers, but num_layers is {number}")


def _num_layers(config: Mapping[str, Any]) -> Any:
    return config.get("num_layers", config.get("lora_layers"))


def _places(modules: Sequence[str], config: Mapping[str, Any]) -> tuple[list[str], list[int] | None]:
    """Return `target_modules` and `layers_to_transform` that mean these modules.

    Paths inside a layer where all adapted layers have the same, as mlx-lm's have; full names where they differ.
    """
    inside: dict[int, set[str]] = {}
    outside = []
    for module in modules:
        place = LAYER.fullmatch(module)
        if place:
            inside.setdefault(int(place["number"]), set()).add(place["path"])
        else:
            outside.append(module)
    paths = next(iter(inside.values()), set())
    if not inside or any(each != paths for each in inside.values()):
        return sorted(modules), None
    number = _num_layers(config)
    everywhere = 0 in inside or (isinstance(number, int) and number <= 0)  # it is the last layers that mlx-lm adapts
    return sorted(paths | set(outside)), None if everywhere else sorted(inside)
