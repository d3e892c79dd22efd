"""Who is who: a checkpoint's tensors, the modules that mlx-lm makes of them, and PEFT's names of these.

An adapter names the modules of transformers' model. mlx-lm renames on loading (a `language_model.` before, one stack
in place of many experts), so each tensor is followed through its loading code by identity and no name is taken apart.
Only where transformers itself renames a checkpoint's tensors (models of text and images) a prefix is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import _get_classes  # what load_model itself uses where it isn't told otherwise

from common.errors import UserError
from mlx_backend.layouts import LAYOUTS
from mlx_backend.lora import linear_modules

# model_type -> prefixes of a checkpoint's tensors and what transformers' AutoModelForCausalLM calls them.
RENAMED_BY_TRANSFORMERS = {
    "qwen3_5": (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", "")),
    "gemma3": (("language_model.model.", "model.language_model."), ("language_model.", "")),
}
RENAMED_BY_TRANSFORMERS["qwen3_5_moe"] = RENAMED_BY_TRANSFORMERS["qwen3_5"]
RENAMED_BY_TRANSFORMERS["mistral3"] = RENAMED_BY_TRANSFORMERS["gemma3"]
SEEING = ("gemma3", "mistral3")  # their vision tower is part of transformers' AutoModelForCausalLM


class Origins:
    """Remember which tensor of the checkpoint each parameter of a model was loaded from."""

    def __init__(self, model_type: str) -> None:
        self._model_type = model_type
        self._prefixes = RENAMED_BY_TRANSFORMERS.get(model_type, ())
        self._names: dict[str, str] = {}
        self._paths: dict[str, str] = {}
        self.absent: list[str] = []  # modules that transformers' model has and mlx-lm's lacks: a vision tower's

    def follow(self, before: Mapping[str, mx.array], after: Mapping[str, mx.array]) -> None:
        """Note where mlx-lm's loading code put the tensors that it did not change."""
        names = {id(tensor): name for name, tensor in before.items()}
        traced = {path: names[id(tensor)] for path, tensor in after.items() if id(tensor) in names}
        self._names = {_module(path): self._renamed(name) for path, name in traced.items() if _is_weight(path)}
        self._paths = {name: path for path, name in self._names.items()}
        if self._model_type in SEEING:
            self.absent = [self._renamed(name) for name in before.keys() - traced.values() if _is_weight(name)]

    def name_of(self, path: str) -> str | None:
        """Return PEFT's name of the module at a path of the live tree, None where no one tensor became its weight."""
        return self._names.get(path)

    def path_of(self, name: str) -> str:
        """Return the path in the live tree of a module by PEFT's name of it."""
        return self._paths.get(name, name)

    def _renamed(self, tensor: str) -> str:
        name = _module(tensor)
        return next((new + name.removeprefix(old) for old, new in self._prefixes if name.startswith(old)), name)


def _is_weight(tensor: str) -> bool:
    return tensor.endswith(".weight")


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def adaptable_modules(model: nn.Module) -> dict[str, str]:
    """Return the linear modules that PEFT could adapt: its name of each and the path in the live tree."""
    origins, left_out = model.origins, routers(model)
    return {origins.name_of(path) or path: path for path in linear_modules(model) if path not in left_out}


def weighted_modules(model: nn.Module) -> dict[str, str]:
    """Return the modules that have a weight of their own: PEFT's name of each and the path in the live tree."""
    paths = [path for path, module in reversed(model.named_modules()) if "weight" in module]
    return {model.origins.name_of(path) or path: path for path in paths}


def refuse_foreign(model: nn.Module, paths: Iterable[str], directory: Path) -> None:
    """Raise UserError where a module to adapt was made of several of the checkpoint's tensors, or of parts of one."""
    foreign = [path for path in paths if model.origins.name_of(path) is None]
    if foreign:
        raise UserError(
            f"{directory}: mlx-lm makes {foreign[0]} (and {len(foreign) - 1} more) of tensors that the checkpoint "
            "lacks, so a PEFT adapter of it would load nowhere else; train this architecture with --engine torch"
        )


class Followed(nn.Module):
    """Keep, beside mlx-lm's Model whose subclass this makes, the origins of its parameters."""

    origins: Origins

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Let the architecture lay out a checkpoint's tensors its way, and note what became of each."""
        self.origins = Origins(self.model_type)
        own = super()
        sanitized = own.sanitize(dict(weights)) if hasattr(own, "sanitize") else weights
        self.origins.follow(weights, sanitized)
        return sanitized


def followed_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """Return mlx-lm's Model and ModelArgs of a config, the Model one that remembers its origins."""
    model_class, arguments_class = _get_classes(config)
    bases = (Followed, *LAYOUTS.get(config["model_type"], ()), model_class)
    return type(model_class.__name__, bases, {}), arguments_class


def routers(model: nn.Module) -> set[str]:
    """Find the linear modules that choose among experts.

    transformers makes them parameters, not modules, so PEFT gives them no adapter and neither do we: they stand
    beside a stack of experts and have one output for each.
    """
    modules = dict(model.named_modules())
    found = set()
    for path, module in modules.items():
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            block = path.rsplit(".", 2)[0]  # <block>.<stack>.<projection>
            found |= set(_routers_in(block, modules[block], module.num_experts))
    return found


def _routers_in(path: str, block: nn.Module, num_experts: int) -> Iterable[str]:
    for name, child in block.children().items():
        if isinstance(child, nn.Linear | nn.QuantizedLinear) and child.weight.shape[0] == num_experts:
            yield f"{path}.{name}"
