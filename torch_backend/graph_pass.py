"""What inductor does to a compiled layer's graph for us, after its own passes: results are made where they belong."""

from __future__ import annotations

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from torch_backend import aligned, beside, in_place, nodes, overwrite, whole_rows


class ReuseMemory(CustomGraphPass):
    """Make products beside arrays, and sums, and several results of several arrays, in memory that is there."""

    def __call__(self, graph: Graph) -> None:
        """Change a graph of ATen operations."""
        beside.leave_room(graph)
        in_place.add_in_place(graph)
        overwrite.overwrite_inputs(graph)

    def uuid(self) -> bytes:
        """Tell graphs that were stored with this pass from others."""
        files = (module.__file__ for module in (aligned, beside, in_place, nodes, overwrite, whole_rows))
        return get_hash_for_files((__file__, *files))
