"""How a CPU's cores share a step: one MLX stream each, with rows of their own and single-threaded matmuls.

MLX's CPU streams run elementwise work on one thread, nearly half of a step's time; side by side, one stream's
elementwise work hides behind the other's matmuls: 2.3 s against 3.15 s a step of the quickstart on two cores. More
groups of rows than streams trim more padding but read the weights again: 2.5 s with two a stream. A GPU has one
stream, and this file does nothing there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from common.cpus import available_cpus
from common.engine import MicroBatch
from common.layout import is_packed, split_by_length
from common.segments import end_to_end
from mlx_backend.blas import set_blas_threads


def on_this_stream(function: Callable) -> Callable:
    """Let a function run on the stream that is current now.

    MLX derives an operation's gradient on the operation's stream. But what it calls back when gradients are taken, a
    custom function's gradient or a checkpointed function once more, would run on the default one for all rows.
    """
    stream = mx.default_stream(mx.default_device())

    @functools.wraps(function)
    def pinned(*args: Any, **kwargs: Any) -> Any:
        with mx.stream(stream):
            return function(*args, **kwargs)

    return pinned


def custom_gradient(function: Callable, gradient: Callable) -> Callable:
    """Return MLX's custom function of a function and its gradient, which runs on the stream that is current now.

    `gradient` takes primals, cotangents and outputs. To be made anew for each call: see `on_this_stream`.
    """
    custom = mx.custom_function(function)
    custom.vjp(on_this_stream(gradient))
    return custom


def _once_all_are_known(totals: Sequence[mx.array], of_totals: Sequence[mx.array], _: Sequence[mx.array]) -> list:
    """Let no stream begin its backward pass before all have a loss: so MLX puts their heads next to each other.

    It sends a hundred operations ahead, and the streams' are half a layer apart in its order. At the head, where few
    operations take long, one stream would wait for the other: 0.3 s of a step of 2.3.
    """
    return [mx.depends(each, list(totals)) for each in of_totals]


class Streams:
    """Deal the rows of a micro-batch out to the device's streams."""

    def __init__(self, device: mx.Device) -> None:
        """Make a stream for each core of a CPU, or take a GPU's own."""
        self._on_cpu = device.type == mx.cpu
        count = available_cpus() if self._on_cpu else 1
        self._streams = [mx.new_stream(device) for _ in range(count)] if count > 1 else [mx.default_stream(device)]

    def split(self, micro: MicroBatch) -> list[MicroBatch]:
        """Split a micro-batch into the groups of rows that `sum` will compute side by side; drop a CPU's padding."""
        if not self._on_cpu:
            return [micro]
        count = len(self._streams)
        set_blas_threads(1 if count > 1 else available_cpus())
        return end_to_end(micro, count) if is_packed(micro) else split_by_length(micro, count)

    def sum(self, function: Callable[..., mx.array], parts: Sequence[Mapping[str, Any]]) -> mx.array:
        """Add up function(**part) over the parts, each on a stream of its own."""
        totals = []
        for stream, part in zip(self._streams, parts, strict=False):  # a batch may have fewer rows than there are cores
            with mx.stream(stream):
                totals.append(function(**part))
        if len(totals) > 1:
            totals = custom_gradient(lambda *each: each, _once_all_are_known)(*totals)
        return functools.reduce(operator.add, totals)

    def rejoin(self) -> None:
        """Give matmuls all cores again, for generation: it reads all weights for each token and gains nothing here."""
        if self._on_cpu:
            set_blas_threads(available_cpus())
