"""The loss on torch: summed cross-entropy over supervised positions, without ever holding all their logits.

Where the head is frozen its gradient isn't wanted, so the forward pass computes loss and gradient of the hidden states
together, a chunk of rows at a time, in one array: a 3B's logits of 8,192 positions are 2 GB in bfloat16, a chunk's 0.2.
The loss is exact: no gradient is left out. A head that is trained takes the plain way.
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
from torch_backend.head import Head, HeadSelection, finished_

CHUNK_BYTES = 3 * 2**26  # of logits: 768 rows of 128,256 in bfloat16; of 1,024 an H200's products are no faster
# Overwrites what a head gives (N, V) with the loss' derivative by it; returns the loss of each row, in float32.
ErrorFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AfterHead], torch.Tensor]


class LossFunction:
    """Compute the summed loss of one micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        selection: HeadSelection,
        head: Head | None,
        dtype: str,
        device: torch.device,
        triton: bool,
    ) -> None:
        """Take the frozen head, or None for one that is trained; `triton` says that there is one on a card it knows."""
        self._model = model
        self._selection = selection
        self._head = head
        self._overwrite = in_one_kernel() if triton else softmax_error_
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
        return LinearCrossEntropy.apply(hidden, self._head, targets, counted, self._overwrite)

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
        ctx: Any,
        hidden: torch.Tensor,
        head: Head,
        targets: torch.Tensor,
        counted: torch.Tensor,
        overwrite: ErrorFunction,
    ) -> torch.Tensor:
        """Map hidden states (N, D), targets (N,) and weights (N,) to the loss in nats, a float32 scalar."""
        rows = chunk_rows(len(head.weight), CHUNK_BYTES, head.weight.itemsize)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            output = F.linear(hidden[part], head.weight, head.bias)
            losses[part] = overwrite(output, targets[part], counted[part], head.after)
            if gradient is not None:
                torch.mm(output, head.weight, out=gradient[part])
            del output  # or the next chunk's would be made beside it
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradient (N, D) that forward left."""
        (gradient,) = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype), None, None, None, None)


def in_one_kernel() -> ErrorFunction:
    """Return what Triton has in place of `softmax_error_`."""
    from torch_backend.loss_kernel import softmax_error_

    return softmax_error_


def softmax_error_(
    output: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, after: AfterHead
) -> torch.Tensor:
    """Overwrite a head's output (N, V) with the loss' derivative by it, and return the loss of each row (N,).

    The derivative is (softmax - one-hot) * counted * factor, and by a soft cap c tanh(z / c) another 1 - tanh(z / c)^2.
    """
    values = finished_(output, after)
    total = values.logsumexp(-1, keepdim=True)
    losses = (total - values.gather(1, targets[:, None]))[:, 0] * counted
    slope = None if after.soft_cap is None else (values / after.soft_cap).square_().neg_().add_(1)
    error = values.sub_(total).exp_()
    error.scatter_add_(1, targets[:, None], torch.full_like(total, -1))
    error.mul_((counted * after.factor)[:, None])
    output.copy_(error if slope is None else error.mul_(slope))
    return losses
