"""One buffer for all adapter tensors: where each lies in it, and the way there and back.

Both engines keep weights, moments and gradients of the whole adapter in one flat float32 array each, so that
clipping and AdamW are a handful of operations instead of one per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from common.engine import Array


@dataclass(frozen=True)
class FlatLayout:
    """Know the order and shapes of tensors in a flat buffer of `size` elements."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Count the elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def slices(self) -> Iterator[tuple[str, slice, tuple[int, ...]]]:
        """Yield key, place in the buffer, and shape of each tensor."""
        start = 0
        for key, shape in self.shapes.items():
            stop = start + math.prod(shape)
            yield key, slice(start, stop), shape
            start = stop

    def flatten(self, tensors: Mapping[str, Array]) -> Array:
        """Copy tensors into one float32 buffer; keys and shapes must be exactly those of the layout."""
        assert tensors.keys() == self.shapes.keys(), "the tensors are not those of this adapter"
        flat = np.empty(self.size, np.float32)
        for key, place, shape in self.slices():
            assert tensors[key].shape == shape, f"{key}: {tensors[key].shape}, expected {shape}"
            flat[place] = tensors[key].reshape(-1)
        return flat

    def unflatten(self, flat: Array) -> dict[str, Array]:
        """Split a buffer into tensors, as views."""
        return {key: flat[place].reshape(shape) for key, place, shape in self.slices()}
