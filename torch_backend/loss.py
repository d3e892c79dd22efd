"""The loss on torch: summed cross-entropy over supervised positions, without ever holding all their logits.

Where the head is frozen its gradient isn't wanted, so the forward pass computes loss and gradient of the hidden states
together, a chunk of rows at a time: a 3B's logits of 8,192 positions are 4 GB in float32, a chunk's 0.3. The loss is
exact: no gradient is left out. A head that is trained takes the plain way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common.logits import AfterHead, chunk_rows
from torch_backend.attention import fastest_kernels
from torch_backend.device import DTYPES, look_at
from torch_backend.head import Head, HeadSelection, finished

CHUNK_BYTES = 2**28  # of float32 logits


class LossFunction:
    """Compute the summed loss of one micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        selection: HeadSelection,
        head: Head | None,
        dtype: str,
        device: torch.device,
        compiled: bool,
    ) -> None:
        """Take the frozen head, or None for one that is trained; `compiled` fuses what is done to its logits."""
        self._model = model
        self._selection = selection
        self._head = head
        self._softmax_error = compiled_error() if compiled else softmax_error
        self._dtype = DTYPES[dtype]
        self._device = device
        self._hardware = look_at(device)

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
        with self._selecting(positions), self.autocast(), fastest_kernels(self._hardware):
            # Padding is on the right and attention causal: no real token can see it, so no mask is needed.
            logits = self._model(input_ids=token_ids, use_cache=False, **packed).logits
            hidden = self._selection.hidden
        if self._head is None:
            return (F.cross_entropy(logits.float(), targets, reduction="none") * counted).sum()
        return LinearCrossEntropy.apply(hidden, self._head, targets, counted, self._softmax_error)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Run matmuls of the float32 adapter in the dtype of the activations."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    @contextlib.contextmanager
    def _selecting(self, positions: torch.Tensor) -> Any:
        self._selection.positions, self._selection.leave_out = positions, self._head is not None
        try:
            yield
        finally:
            self._selection.positions, self._selection.leave_out, self._selection.hidden = None, False, None


class LinearCrossEntropy(torch.autograd.Function):
    """Sum the cross-entropy of a frozen head in chunks of rows; the gradient is ready when the loss is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor, counted: torch.Tensor, error_of: Callable
    ) -> torch.Tensor:
        """Map hidden states (N, D), targets (N,) and weights (N,) to the loss in nats, a float32 scalar."""
        rows = chunk_rows(len(head.weight), CHUNK_BYTES)
        loss = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], head.weight, head.bias)
            part_loss, error = error_of(logits, targets[part], counted[part], head.after)
            loss += part_loss
            if gradient is not None:
                torch.mm(error, head.weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradient (N, D) that forward left."""
        (gradient,) = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype), None, None, None, None)


def compiled_error() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Compile `softmax_error` for any number of rows; for any vocabulary its kernel would take half as long again."""
    compiled = torch.compile(softmax_error)

    def error_of(
        output: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, after: AfterHead
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch._dynamo.mark_static(output, 1)
        for array in (output, targets, counted):
            torch._dynamo.maybe_mark_dynamic(array, 0)
        return compiled(output, targets, counted, after)

    return error_of


def softmax_error(
    output: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, after: AfterHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and its derivative by the head's output (N, V), in that output's dtype.

    The derivative is (softmax - one-hot) * counted * factor, and by a soft cap c tanh(z / c) another 1 - tanh(z / c)^2.
    """
    values = finished(output, after)
    total = values.logsumexp(-1, keepdim=True)
    loss = ((total - values.gather(1, targets[:, None]))[:, 0] * counted).sum()
    is_target = torch.arange(values.shape[1], device=values.device) == targets[:, None]
    error = ((values - total).exp() - is_target.float()) * (counted * after.factor)[:, None]
    if after.soft_cap is not None:
        error = error * (1 - (values / after.soft_cap).square())
    return loss, error.to(output.dtype)
