"""Checkpoints laid out as transformers 5 saves them where mlx-lm expects what the Hub's first release had.

Each class is put before mlx-lm's Model of its architecture (mlx_backend/names.py), brings the tensors into the layout
that its `sanitize` knows, and leaves those of the other layout alone.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

Tensors = dict[str, mx.array]


class DenseGptOss(nn.Module):
    """Lay out GPT-OSS's experts where they are not packed in MXFP4: (E, in, out), gates and ups in turn."""

    def sanitize(self, weights: Tensors) -> Tensors:
        """Split and transpose what transformers saves; packed experts are left to mlx-lm."""
        dense = [name for name in weights if name.endswith(".experts.gate_up_proj")]
        if not dense:
            return super().sanitize(weights)
        for name in dense:
            experts = name.removesuffix(".gate_up_proj")
            gate_up, bias = weights.pop(name), weights.pop(f"{name}_bias")
            for part, projection in enumerate(("gate_proj", "up_proj")):
                weights[f"{experts}.{projection}.weight"] = mx.contiguous(gate_up[..., part::2].swapaxes(1, 2))
                weights[f"{experts}.{projection}.bias"] = mx.contiguous(bias[..., part::2])
            weights[f"{experts}.down_proj.weight"] = mx.contiguous(weights.pop(f"{experts}.down_proj").swapaxes(1, 2))
            weights[f"{experts}.down_proj.bias"] = weights.pop(f"{experts}.down_proj_bias")
        return weights


class SeparateQwenExperts(nn.Module):
    """Lay out Qwen 3.5's experts where each is a tensor of its own: (E, 2 I, H) and (E, H, I)."""

    def sanitize(self, weights: Tensors) -> Tensors:
        """Stack the experts, gates over ups."""
        first = ".experts.0.gate_proj.weight"
        for block in [name.removesuffix(first) for name in weights if name.endswith(first)]:
            gates, ups, downs = (_stacked(weights, block, kind) for kind in ("gate_proj", "up_proj", "down_proj"))
            weights[f"{block}.experts.gate_up_proj"] = mx.concatenate([gates, ups], axis=1)
            weights[f"{block}.experts.down_proj"] = downs
        return super().sanitize(weights)


def _stacked(weights: Tensors, block: str, kind: str) -> mx.array:
    count = sum(name.startswith(f"{block}.experts.") and name.endswith(f".{kind}.weight") for name in weights)
    return mx.stack([weights.pop(f"{block}.experts.{expert}.{kind}.weight") for expert in range(count)])


LAYOUTS: dict[str, tuple[type[nn.Module], ...]] = {"gpt_oss": (DenseGptOss,), "qwen3_5_moe": (SeparateQwenExperts,)}
