"""What was written, read back from the disk and held against the source, number by number.

A number may be off by what its format rounds away and no more: nothing where the dtype is the same, half a unit in the
last place of a float, half a step between codes. The bound comes from the scales that are stored beside the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.base.tensors import Tensors
from common.convert.target import Bounded, Target
from common.engine import Array
from common.errors import UserError


@dataclass(frozen=True)
class TensorCheck:
    """Report how many weights were compared, the largest difference, and how much of its bound was ever used."""

    weights: int
    equal: int
    difference: float
    share: float

    def __str__(self) -> str:
        if self.equal == self.weights:
            return f"all {self.weights} weights read back are equal, bit for bit"
        return (
            f"{self.weights} weights read back, {self.equal} of them equal; the others are off by up to "
            f"{self.difference:.2g}, {self.share:.0%} of what their format may round away"
        )


def check_weights(folder: Path, files: Iterable[str], target: Target, advance: Callable[[int], None]) -> TensorCheck:
    """Read every weight back; raises UserError where one is missing or is not what it was to be."""
    written = Tensors([folder / file for file in files])
    planned = {tensor.name: tensor for group in target.groups for tensor in group.tensors}
    if written.keys() != planned.keys():
        raise UserError(
            f"{folder}: holds other tensors than were written: {sorted(written.keys() ^ planned.keys())[0]}"
        )
    equal, difference, share = 0, 0.0, 0.0
    for group in target.groups:
        most = 0.0
        for wanted, found, bound in aligned(target.wanted(group), target.found(group, written)):
            apart = np.abs(wanted - found)
            if not (apart <= bound).all():  # NaN is not
                worst = int(np.argmax(apart - bound))
                raise UserError(
                    f"{written.path(group.tensors[0].name)}: {group.weight} holds {found[worst]:g}, the source "
                    f"{wanted[worst]:g}; expected at most {bound[worst]:.2g} between them"
                )
            if (here := float(apart.max(initial=0.0))) > 0:
                most = max(most, here)
                share = max(share, float(np.divide(apart, bound, where=bound > 0, out=np.zeros_like(apart)).max()))
        difference = max(difference, most)
        equal += most == 0
        advance(group.num_bytes)
    return TensorCheck(len(target.groups), equal, difference, share)


def aligned(wanted: Iterator[Array], found: Iterator[Bounded]) -> Iterator[tuple[Array, Array, Array]]:
    """Bring blocks of two readings into step: flat pieces of the same length, with the bounds of the second.

    Raises UserError where one of them has more numbers.
    """
    left, numbers, bounds = np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.float32)
    while True:
        if not len(left):
            left = next((block.reshape(-1) for block in wanted if block.size), left)
        if not len(numbers):
            block, bound = next(((block, bound) for block, bound in found if block.size), (numbers, bounds))
            numbers, bounds = block.reshape(-1), np.broadcast_to(bound, block.shape).reshape(-1)
        count = min(len(left), len(numbers))
        if not count:
            break
        yield left[:count], numbers[:count], bounds[:count]
        left, numbers, bounds = left[count:], numbers[count:], bounds[count:]
    if len(left) or len(numbers):
        raise UserError("a tensor read back has another number of weights than the source's")
