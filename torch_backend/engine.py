"""The Engine protocol on torch: it holds the model and the flat training state, and sends steps to the device.

`train_step` launches work without a synchronisation; on CUDA the results are copied to pinned host memory behind
it and `fetch` waits for that copy alone, one step behind.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import LoraConfig, TrainConfig
from common.engine import LOSS_SCALE, Array, MemoryUse, MicroBatch, StepBatch, StepResult, TrainState
from common.errors import MachineError, UserError
from common.layout import is_packed, supervised_positions
from common.lora import seed_of, trainable_entries
from common.memory import process_memory
from common.sampling import Sampling
from common.segments import end_to_end
from torch_backend.adapter import Adapter, is_plain
from torch_backend.attention import PackedAttention, TrainingAttention
from torch_backend.checkpointing import checkpoint_layers
from torch_backend.compiled import CompiledLayers
from torch_backend.device import DTYPES, Hardware, choose_device, describe, look_at, send
from torch_backend.generate import generate
from torch_backend.head import find_head, select_at_head
from torch_backend.lora import dense_weight, has_tied_embeddings, inject
from torch_backend.loss import LossFunction
from torch_backend.model import load_base
from torch_backend.offloading import Offloading
from torch_backend.siblings import border_layers
from torch_backend.step import Moments, make_update


@dataclass(frozen=True)
class PendingStep:
    """Hold the results of a launched step: loss sum, gradient norm, finite; on the host once `done` is."""

    num_loss_tokens: int
    results: torch.Tensor
    done: torch.cuda.Event | None


class TorchEngine:
    """Train, evaluate and generate with torch (see common.engine.Engine)."""

    name = "torch"

    def __init__(self, config: TrainConfig, model_dir: Path, lora: LoraConfig | None) -> None:
        """Load the base onto the device and inject the adapter."""
        device = choose_device(config.device)
        hardware = look_at(device)
        self.dtype = hardware.dtype if config.compute_dtype == "auto" else config.compute_dtype
        _refuse_impossible(config, device, hardware, self.dtype)
        self.device_type = device.type
        self.device = describe(device)
        self.versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        self._config = config
        self._device = device
        self._base = load_base(model_dir, self.dtype, config.quantization, device)
        self.tied_embeddings = has_tied_embeddings(self._base)
        varlen = hardware.has_varlen(self.dtype)
        self._attention = PackedAttention(self._base, varlen) if config.packing else TrainingAttention(self._base)
        self._base.requires_grad_(False)  # also where nothing is trained: what is trainable is taken for the adapter
        checkpointing, offloading = config.gradient_checkpointing, config.activation_offloading
        text = self._base.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 0)
        self._offloading = Offloading(device, text.hidden_size, heads, DTYPES[self.dtype]) if offloading else None
        self._model, self._targets = inject(self._base, lora) if lora else (self._base, [])
        self._selection = select_at_head(self._base)  # of the head as training leaves it: wrapped, where it is trained
        self._model.eval()
        borders = hardware.borders(self.dtype) and is_plain(self._model)
        triton = hardware.runs_triton and config.torch_compile is not False
        # Where each example attends by itself, every batch would be compiled anew; and PEFT puts adapters of experts in
        # and takes them out again at each pass.
        alike = (varlen or not config.packing) and not (lora and lora.target_parameters)
        compiles = hardware.compiles(self.dtype) and alike if config.torch_compile is None else config.torch_compile
        room = compiles and not checkpointing  # with it, gradients are written over what is computed again
        placed = border_layers(self._base, DTYPES[self.dtype], room, triton) if borders else []
        if device.type == "cuda":
            torch.cuda.empty_cache()  # each array is a little larger than the holes that its weights left
        self._adapter = Adapter(self._model, device, DTYPES[self.dtype], placed, triton)
        mask = trainable_entries(self._adapter.layout, config.lora)
        self._moments = Moments.zeros(self._adapter.layout.size, device)
        self._update = make_update(config, None if mask is None else torch.from_numpy(mask).to(device), compiles)
        head = find_head(self._base, self._selection)
        self._loss = LossFunction(self._model, self._selection, head, self.dtype, device, triton)
        dropout = config.lora.lora_dropout > 0
        self._compiled = CompiledLayers(self._base, checkpointing, offloading, dropout) if compiles else None
        if checkpointing and not compiles:
            checkpoint_layers(self._base)

    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Give the shape of every adapter tensor, by PEFT key, in PEFT orientation."""
        return self._adapter.layout.shapes

    def target_modules(self) -> Sequence[str]:
        """Give the modules that carry an adapter, as `target_modules` of an adapter_config.json."""
        return self._targets

    def load_state(self, state: TrainState) -> None:
        """Replace weights, moments and update count."""
        layout = self._adapter.layout
        self._adapter.weights.copy_(torch.from_numpy(layout.flatten(state.weights)))
        self._adapter.show_weights()
        self._moments.first.copy_(torch.from_numpy(layout.flatten(state.moment1)))
        self._moments.second.copy_(torch.from_numpy(layout.flatten(state.moment2)))
        self._moments.count.fill_(state.update_count)

    def read_state(self) -> TrainState:
        """Copy weights, moments and update count to the host."""
        tensors = (self._adapter.weights, self._moments.first, self._moments.second)
        copies = (tensor.to("cpu", copy=True).numpy() for tensor in tensors)
        weights, moment1, moment2 = (self._adapter.layout.unflatten(copy) for copy in copies)
        return TrainState(weights, moment1, moment2, int(self._moments.count.item()))

    def train_step(self, batch: StepBatch, learning_rate: float) -> PendingStep:
        """Launch one optimizer step and return without waiting for it."""
        self._train(True)
        self._adapter.zero_gradient()
        scale = LOSS_SCALE.get(self.dtype, 1.0)
        loss_sum = torch.zeros((), device=self._device)
        for index, micro in enumerate(batch.micro_batches):
            torch.manual_seed(seed_of(f"{self._config.seed}:{batch.step}:{index}") >> 1)  # it takes 63 bits
            with self._offloading.forward_pass() if self._offloading else contextlib.nullcontext():
                loss = self._loss_of(micro)
            (loss * (scale / batch.num_loss_tokens)).backward()
            self._adapter.collect_gradient()
            loss_sum += loss.detach()
        gradient = self._adapter.gradient if scale == 1 else self._adapter.gradient / scale
        rate = send(torch.tensor(learning_rate, dtype=torch.float32), self._device)
        norm, finite = self._update(self._adapter.weights, self._moments, gradient, loss_sum, rate)
        self._adapter.show_weights()
        return self._pending(batch.num_loss_tokens, torch.stack([loss_sum, norm, finite.float()]))

    @torch.no_grad()
    def eval_step(self, batch: MicroBatch) -> PendingStep:
        """Launch the loss of one micro-batch, without dropout, and return without waiting for it."""
        self._train(False)
        loss = self._loss_of(batch)
        return self._pending(int(batch.loss_mask.sum()), torch.stack([loss, loss * 0, torch.ones_like(loss)]))

    def fetch(self, handle: PendingStep) -> StepResult:
        """Wait for that step only and read its result."""
        if handle.done is not None:
            handle.done.synchronize()
        loss_sum, norm, finite = handle.results.tolist()
        return StepResult(loss_sum, handle.num_loss_tokens, norm, bool(finite))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, int]]:
        """Yield (row, token id) as tokens are chosen; a row ends after a stop token or `max_new_tokens`."""
        self._train(False)
        with self._as_transformers_has_it():
            yield from generate(self._model, self._base.config, self._device, prompts, sampling)

    @torch.no_grad()
    def logits(self, token_ids: Array) -> Array:
        """Compute the logits of every position of (B, T) tokens with the adapter: float32 (B, T, vocabulary)."""
        self._train(False)
        with self._as_transformers_has_it():
            inputs = torch.from_numpy(token_ids.astype(np.int64)).to(self._device)
            return self._model(input_ids=inputs, use_cache=False).logits.float().cpu().numpy()

    def base_weight(self, module: str) -> Array:
        """Copy the frozen weight (out, in) of a linear module or an embedding, dequantised, as float32."""
        return dense_weight(self._base.get_submodule(module)).float().cpu().numpy().copy()

    def memory(self) -> MemoryUse:
        """Read the memory torch holds on the GPU; on the CPU, that of the whole process."""
        if self._device.type == "cuda":
            return MemoryUse(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
        if self._device.type == "mps":  # MPS keeps no peak: what the driver holds only grows, and is near it
            return MemoryUse(torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory())
        return process_memory()

    def close(self) -> None:
        """Release the model and the device's memory."""
        del self._model, self._base, self._adapter, self._moments, self._loss
        del self._attention, self._compiled, self._selection, self._update, self._offloading
        gc.collect()  # layers and what was put into them refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _train(self, mode: bool) -> None:
        """Set the mode of all modules, thousands of them, where it isn't set: that takes milliseconds."""
        if self._model.training != mode:
            self._model.train(mode)

    def _loss_of(self, micro: MicroBatch) -> torch.Tensor:
        packed = {}
        if is_packed(micro):
            assert isinstance(self._attention, PackedAttention), "a packed batch, and the config says packing: false"
            (micro,) = end_to_end(micro)
            packed = self._attention.arguments(micro)
        index, targets, weight = supervised_positions(micro)
        arrays = (micro.token_ids.astype(np.int64), index.astype(np.int64), targets.astype(np.int64), weight)
        return self._loss(*(send(torch.from_numpy(array), self._device) for array in arrays), packed)

    @contextlib.contextmanager
    def _as_transformers_has_it(self) -> Iterator[None]:
        """Run the model with attention and layers of its own, which know padding, caches and changing shapes."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._loss.autocast())
            for part in (self._attention, self._compiled):
                if part:
                    stack.enter_context(part.suspended())
            yield

    def _pending(self, num_loss_tokens: int, results: torch.Tensor) -> PendingStep:
        if self._device.type != "cuda":
            return PendingStep(num_loss_tokens, results, None)
        host = torch.empty(results.shape, pin_memory=True)
        host.copy_(results, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return PendingStep(num_loss_tokens, host, done)


def _refuse_impossible(config: TrainConfig, device: torch.device, hardware: Hardware, dtype: str) -> None:
    """Raise UserError or MachineError for what the config asks for and the device can't do."""
    if config.activation_offloading and device.type != "cuda":
        raise UserError(
            "activation_offloading: true: moves activations from a card's memory to the host's, and "
            f"{describe(device)} has none of its own; delete it"
        )
    reason = hardware.why_not_compiled(dtype)
    if config.torch_compile and reason:
        raise MachineError(f"torch_compile: true: {describe(device)} can't: {reason}; or delete it")
