"""How tokens stand in a micro-batch, and the rearrangements an engine may make without changing a sum.

Rows are padded to one of few lengths (eight an octave, at most an eighth of padding) because MLX traces a graph
for every shape.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from common.data.tokens import TokenDataset
from common.engine import Array, MicroBatch

LIKE_LENGTH = 0.75  # examples at least this share of the longest are computed side by side with it


def padded_length(length: int, smallest: int = 16) -> int:
    """Round a length up to one of eight an octave, at least `smallest` apart."""
    step = max(smallest, 2 ** math.floor(math.log2(max(length, 1))) // 8)
    return math.ceil(length / step) * step


def make_micro_batch(data: TokenDataset, rows: Sequence[Sequence[int] | Array]) -> MicroBatch:
    """Lay out rows of examples as (B, T): inputs are all but the last token of each, targets all but the first."""
    counts = np.array([len(row) for row in rows])
    examples = np.concatenate([np.asarray(row, np.int64) for row in rows])
    row_of, first = np.repeat(np.arange(len(rows)), counts), np.repeat(np.cumsum(counts) - counts, counts)
    lengths = data.lengths[examples].astype(np.int64) - 1
    begins = np.cumsum(lengths) - lengths  # where each example would begin, were all rows one
    shape = (len(rows), padded_length(int(np.bincount(row_of, lengths).max())))
    positions = np.arange(lengths.sum()) - np.repeat(begins, lengths)
    source = np.repeat(data.starts[examples], lengths) + positions
    place = np.repeat(row_of * shape[1] + begins - begins[first], lengths) + positions
    segments = np.repeat(np.arange(len(examples)) - first + 1, lengths)

    def laid_out(values: Array, dtype: type) -> Array:
        array: Array = np.zeros(shape, dtype)
        array.reshape(-1)[place] = values
        return array

    return MicroBatch(
        laid_out(data.token_ids[source], np.int32),
        laid_out(data.token_ids[source + 1], np.int32),
        laid_out(segments, np.int32),
        laid_out(positions, np.int32),
        laid_out(data.loss_mask[source + 1], np.bool_),
    )


def supervised_positions(batch: MicroBatch) -> tuple[Array, Array, Array]:
    """Return where the loss is taken: flat positions into (B * T), their targets, and weights 1 or 0.

    All are (N,) with N rounded up to one of few lengths; what is padding has weight 0. Logits for these positions
    are all that the loss needs, a half or less of them where only answers are trained.
    """
    flat = np.flatnonzero(batch.loss_mask)
    size = padded_length(max(len(flat), 1))
    index, weight = np.zeros(size, np.int32), np.zeros(size, np.float32)
    index[: len(flat)] = flat
    weight[: len(flat)] = 1
    return index, batch.targets.reshape(-1)[index].astype(np.int32), weight


def split_by_length(batch: MicroBatch, parts: int) -> list[MicroBatch]:
    """Split a micro-batch into groups of rows of like length, each cut to its own longest row.

    The sums over the groups are those over the whole; what is saved is padding, a fifth of the tokens of short
    examples. MLX computes the groups side by side on a CPU.
    """
    lengths = (batch.segment_ids > 0).sum(axis=1)
    groups = np.array_split(np.argsort(lengths, kind="stable"), min(parts, len(lengths)))
    return [_select(batch, (rows, slice(padded_length(int(lengths[rows].max()), smallest=8)))) for rows in groups]


def is_packed(batch: MicroBatch) -> bool:
    """Tell whether a row holds more than one example."""
    return int(batch.segment_ids.max()) > 1


def end_to_end(batch: MicroBatch, parts: int = 1) -> list[MicroBatch]:
    """Lay the examples of a micro-batch one after the other into a row (1, N) without padding, or several.

    Several rows get about as many tokens each, and examples of like length; `segment_ids` count from 1 in each.
    """
    spans = _spans(batch)
    lengths = spans[:, 1] - spans[:, 0]
    shortest_first = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[shortest_first])
    part_of = (2 * ends - lengths[shortest_first]) * parts // (2 * ends[-1])  # where the middle of an example falls
    groups = (
        [np.sort(shortest_first[part_of == part]) for part in range(parts)] if parts > 1 else [np.arange(len(spans))]
    )
    return [_concatenated(batch, spans[group]) for group in groups if len(group)]


def example_lengths(row: MicroBatch) -> Array:
    """Return the lengths of the examples of a row that `end_to_end` made."""
    return np.bincount(row.segment_ids[0])[1:]


def side_by_side(lengths: Array) -> list[Array]:
    """Arrange examples that stand end to end as rows again, those of like length together.

    Returns an index (S, T) into the row for each group of S examples, T the longest of them; padding is -1. Padding
    is at most a quarter, for at most as many groups as lengths fall by a quarter.
    """
    starts = np.cumsum(lengths) - lengths
    longest_first = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = []
    for example in longest_first:
        if not groups or lengths[example] < LIKE_LENGTH * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(int(example))
    indices = []
    for group in groups:
        columns = np.arange(lengths[group].max())
        inside = columns < lengths[group][:, None]
        indices.append(np.where(inside, starts[group][:, None] + columns, -1).astype(np.int32))
    return indices


def _spans(batch: MicroBatch) -> Array:
    """Return [start, stop) of every example in the flat arrays (B * T), (examples, 2)."""
    rows, width = batch.segment_ids.shape
    numbered = np.where(batch.segment_ids > 0, batch.segment_ids + np.arange(rows)[:, None] * (width + 1), 0).reshape(
        -1
    )
    edges = [0, *(np.flatnonzero(np.diff(numbered)) + 1).tolist(), len(numbered)]
    return np.array([(start, stop) for start, stop in itertools.pairwise(edges) if numbered[start]])


def _concatenated(batch: MicroBatch, spans: Array) -> MicroBatch:
    lengths = spans[:, 1] - spans[:, 0]
    index = np.concatenate([np.arange(start, stop) for start, stop in spans])
    segments = np.repeat(np.arange(1, len(spans) + 1, dtype=np.int32), lengths)
    arrays = (batch.token_ids, batch.targets, batch.position_ids, batch.loss_mask)
    token_ids, targets, positions, loss_mask = (array.reshape(-1)[index][None] for array in arrays)
    return MicroBatch(token_ids, targets, segments[None], positions, loss_mask)


def _select(batch: MicroBatch, place: tuple) -> MicroBatch:
    rows, columns = place
    arrays = (batch.token_ids, batch.targets, batch.segment_ids, batch.position_ids, batch.loss_mask)
    return MicroBatch(*(array[rows, columns] for array in arrays))
