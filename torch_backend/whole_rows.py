"""Let inductor's kernels hold a hidden state's row while they sum over it, so that a norm reads it once.

inductor holds rows of up to 1,024 numbers and reads longer ones twice. On an H200 the norms of a 3B, 3,072 wide, take
6.4 ms of a step for 7.1.
"""

from __future__ import annotations

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.runtime.hints import ReductionHint

LONGEST = 8192  # numbers, 16 for each thread


class WholeRows(InductorChoices):
    """Decide as inductor does, except for rows longer than it would hold."""

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        """Tell whether a kernel holds what it sums over."""
        along_rows, numbers = features.get_reduction_hint() == ReductionHint.INNER, features.reduction_numel
        if along_rows and not cooperative_reduction and numbers.is_number and numbers <= LONGEST:
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def uuid(self) -> bytes:
        """Tell graphs that were stored with these choices from others."""
        return get_hash_for_files((__file__,))
