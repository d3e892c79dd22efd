"""LoRA on the experts of a mixture, on MLX: PEFT adapts transformers' stacks, mlx-lm computes with stacks of its own.

transformers holds gates and ups of all experts as one parameter, `experts.gate_up_proj`, where mlx-lm has two modules;
so one A serves both, and each takes its rows of B. PEFT's files hold A as (E * r, in), expert by expert, and B as
(out, r * E), rank by rank: both are kept so, and only viewed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from common.config import LoraConfig
from common.lora import module_rank, module_scaling
from mlx_backend.tree import layer_names

GATE_UP, DOWN = "gate_up_proj", "down_proj"
IN_TURN = "gpt_oss"  # whose gates and ups alternate; elsewhere all gates come first


class ExpertAdapter(nn.Module):
    """Hold A and B of one stack, for all experts."""

    def __init__(self, num_experts: int, out_features: int, in_features: int, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_a = mx.zeros((num_experts * rank, in_features))
        self.lora_b = mx.zeros((out_features, rank * num_experts))
        self._num_experts = num_experts
        self._scale = scale

    def factors(self, rows: slice, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return A^T (E, in, r) and, for some rows of the output, scale * B^T (E, r, out)."""
        a = self.lora_a.reshape(self._num_experts, -1, self.lora_a.shape[-1])
        b = (self._scale * self.lora_b[rows]).reshape(-1, a.shape[1], self._num_experts)
        return a.swapaxes(1, 2).astype(dtype), b.transpose(2, 1, 0).astype(dtype)


class LoRASwitchLinear(nn.Module):
    """Add each chosen expert's scale * B A x to what a frozen stack of linear modules returns."""

    def __init__(self, linear: nn.Module, adapter: ExpertAdapter, rows: slice, owns: bool) -> None:
        """Wrap `linear`, whose outputs are `rows` of the adapter's; one of those that share an adapter owns it."""
        super().__init__()
        self.linear = linear
        self._shared = adapter
        self._rows = rows
        if owns:
            self.adapter = adapter

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map tokens (..., 1, in) to (..., 1, out) by the experts that `indices` name."""
        a, b = self._shared.factors(self._rows, x.dtype)
        low = mx.gather_mm(x, a, rhs_indices=indices, sorted_indices=sorted_indices)
        extra = mx.gather_mm(low, b, rhs_indices=indices, sorted_indices=sorted_indices)
        return self.linear(x, indices, sorted_indices=sorted_indices) + extra


def expert_stacks(model: nn.Module) -> dict[str, SwitchGLU]:
    """Return the experts behind each of transformers' stacked parameters, by its name, in model order."""
    names = layer_names(model)
    found: dict[str, SwitchGLU] = {}
    for path, module in reversed(model.named_modules()):
        if isinstance(module, SwitchGLU):
            layer = next(each for each in names if path.startswith(f"{each}."))
            found |= {f"{names[layer]}.mlp.experts.{parameter}": module for parameter in (GATE_UP, DOWN)}
    return found


def inject_experts(stacks: Mapping[str, SwitchGLU], model_type: str, lora: LoraConfig) -> dict[str, ExpertAdapter]:
    """Wrap the experts behind some of transformers' parameters in place; returns the adapter of each."""
    return {name: _wrap(experts, name, model_type == IN_TURN, lora) for name, experts in stacks.items()}


def _wrap(experts: SwitchGLU, name: str, in_turn: bool, lora: LoraConfig) -> ExpertAdapter:
    parts = dict(_parts(experts, name, in_turn))
    first = experts[next(iter(parts))]
    out_features = first.output_dims * len(parts)
    adapter = ExpertAdapter(
        first.num_experts, out_features, first.input_dims, module_rank(name, lora), module_scaling(name, lora)
    )
    for number, (projection, rows) in enumerate(parts.items()):
        experts[projection] = LoRASwitchLinear(experts[projection], adapter, rows, owns=number == 0)
    return adapter


def _parts(experts: SwitchGLU, name: str, in_turn: bool) -> Iterator[tuple[str, slice]]:
    """Say which of mlx-lm's modules make up a parameter, and which of its rows each is."""
    if name.endswith(DOWN):
        yield DOWN, slice(None)
        return
    half = experts.gate_proj.output_dims
    yield "gate_proj", slice(0, None, 2) if in_turn else slice(0, half)
    yield "up_proj", slice(1, None, 2) if in_turn else slice(half, None)
