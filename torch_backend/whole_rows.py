"""Let inductor's kernels hold a hidden state's row while they sum over it, so that a norm reads it once.

inductor holds rows of up to 1,024 numbers and reads longer ones twice. On an H200 the norms of a 3B, 3,072 wide, take
6.4 ms of a step for 7.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.runtime.hints import ReductionHint

if TYPE_CHECKING:
    from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures

LONGEST = 4096  # numbers, 16 for each of 256 threads; what is wider was not measured


class WholeRows(InductorChoices):
    """Decide as inductor does, except for rows longer than it would hold."""

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        """Tell whether a kernel holds what it sums over."""
        along_rows = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
        numbers = features.reduction_numel
        if config.triton.persistent_reductions and along_rows and numbers.is_number and numbers <= LONGEST:
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def uuid(self) -> bytes:
        """Tell graphs that were stored with these choices from others; torch 2.11 asks ReuseMemory alone."""
        return get_hash_for_files((__file__,))
