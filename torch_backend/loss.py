"""The loss on torch: summed cross-entropy over supervised positions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torch_backend.model import DTYPES, HeadSelection


class LossFunction:
    """Compute the summed loss of one micro-batch."""

    def __init__(self, model: nn.Module, selection: HeadSelection, dtype: str, device: torch.device) -> None:
        self._model = model
        self._selection = selection
        self._dtype = DTYPES[dtype]
        self._device = device

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        packed: Mapping[str, Any],
    ) -> torch.Tensor:
        """Sum the cross-entropy in nats over `positions` (N,) of `token_ids` (B, T), weighted by `counted` (N,).

        `packed` is what torch_backend/attention.py needs for a row of several examples, else empty.
        """
        self._selection.positions = positions
        with self.autocast():
            # Padding is on the right and attention causal: no real token can see it, so no mask is needed.
            logits = self._model(input_ids=token_ids, use_cache=False, **packed).logits
        self._selection.positions = None
        return (F.cross_entropy(logits.float(), targets, reduction="none") * counted).sum()

    def autocast(self) -> contextlib.AbstractContextManager:
        """Run matmuls of the float32 adapter in the dtype of the activations."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)
