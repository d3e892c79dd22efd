"""The loss on MLX: summed cross-entropy over supervised positions, without ever holding all their logits.

Where the head is frozen its gradient isn't wanted, so one pass computes loss and gradient of the hidden states
together, a chunk of rows at a time, each in its turn; what MLX derives by itself keeps four arrays the size of all
logits, 17 GB for a 3B and 8,192 positions. It is exact: no gradient is left out. A head that is trained takes the plain
way. MLX's sums on a CPU run in one float32 accumulator, which is off by 5e-5 over a vocabulary of 49,152 (measured);
long sums are taken in two levels here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from common.flat import FlatLayout
from common.logits import AfterHead, chunk_rows
from mlx_backend.arrangement import Arrangement, Masked
from mlx_backend.attention import Packing
from mlx_backend.exponential import fast_exp
from mlx_backend.head import Head, HeadSelection, finished
from mlx_backend.lora import Adapter
from mlx_backend.origin import Origin
from mlx_backend.streams import custom_gradient

CHUNK_BYTES = 2**27  # of float32 logits
CACHED = 2**18  # of them, a megabyte, are in a core's cache


class LossFunction:
    """Compute the summed loss of one micro-batch as a pure function of the adapter's weights."""

    def __init__(
        self,
        model: nn.Module,
        selection: HeadSelection,
        head: Head | None,
        packing: Packing,
        origin: Origin,
        adapter: Adapter,
        layout: FlatLayout,
    ) -> None:
        """Take the frozen head, or None for one that is trained."""
        self._model = model
        self._selection = selection
        self._head = head
        self._head_loss = frozen_head_loss(head) if head else None
        self._packing = packing
        self._origin = origin
        self._adapter = adapter
        self._layout = layout
        self._dtypes = adapter.dtypes()

    def split(self, flat: mx.array) -> dict[str, mx.array]:
        """View a flat buffer as the adapter's tensors, each in the dtype that it is computed with."""
        rounded = {dtype: flat.astype(dtype) for dtype in set(self._dtypes.values())}
        return {key: rounded[self._dtypes[key]][place].reshape(shape) for key, place, shape in self._layout.slices()}

    def join(self, tensors: Mapping[str, mx.array]) -> mx.array:
        """Concatenate the adapter's tensors into a flat buffer in float32."""
        return mx.concatenate([tensors[key].reshape(-1) for key in self._layout.shapes]).astype(mx.float32)

    def __call__(
        self,
        weights: Mapping[str, mx.array],
        token_ids: mx.array,
        positions: mx.array,
        targets: mx.array,
        counted: mx.array,
        dropout_key: mx.array | None = None,
        masking: Mapping[str, Any] | None = None,
        arrangement: Arrangement | None = None,
        training: bool = True,
    ) -> mx.array:
        """Sum the cross-entropy in nats over `positions` (N,) of `token_ids` (B, T), weighted by `counted` (N,).

        Rows of several examples come with what `arrangement.masking` says of them, or with a ready arrangement. A
        gradient can be taken in `training` alone.
        """
        self._adapter.bind(weights, dropout_key)
        self._origin.followed = training
        selection = self._selection
        selection.positions, selection.leave_out = positions, self._head is not None
        with self._packing.follow(arrangement if masking is None else Masked(masking)):
            logits = self._model(token_ids)
        self._origin.forget()
        hidden = selection.hidden
        selection.positions, selection.leave_out, selection.hidden = None, False, None
        if self._head is None or self._head_loss is None:
            return (cross_entropy(logits.astype(mx.float32), targets) * counted).sum()
        if not training:
            return loss_alone(hidden, targets, counted, self._head)
        return self._head_loss(hidden, targets, counted, self._head.arrays)[0]


def frozen_head_loss(head: Head) -> Callable[..., tuple[mx.array, mx.array]]:
    """Return f(hidden (N, D), targets (N,), counted (N,), head's arrays) -> loss in nats, gradient of hidden (N, D).

    Each chunk depends on loss and gradient of the one before, lest the temporaries of all live at once. Who has the
    loss has the gradient, too (mlx_backend/streams.py relies on it).
    """

    def head_loss(
        hidden: mx.array, targets: mx.array, counted: mx.array, arrays: Mapping[str, mx.array]
    ) -> tuple[mx.array, mx.array]:
        def output(chunk: mx.array) -> mx.array:
            return head.output(chunk, arrays)

        loss, gradients = mx.array(0.0), []
        counted = counted * 1.0  # on the device: of the host's array each chunk fetched its page (H200: 177 us)
        for part in chunks(hidden, head):
            chunk = mx.depends(hidden[part], [loss, gradients[-1]]) if gradients else hidden[part]
            part_loss, error = softmax_error(output(chunk), targets[part], counted[part], head.after)
            loss = loss + part_loss
            gradients += mx.vjp(output, [chunk], [error])[1]
        gradient = mx.concatenate(gradients) if len(gradients) > 1 else gradients[0]
        return mx.depends(loss, gradient), gradient

    def head_gradient(primals: tuple, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> tuple:
        gradient = outputs[1]
        hidden = gradient * cotangents[0].astype(gradient.dtype)
        return hidden, *tree_map(mx.zeros_like, primals[1:])

    return lambda *inputs: custom_gradient(head_loss, head_gradient)(*inputs)


def loss_alone(hidden: mx.array, targets: mx.array, counted: mx.array, head: Head) -> mx.array:
    """Return the loss in nats of hidden states (N, D), a chunk after the other."""
    loss = mx.array(0.0)
    for part in chunks(hidden, head):
        output = head.output(mx.depends(hidden[part], loss), head.arrays)
        loss = loss + softmax_error(output, targets[part], counted[part], head.after)[0]
    return loss


def chunks(hidden: mx.array, head: Head) -> Iterator[slice]:
    """Return the rows (N, D) whose float32 logits fill a chunk."""
    return slices(len(hidden), chunk_rows(head.vocabulary, CHUNK_BYTES))


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut a length into parts of a size, the last of what is left."""
    return (slice(start, start + size) for start in range(0, length, size))


def softmax_error(
    output: mx.array, targets: mx.array, counted: mx.array, after: AfterHead
) -> tuple[mx.array, mx.array]:
    """Return the summed loss and its derivative by the head's output (N, V), in that output's dtype.

    The derivative is (softmax - one-hot) * counted * factor, and by a soft cap c tanh(z / c) another 1 - tanh(z / c)^2.
    """
    at, scale = targets[:, None], (counted * after.factor)[:, None]
    chosen = finished(mx.take_along_axis(output, at, axis=-1), after)
    values, error, logarithm = _scaled_softmax(output, scale, after)
    error_of_chosen = (mx.exp(chosen - logarithm) - 1) * scale
    if after.soft_cap is not None:
        error = error * (1 - mx.square(values / after.soft_cap))
        error_of_chosen = error_of_chosen * (1 - mx.square(chosen / after.soft_cap))
    # Put in, not subtracted: after rounding, or one more pass over float32 numbers.
    error = mx.put_along_axis(error.astype(output.dtype), at, error_of_chosen.astype(output.dtype), axis=-1)
    return ((logarithm - chosen)[:, 0] * counted).sum(), error


def _scaled_softmax(output: mx.array, scale: mx.array, after: AfterHead) -> tuple[mx.array, mx.array, mx.array]:
    """Return logits of a head's output, scale * their softmax, both (N, V), and the logarithm of its divisor (N, 1)."""
    values = finished(output, after)
    if mx.default_device().type == mx.gpu:
        # Exponentials are computed twice: there that takes less time than to write and read them.
        logarithm = mx.logsumexp(values, axis=-1, keepdims=True)
        values = finished(mx.depends(output, logarithm), after)
        return values, mx.exp(values - logarithm) * scale, logarithm
    return values, *_softmax_of_few(values, scale)


def _softmax_of_few(values: mx.array, scale: mx.array) -> list[mx.array]:
    """Return scale * softmax and logarithm as `_scaled_softmax` does, a few rows after the other, which a cache holds.

    Of 90 rows of 49,152 logits that takes a CPU 25 ms, where all at once take 57, and 73 with MLX's exponential.
    """
    parts: list[tuple[mx.array, mx.array]] = []
    for rows in slices(len(values), max(1, CACHED // values.shape[-1])):
        few = mx.depends(values[rows], list(parts[-1])) if parts else values[rows]
        highest = few.max(axis=-1, keepdims=True)
        exponentials = fast_exp(few - highest)
        total = two_level_sum(exponentials)[:, None]
        parts.append((exponentials * (scale[rows] / total), mx.log(total) + highest))
    return [mx.concatenate(each) for each in zip(*parts, strict=True)]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return -log softmax(logits)[target] in nats, (N,), for float32 logits (N, V)."""
    highest = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = two_level_sum(mx.exp(logits - highest))
    return mx.log(total) + (highest - mx.take_along_axis(logits, targets[:, None], axis=-1))[:, 0]


def two_level_sum(array: mx.array) -> mx.array:
    """Sum over the last axis in blocks, then over the blocks: the rounding error grows with the root of its length."""
    length = array.shape[-1]
    block = math.gcd(length, 2 ** max(0, round(math.log2(max(length, 1)) / 2)))
    if block * block * 64 < length:  # no good divisor: pad to one
        block = 256
        array = mx.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -length % block)])
    return array.reshape(*array.shape[:-1], -1, block).sum(axis=-1).sum(axis=-1)
