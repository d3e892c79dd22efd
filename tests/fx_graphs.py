"""Graphs of ATen operations as compiled layers have them, with our pass over them."""

from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from torch_backend.graph_pass import ReuseMemory


def graph_of(function: Callable, *arrays: torch.Tensor, tracing_mode: str = "fake") -> torch.fx.GraphModule:
    """Trace a function of some arrays and run the pass over its graph."""
    module = make_fx(function, tracing_mode=tracing_mode)(*arrays)
    ReuseMemory()(module.graph)
    module.recompile()
    return module
