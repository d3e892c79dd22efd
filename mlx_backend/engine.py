"""The Engine protocol on MLX: it holds the model and the flat training state, and sends steps to the device.

`train_step` only builds and launches graphs (`mx.async_eval`); the host waits in `fetch`, one step behind.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from common.base.weights import read_model_config
from common.config import LoraConfig, TrainConfig
from common.cpus import available_cpus
from common.engine import Array, MemoryUse, MicroBatch, StepBatch, StepResult, TrainState
from common.errors import UserError
from common.flat import FlatLayout
from common.layout import is_packed, supervised_positions
from common.lora import (
    portable_target_modules,
    seed_of,
    select_modules,
    select_parameters,
    select_saved,
    trainable_entries,
)
from common.memory import process_memory
from common.sampling import Sampling
from mlx_backend.arrangement import SideBySide, masking
from mlx_backend.attention import Packing, separate_examples
from mlx_backend.budget import Limits
from mlx_backend.checkpointing import checkpoint_layers
from mlx_backend.dialect import refuse_half_experts, refuse_unlike
from mlx_backend.experts import expert_stacks, inject_experts
from mlx_backend.generate import generate
from mlx_backend.head import find_head, output_head, select_at_head
from mlx_backend.lora import Adapter, dense_weight, inject, linear_modules, module_at
from mlx_backend.loss import LossFunction
from mlx_backend.model import DTYPES, choose_device, load_base
from mlx_backend.names import adaptable_modules, refuse_foreign, weighted_modules
from mlx_backend.recompute import keep_products
from mlx_backend.step import make_evaluation, make_micro_gradient, make_update
from mlx_backend.streams import Streams


@dataclass(frozen=True)
class PendingStep:
    """Hold the arrays of a launched step until somebody waits for them."""

    num_loss_tokens: int
    loss_sum: mx.array
    grad_norm: mx.array | None = None
    finite: mx.array | None = None


class MLXEngine:
    """Train, evaluate and generate with MLX (see common.engine.Engine)."""

    name = "mlx"

    def __init__(self, config: TrainConfig, model_dir: Path, lora: LoraConfig | None) -> None:
        """Load the base lazily, inject the adapter, and read the weights to the device."""
        if config.torch_compile:
            raise UserError("torch_compile: true: the MLX engine compiles by itself; delete it, or use --engine torch")
        if config.activation_offloading:
            raise UserError("activation_offloading: true: not on MLX, whose memory is the host's anyway; delete it")
        device = choose_device(config.device)
        on_gpu = device.type == mx.gpu
        self.dtype = config.compute_dtype if config.compute_dtype != "auto" else "bfloat16" if on_gpu else "float32"
        self.device_type = "cpu" if not on_gpu else "metal" if mx.metal.is_available() else "cuda"
        self.device = _describe(on_gpu)
        self.versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
        self._on_gpu = on_gpu
        self._limits = Limits(config.device)
        self._streams = Streams(device)
        self._seed = config.seed
        self._dropout = lora.lora_dropout if lora else 0.0
        model_config = read_model_config(model_dir)
        refuse_unlike(model_dir, model_config, config.max_seq_length)
        if not on_gpu:
            refuse_half_experts(model_dir, model_config, self.dtype)
        self._model = load_base(model_dir, self.dtype, config.quantization)
        self.tied_embeddings = output_head(self._model)[0] not in linear_modules(self._model)
        self._targets, self._adapter = self._inject(model_dir, lora)
        self._selection = select_at_head(self._model)
        self._packs = config.packing
        packing = separate_examples(self._model, model_dir) if config.packing else Packing()
        self._origin = keep_products(self._model, on_gpu, config.gradient_checkpointing)
        if config.gradient_checkpointing:
            checkpoint_layers(self._model, packing)
        self._model.eval()
        mx.eval(self._model.parameters())
        self._layout = FlatLayout(self._adapter.shapes())
        head = find_head(self._model, self._selection, model_config, self.dtype)
        self._loss = LossFunction(
            self._model, self._selection, head, packing, self._origin, self._adapter, self._layout
        )
        self._micro_gradient = make_micro_gradient(self._loss, self._streams, self.dtype)
        self._evaluate = make_evaluation(self._loss, self._streams)
        self._update = make_update(config, trainable_entries(self._layout, config.lora))
        self._weights, self._moment1, self._moment2 = (mx.zeros(self._layout.size) for _ in range(3))
        self._count = mx.array(0.0)

    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Give the shape of every adapter tensor, by PEFT key, in PEFT orientation."""
        return self._layout.shapes

    def target_modules(self) -> Sequence[str]:
        """Give the modules that carry an adapter, as `target_modules` of an adapter_config.json."""
        return self._targets

    def load_state(self, state: TrainState) -> None:
        """Replace weights, moments and update count."""
        self._weights = mx.array(self._layout.flatten(state.weights))
        self._moment1 = mx.array(self._layout.flatten(state.moment1))
        self._moment2 = mx.array(self._layout.flatten(state.moment2))
        self._count = mx.array(float(state.update_count))

    def read_state(self) -> TrainState:
        """Copy weights, moments and update count to the host."""
        arrays = (self._weights, self._moment1, self._moment2)
        weights, moment1, moment2 = (self._layout.unflatten(np.array(array)) for array in arrays)
        return TrainState(weights, moment1, moment2, int(self._count.item()))

    def train_step(self, batch: StepBatch, learning_rate: float) -> PendingStep:
        """Launch one optimizer step and return without waiting for it."""
        gradient, loss_sum = mx.zeros(self._layout.size), mx.array(0.0)
        per_token = mx.array(1.0 / batch.num_loss_tokens)
        for index, micro in enumerate(batch.micro_batches):
            parts = self._parts(micro, f"{self._seed}:{batch.step}:{index}" if self._dropout else None)
            gradient, loss_sum = self._micro_gradient(self._weights, gradient, loss_sum, per_token, parts)
            mx.async_eval(gradient, loss_sum)  # or MLX begins all of a step's micro-batches before it ends the first
        self._weights, self._moment1, self._moment2, self._count, norm, finite = self._update(
            self._weights,
            self._moment1,
            self._moment2,
            self._count,
            gradient,
            loss_sum,
            mx.array(learning_rate),
        )
        mx.async_eval(self._weights, self._moment1, self._moment2, self._count, norm, finite, loss_sum)
        return PendingStep(batch.num_loss_tokens, loss_sum, norm, finite)

    def eval_step(self, batch: MicroBatch) -> PendingStep:
        """Launch the loss of one micro-batch, without dropout, and return without waiting for it."""
        loss_sum = self._evaluate(self._weights, self._parts(batch))
        mx.async_eval(loss_sum)
        return PendingStep(int(batch.loss_mask.sum()), loss_sum)

    def fetch(self, handle: PendingStep) -> StepResult:
        """Wait for that step only and read its result."""
        loss_sum = handle.loss_sum.item()
        if handle.grad_norm is None or handle.finite is None:
            return StepResult(loss_sum, handle.num_loss_tokens)
        return StepResult(loss_sum, handle.num_loss_tokens, handle.grad_norm.item(), bool(handle.finite.item()))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, int]]:
        """Yield (row, token id) as tokens are chosen; a row ends after a stop token or `max_new_tokens`."""
        self._bind_weights()
        yield from generate(self._model, self._selection, prompts, sampling)

    def logits(self, token_ids: Array) -> Array:
        """Compute the logits of every position of (B, T) tokens with the adapter: float32 (B, T, vocabulary)."""
        self._bind_weights()
        return np.array(self._model(mx.array(token_ids)).astype(mx.float32))

    def base_weight(self, module: str) -> Array:
        """Copy the frozen weight (out, in) of a linear module or an embedding, dequantised, as float32."""
        kept = self._adapter.base_weight(module)
        path = self._model.origins.path_of(module)
        weight = dense_weight(module_at(self._model, path)) if kept is None else kept
        return np.array(weight.astype(mx.float32))

    def memory(self) -> MemoryUse:
        """Read the memory MLX holds on a GPU; on the CPU, that of the whole process."""
        return MemoryUse(mx.get_active_memory(), mx.get_peak_memory()) if self._on_gpu else process_memory()

    def close(self) -> None:
        """Release the model and the device's memory."""
        del self._model, self._loss, self._adapter, self._micro_gradient, self._evaluate
        mx.synchronize()
        mx.clear_cache()
        self._limits.restore()

    def _inject(self, model_dir: Path, lora: LoraConfig | None) -> tuple[list[str], Adapter]:
        if lora is None:
            return [], Adapter({}, {}, {})
        origins, linear, weighted = self._model.origins, adaptable_modules(self._model), weighted_modules(self._model)
        head = origins.name_of(output_head(self._model)[0])
        stacks = expert_stacks(self._model)
        parameters = select_parameters(list(stacks), lora)
        chosen = {name: linear[name] for name in select_modules(list(linear), head, lora, list(parameters))}
        tied = head if self.tied_embeddings else None
        saved = {name: weighted[name] for name in select_saved(list(weighted), tied, lora)}
        refuse_foreign(self._model, [*chosen.values(), *saved.values()], model_dir)
        targets = portable_target_modules(list(chosen), [*linear, *origins.absent], lora)
        self._model.freeze()
        wanted = {name: stacks[name] for name in parameters}
        adapters = inject_experts(wanted, self._model.model_type, lora)
        experts = {filed: adapters[name] for name, filed in parameters.items()}
        return targets, inject(self._model, chosen, saved, experts, lora, DTYPES[self.dtype])

    def _bind_weights(self) -> None:
        """Put the weights of now into the model, for passes outside a step."""
        self._streams.rejoin()
        self._origin.followed = False
        self._adapter.bind(self._loss.split(self._weights) if self._layout.shapes else {})

    def _parts(self, micro: MicroBatch, dropout_seed: str | None = None) -> list[dict[str, Any]]:
        """Give the arguments of the loss for each group of rows."""
        return [
            self._part(rows, f"{dropout_seed}:{number}" if dropout_seed else None)
            for number, rows in enumerate(self._streams.split(micro))
        ]

    def _part(self, rows: MicroBatch, dropout_seed: str | None) -> dict[str, Any]:
        positions, targets, counted = map(mx.array, supervised_positions(rows))
        part = {
            "token_ids": mx.array(rows.token_ids),
            "positions": positions,
            "targets": targets,
            "counted": counted,
        }
        if dropout_seed:
            part["dropout_key"] = mx.random.key(seed_of(dropout_seed))
        if is_packed(rows):
            assert self._packs, "a packed batch for an engine whose config says packing: false"
            if self._on_gpu:
                part["masking"] = masking(rows)
            else:
                part["arrangement"] = SideBySide(rows)
        return part


def _describe(on_gpu: bool) -> str:
    if on_gpu:
        return str(mx.device_info()["device_name"])
    return f"the CPU ({available_cpus()} cores)"
