"""Which examples share a row, and in which order the rows of an epoch come: a pure function of (lengths, seed, epoch).

A row is one example, and every epoch visits the rows in a permutation drawn from (seed, epoch); with
`group_by_length` the examples of a step are of like length. With `packing` a row holds several whole examples,
packed once a run over the whole data set (2 microseconds an example) so that every epoch has as many steps. The
cost of random access: the order of one epoch is kept, 16 bytes an example.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.engine import Array
from common.prefixes import Prefixes

LONG = 4  # an example is long that takes more than this fraction of a row
MEGABATCH = 50  # steps whose examples are sorted together by `group_by_length`, as many as transformers takes


@dataclass(frozen=True)
class Rows:
    """Hold the examples of every row: those of row i are members[offsets[i]:offsets[i + 1]]."""

    members: Array  # int64 (examples,)
    offsets: Array  # int64 (rows + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        return self.members[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[row] for row in range(len(self)))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Put rows after rows."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(np.concatenate([part.members for part in parts]), _offsets(counts))

    def reordered(self, order: Array) -> Rows:
        """Return the rows in another order."""
        counts = np.diff(self.offsets)[order]
        offsets = _offsets(counts)
        within = np.arange(len(self.members)) - np.repeat(offsets[:-1], counts)
        return Rows(self.members[np.repeat(self.offsets[:-1][order], counts) + within], offsets)


class RowOrder:
    """Know the rows of every epoch; their number is the same in each."""

    def __init__(
        self,
        lengths: Array,
        seed: int,
        capacity: int | None = None,
        group: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        """Order examples of `lengths` positions: packed into rows of `capacity`, or like lengths `group` at a time.

        Examples with `prefixes` share packed rows with others of their group alone.
        """
        self._lengths = lengths
        self._seed = seed
        self._group = group
        self._packed = None
        if capacity:
            self._packed = pack(lengths, capacity, np.random.default_rng(seed).permutation(len(lengths)), prefixes)
        self._epoch = -1
        self._rows = self.of_epoch(0)

    def __len__(self) -> int:
        return len(self._rows)

    def of_epoch(self, epoch: int) -> Rows:
        """Return the rows of an epoch, counted from 0."""
        if epoch != self._epoch:
            self._rows, self._epoch = self._draw(epoch), epoch
        return self._rows

    def _draw(self, epoch: int) -> Rows:
        rng = np.random.default_rng([self._seed, epoch])
        if self._packed:
            return self._packed.reordered(rng.permutation(len(self._packed)))
        order = rng.permutation(len(self._lengths))
        return single(group_by_length(self._lengths, order, self._group, rng) if self._group else order)


def single(order: Array) -> Rows:
    """Give each example a row of its own."""
    return Rows(order, np.arange(len(order) + 1))


def group_by_length(lengths: Array, order: Array, group: int, rng: np.random.Generator) -> Array:
    """Reorder examples so that each `group` in turn is of like length; the last group stays the short one.

    As transformers' LengthGroupedSampler, megabatches of the shuffled examples are sorted; the groups are then
    shuffled, or every megabatch would go from long to short.
    """
    span = group * MEGABATCH
    parts = [order[start : start + span] for start in range(0, len(order), span)]
    ordered = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    whole = len(ordered) // group
    shuffled = ordered[: whole * group].reshape(whole, group)[rng.permutation(whole)]
    return np.concatenate([shuffled.reshape(-1), ordered[whole * group :]])


def pack(lengths: Array, capacity: int, order: Array, prefixes: Prefixes | None = None) -> Rows:
    """Pack examples into few rows of at most `capacity` positions, each into the tightest row that takes it.

    A row holds examples of one group of `prefixes`, and what these share once. Long examples come first, from long to
    short, which is best-fit decreasing (Johnson, 1973). The short ones, which fit anywhere, come in the given order:
    sorted too, a row would hold examples of one length, thus of one kind, and a model learns visibly less from such
    batches (measured: 24% exact answers in place of 39%).
    """
    prefixes = prefixes or Prefixes.none(len(lengths))
    own, groups = lengths - prefixes.lengths, prefixes.groups[order]
    by_group = np.argsort(groups, kind="stable")
    parts = np.split(order[by_group], np.flatnonzero(np.diff(groups[by_group])) + 1)
    return Rows.joined([_pack_alike(own, capacity - prefixes.lengths[part].max(initial=0), part) for part in parts])


def _pack_alike(lengths: Array, capacity: int, order: Array) -> Rows:
    is_long = lengths[order] * LONG > capacity
    long, short = order[is_long], order[~is_long]
    placed = np.concatenate([long[np.argsort(-lengths[long], kind="stable")], short])
    row_of = _best_fit(lengths[placed].tolist(), capacity)
    by_row = np.argsort(row_of, kind="stable")
    return Rows(placed[by_row], _offsets(np.bincount(row_of)))


def _best_fit(lengths: Sequence[int], capacity: int) -> Array:
    """Return the row of each length: the one with the least room that takes it, else a new one."""
    row_of = np.empty(len(lengths), np.int64)
    sizes: list[int] = []  # amounts of room that some row has, ascending
    rows: dict[int, list[int]] = {}  # those rows, by amount
    num_rows = 0
    for index, length in enumerate(lengths):
        at = bisect.bisect_left(sizes, length)
        if at < len(sizes):
            size = sizes[at]
            row = rows[size].pop()
            if not rows[size]:
                del rows[size], sizes[at]
        else:
            size, row, num_rows = capacity, num_rows, num_rows + 1
        row_of[index] = row
        left = size - length
        assert left >= 0, f"an example of {length} positions for rows of {capacity}"
        if left in rows:
            rows[left].append(row)
        elif left:
            bisect.insort(sizes, left)
            rows[left] = [row]
    return row_of


def _offsets(counts: Array) -> Array:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
