"""The live module tree of an mlx-lm model: its layers, and giving one module a method of its own.

So no architecture is written again, and nothing of mlx-lm's is changed for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import mlx.nn as nn


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of a model from input to output."""
    return model.layers


def specialise(module: nn.Module, method: str, function: Callable) -> None:
    """Give one module a method of its own, by a subclass for it alone: its class and others of it stay as they are."""
    module.__class__ = type(type(module).__name__, (type(module),), {method: function})


def exchange_names(module: nn.Module, functions: Mapping[str, Callable]) -> None:
    """Give one module its methods once more, in which some global names mean other functions."""
    for method, function in _methods(type(module)):
        if not functions.keys().isdisjoint(_names(function.__code__)):
            specialise(module, method, _with_names(function, functions))


def global_names(module: nn.Module, function: Callable) -> list[str]:
    """Return the names by which a module's code calls a function."""
    called = (
        (name, each.__globals__.get(name)) for _, each in _methods(type(module)) for name in _names(each.__code__)
    )
    return [name for name, meant in called if meant is function]


def calls(module: nn.Module, *names: str) -> bool:
    """Tell whether one of a module's methods looks up all of some names."""
    return any(set(names) <= set(_names(function.__code__)) for _, function in _methods(type(module)))


def layer_names(model: nn.Module) -> dict[str, str]:
    """Return the paths of the decoder layers in the live tree, and what transformers calls them."""
    names = {}
    for path, module in model.named_modules():
        if any(module is layer for layer in decoder_layers(model)):
            inside = next(each for each, part in module.named_modules() if model.origins.name_of(f"{path}.{each}"))
            names[path] = model.origins.name_of(f"{path}.{inside}").removesuffix(f".{inside}")
    return names


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """Yield the methods that an architecture has written."""
    for name in dir(kind):
        function = getattr(kind, name)
        if isinstance(function, FunctionType) and (name == "__call__" or not hasattr(nn.Module, name)):
            yield name, function


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function looks up, those inside it too."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _with_names(function: FunctionType, names: Mapping[str, Any]) -> FunctionType:
    """Return a function of the same code for which some global names mean something else."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
