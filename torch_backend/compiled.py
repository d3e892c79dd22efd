"""Compiled decoder layers on torch, and the norm behind them: layers of a kind share one graph, compiled in seconds.

Compiling layer by layer gives the speed of compiling a whole model in a sixth of the time (measured: 12 s against 69 s
for a 3B on an H200), and what was compiled is found again at the next start. Layers get a compiled `forward` of their
own instance; taking it away again leaves the model as it was, for generation, whose shapes change with every token.

Gradient checkpointing is the compiler's work where it can be: it keeps a layer's inputs alone, and leaves out of the
second forward pass what no gradient asks for, such as the product with down_proj, a quarter of a layer's work. With
dropout it can't: inductor 2.13 drops other elements the second time, and the gradient is wrong (measured); there the
compiled layer runs twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from torch_backend.checkpointing import KeepAttention
from torch_backend.graph_pass import ReuseMemory
from torch_backend.whole_rows import WholeRows

# Share of the activations that a compiled layer may keep. Just below 1 it computes elementwise results again, such as
# SwiGLU's, but no matmul: 22.9 GB instead of 30.0 for a 3B, 4 x 2048, at the same speed (H200, measured).
MEMORY_BUDGET = 0.9
# With checkpointing. torch.utils.checkpoint inside a graph is no substitute: torch 2.11 forgets about it in functions
# with a gradient of their own and keeps their results, such as k and v, 0.9 GB for a 3B and 8,192 tokens.
KEEP_INPUTS = 0.0
# With offloading: what the compiler is told to keep (torch_backend/checkpointing.py), for which it looks above 0 alone.
KEEP_MARKED = 1e-9
# Graphs of one layer: for the first shape, for any length, for any number of rows, for one row, each to train and to
# evaluate. Beyond torch's own limit of 8 it would run uncompiled, slower and in twice the memory, without a word.
MOST_GRAPHS = 64

Forward = Callable[..., Any]


class CompiledLayers:
    """Let a model's decoder layers and the norm behind them run compiled, except where that is suspended."""

    def __init__(self, model: PreTrainedModel, checkpointing: bool, offloading: bool, dropout: bool) -> None:
        """Compile lazily: the first batch of a shape takes the time.

        `checkpointing` computes layers again in the backward pass, but with `offloading` no attention; `dropout` says
        that they draw random numbers.
        """
        leaves_out = checkpointing and not dropout
        keeps_attention = leaves_out and offloading
        kept = KEEP_MARKED if keeps_attention else KEEP_INPUTS if leaves_out else MEMORY_BUDGET
        functorch_config.activation_memory_budget = kept
        inductor_config.joint_custom_post_pass = KeepAttention() if keeps_attention else None
        # Dropout's masks take so much of that share that the compiler would even repeat operations that it can't weigh.
        functorch_config.is_non_builtin_to_include = dropout
        # bitsandbytes' product is such a function; without this a graph with it is made anew at every start.
        functorch_config.autograd_cache_allow_custom_autograd_functions = True
        dynamo_config.recompile_limit = MOST_GRAPHS
        inductor_config.post_grad_custom_post_pass = ReuseMemory()
        inductor_config.inductor_choices_class = WholeRows  # asked for once, when a thread first compiles
        # inductor times two ways to run an elementwise kernel, with copies of what it may overwrite, which hide the
        # difference: SwiGLU's then took 90 or 147 us a layer, as it happened (H200). Without timing the first is taken,
        # eight numbers a thread, which is the faster one there.
        inductor_config.triton.autotune_pointwise = False
        model.get_input_embeddings().register_forward_hook(_as_between_layers)
        layers = {layer: torch.compile(layer.forward) for layer in decoder_layers(model)}
        if checkpointing and not leaves_out:
            layers = {layer: partial(_recompute, layer, forward) for layer, forward in layers.items()}
        norms = {norm: torch.compile(norm.forward) for norm in _norms_behind(model, list(layers))}
        self._forwards: dict[nn.Module, Forward] = layers | norms
        self._install()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the modules' own code for as long as the context lasts."""
        for module in self._forwards:
            del module.forward
        try:
            yield
        finally:
            self._install()

    def _install(self) -> None:
        for module, forward in self._forwards.items():
            module.forward = forward


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers that transformers itself would checkpoint: those of the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len))


def _norms_behind(model: PreTrainedModel, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the norms after the list of layers: uncompiled, each of their operations is a pass over memory."""
    for module in model.modules():
        children = list(module.children())
        place = next((place for place, child in enumerate(children) if list(child.children()) == layers), None)
        if place is not None:
            return [child for child in children[place + 1 :] if "norm" in type(child).__name__.lower()]
    return []


def _recompute(layer: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Run a layer's forward; when training, the backward pass runs it again."""
    if not layer.training:
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


def _as_between_layers(_: nn.Module, __: Any, embedded: torch.Tensor) -> torch.Tensor:
    """Let the first layer's input ask for a gradient as those of the others do, or it would need graphs of its own.

    That gradient costs three products of one layer, 0.2% of a step of 28 layers; a graph costs seconds at every shape.
    """
    if torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_()
    return embedded
