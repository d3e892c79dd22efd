"""Where an array came from, so that who needs it in the backward pass can keep that instead and compute it again."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

Compute = Callable[[mx.array], mx.array]


class Origin:
    """Remember what the last norm was given; who reads its output comes right after it.

    One array is remembered and not all: what Python holds on to, MLX can't free.
    """

    def __init__(self) -> None:
        self.followed = False  # whether a gradient will be taken
        self._last: tuple[mx.array, mx.array, Compute] | None = None

    def note(self, source: mx.array, compute: Compute) -> mx.array:
        """Return compute(source), and remember that it is."""
        result = compute(source)
        self._last = (result, source, compute) if self.followed else None
        return result

    def of(self, x: mx.array) -> tuple[mx.array, Compute]:
        """Return an array and the function that makes x of it: x itself and nothing to do, where x is not known.

        No gradient goes into that array: whoever takes it gives x one. MLX would add its zeros up like any other.
        """
        if self._last is None or self._last[0] is not x:
            return mx.stop_gradient(x), lambda x: x
        _, source, compute = self._last
        return mx.stop_gradient(source), compute

    def forget(self) -> None:
        """Let go of what was remembered."""
        self._last = None
