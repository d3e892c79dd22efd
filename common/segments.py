"""The segments of packed rows laid end to end, as attention wants them: each example by itself, no padding.

A segment is a whole example, a beginning that several examples share, or one of these examples without it
(common/prefixes.py): then its positions begin where the shared ones end, and it sees these before its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from common.engine import Array, MicroBatch

LIKE_LENGTH = 0.75  # segments at least this share of the longest are computed side by side with it


@dataclass(frozen=True)
class Segments:
    """Say where the segments of a row (1, N) stand, and what each sees before itself: int64 (segments,) each."""

    starts: Array
    lengths: Array
    prefixes: Array  # number of the segment that this one continues, its own where it continues none
    prefix_lengths: Array  # 0 where it continues none

    @classmethod
    def of(cls, row: MicroBatch) -> Segments:
        """Read them from a row that `end_to_end` made."""
        lengths = np.bincount(row.segment_ids[0])[1:]
        starts = np.cumsum(lengths) - lengths
        begins = row.position_ids[0][starts].astype(np.int64)
        return cls(starts, lengths, _continued(begins), begins)

    def seen(self) -> Array:
        """Return where in the row the keys of each segment stand, its prefix first, all end to end."""
        starts, lengths = (
            np.column_stack(pair).reshape(-1)
            for pair in ((self.starts[self.prefixes], self.starts), (self.prefix_lengths, self.lengths))
        )
        ends = np.cumsum(lengths)
        return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def end_to_end(batch: MicroBatch, parts: int = 1) -> list[MicroBatch]:
    """Lay the segments of a micro-batch one after the other into a row (1, N) without padding, or several.

    Several rows get about as many tokens each, and examples of like length; what examples share stands in each row
    that has one of them. `segment_ids` count from 1 in each.
    """
    spans, begins = _spans(batch)
    prefixes = _continued(begins)
    examples = np.setdiff1d(np.arange(len(spans)), prefixes[begins > 0])
    lengths = (spans[:, 1] - spans[:, 0])[examples]
    shortest_first = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[shortest_first])
    part_of = (2 * ends - lengths[shortest_first]) * parts // (2 * ends[-1])  # where the middle of an example falls
    groups = [examples[shortest_first[part_of == part]] for part in range(parts)] if parts > 1 else [examples]
    # In the order of the batch each shared beginning comes right before the examples that continue it.
    return [_concatenated(batch, spans[np.union1d(group, prefixes[group])]) for group in groups if len(group)]


def side_by_side(segments: Segments) -> list[tuple[Array, int]]:
    """Arrange segments that stand end to end as whole examples again, those of like length together.

    Returns for each group of S segments that continue the same one, or none, an index (S, P + T) into the row and P:
    the P positions that they continue, then their own, T the longest of them; padding is -1. Padding is at most a
    quarter of what is their own, for at most as many groups as lengths fall by a quarter.
    """
    continued = np.where(segments.prefix_lengths > 0, segments.prefixes, -1)
    groups: list[list[int]] = []
    for number in np.lexsort((-segments.lengths, continued)).tolist():
        first = groups[-1][0] if groups else None
        if (
            first is None
            or continued[number] != continued[first]
            or segments.lengths[number] < LIKE_LENGTH * segments.lengths[first]
        ):
            groups.append([])
        groups[-1].append(number)
    arranged = []
    for group in groups:
        columns = np.arange(segments.lengths[group].max())
        inside = columns < segments.lengths[group][:, None]
        own = np.where(inside, segments.starts[group][:, None] + columns, -1)
        shared = int(segments.prefix_lengths[group[0]])
        before = np.broadcast_to(segments.starts[segments.prefixes[group[0]]] + np.arange(shared), (len(group), shared))
        arranged.append((np.hstack([before, own]).astype(np.int32), shared))
    return arranged


def bound(length: int) -> int:
    """Return the next power of two: a compiler makes a graph for each bound, so there are to be few."""
    return 1 << (length - 1).bit_length()


def _continued(begins: Array) -> Array:
    """Return the segment that each continues, by the position at which each begins: the last before it that is at 0."""
    numbers = np.arange(len(begins))
    return np.where(begins > 0, np.maximum.accumulate(np.where(begins == 0, numbers, 0)), numbers)


def _spans(batch: MicroBatch) -> tuple[Array, Array]:
    """Return [start, stop) of every segment in the flat arrays (B * T), (segments, 2), and its first position."""
    rows, width = batch.segment_ids.shape
    numbered = np.where(batch.segment_ids > 0, batch.segment_ids + np.arange(rows)[:, None] * (width + 1), 0).reshape(
        -1
    )
    edges = [0, *(np.flatnonzero(np.diff(numbered)) + 1).tolist(), len(numbered)]
    spans = np.array([(start, stop) for start, stop in itertools.pairwise(edges) if numbered[start]])
    return spans, batch.position_ids.reshape(-1)[spans[:, 0]]


def _concatenated(batch: MicroBatch, spans: Array) -> MicroBatch:
    lengths = spans[:, 1] - spans[:, 0]
    index = np.concatenate([np.arange(start, stop) for start, stop in spans])
    segments = np.repeat(np.arange(1, len(spans) + 1, dtype=np.int32), lengths)
    arrays = (batch.token_ids, batch.targets, batch.position_ids, batch.loss_mask)
    token_ids, targets, positions, loss_mask = (array.reshape(-1)[index][None] for array in arrays)
    return MicroBatch(token_ids, targets, segments[None], positions, loss_mask)
