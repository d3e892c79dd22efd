"""Gradient checkpointing on torch: each decoder layer is computed again in the backward pass.

What is kept then is the input of every layer. With `activation_offloading` it waits in the host's memory, copied by a
stream of its own behind the computation, and comes back one layer before it is needed: for a 3B and 8,192 tokens 1.4 GB
less on the card. Compiled layers checkpoint themselves (torch_backend/compiled.py), but are offloaded here too.
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

LEAST_BYTES = 2**20  # smaller tensors aren't worth a copy


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


class Offloading:
    """Keep the inputs of checkpointed layers on the host between forward and backward."""

    def __init__(self, device: torch.device, width: int) -> None:
        """Take the card and the width of a hidden state."""
        self._stream = torch.cuda.Stream(device)
        self._width = width

    def forward_pass(self) -> contextlib.AbstractContextManager:
        """Return the context that a forward pass runs in; its backward pass may run outside."""
        kept: list[KeptInput] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor | KeptInput:
            if not is_hidden_state(tensor, self._width):
                return tensor
            kept.append(KeptInput(tensor, self._stream, kept[-1] if kept else None))
            return kept[-1]

        def unpack(packed: torch.Tensor | KeptInput) -> torch.Tensor:
            return packed.back() if isinstance(packed, KeptInput) else packed

        return saved_tensors_hooks(pack, unpack)


class KeptInput:
    """Hold one layer's input on the host; asked for it, fetch that of the layer before as well, ahead of its time."""

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream, before: KeptInput | None) -> None:
        self._stream = stream
        self._before = before
        self._device = tensor.device
        self._fetched: torch.Tensor | None = None
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is free for others once the copy is done

    def fetch(self) -> None:
        """Begin to copy the input back."""
        if self._fetched is None:
            with torch.cuda.stream(self._stream):
                self._fetched = self._host.to(self._device, non_blocking=True)

    def back(self) -> torch.Tensor:
        """Return the input on its device."""
        self.fetch()
        tensor, self._fetched = self._fetched, None
        assert tensor is not None
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        tensor.record_stream(torch.cuda.current_stream(self._device))
        if self._before is not None:
            self._before.fetch()
        return tensor


def is_hidden_state(tensor: torch.Tensor, width: int) -> bool:
    """Tell a layer's input (B, T, D) from what else a pass saves: weights, and the angles that all layers share."""
    return tensor.ndim == 3 and tensor.shape[-1] == width and tensor.nbytes >= LEAST_BYTES and tensor.is_cuda
