"""What a checkpointed layer keeps beside its input where there is room for it: the result of its attention.

With activation offloading that room is the host's memory. A layer's second forward pass then needs no attention, and
needs q, k and v no earlier than attention's gradient does, behind that of the MLP.
"""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

NAMES = ("_scaled_dot_product_", "_varlen_attn")  # what operations of attention begin with, on every device


class KeepAttention(CustomGraphPass):
    """Ask the compiler, which chooses what a layer keeps, for attention's results and their log-sum-exps."""

    def __call__(self, graph: Graph) -> None:
        """Mark them in a graph of both passes."""
        for node in graph.nodes:
            if _attends(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> bytes:
        """Tell graphs that were stored with this pass from others."""
        return get_hash_for_files((__file__,))


def _attends(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.name().partition("::")[2]
    return name.startswith(NAMES) and "backward" not in name
