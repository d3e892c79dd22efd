"""How tokens stand in a micro-batch, and the rearrangements an engine may make without changing a sum.

Rows are padded to one of few lengths (eight an octave, at most an eighth of padding) because MLX traces a graph
for every shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from common.data.tokens import TokenDataset
from common.engine import Array, MicroBatch


def padded_length(length: int, smallest: int = 16) -> int:
    """Round a length up to one of eight an octave, at least `smallest` apart."""
    step = max(smallest, 2 ** math.floor(math.log2(max(length, 1))) // 8)
    return math.ceil(length / step) * step


def make_micro_batch(
    data: TokenDataset, rows: Sequence[Sequence[int] | Array], prefixes: Array | None = None
) -> MicroBatch:
    """Lay out rows of examples as (B, T): inputs are all but the last token of each, targets all but the first.

    The examples of a row have their first `prefixes[example]` tokens in common: these open it, once, as a segment of
    their own.
    """
    examples, row_of, begins, ends = _segments(data, rows, prefixes)
    first = np.searchsorted(row_of, row_of)  # segment of its row
    lengths = ends - begins
    before = np.cumsum(lengths) - lengths  # positions, were all rows one
    shape = (len(rows), padded_length(int(np.bincount(row_of, lengths).max())))
    positions = np.arange(lengths.sum()) - np.repeat(before - begins, lengths)
    source = np.repeat(data.starts[examples], lengths) + positions
    place = np.repeat(row_of * shape[1] - before[first], lengths) + np.arange(len(positions))
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


def _segments(
    data: TokenDataset, rows: Sequence[Sequence[int] | Array], prefixes: Array | None
) -> tuple[Array, Array, Array, Array]:
    """Return of every segment the example it is read from, its row, and its first position and the one after it."""
    examples = np.concatenate([np.asarray(row, np.int64) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    begins = np.zeros_like(examples) if prefixes is None else prefixes[examples]
    ends = data.lengths[examples].astype(np.int64) - 1
    # The first example of a row gives what the row shares too.
    opens = (begins > 0) & (np.diff(row_of, prepend=-1) > 0)
    examples, row_of, begins, ends = (np.repeat(each, 1 + opens) for each in (examples, row_of, begins, ends))
    opening = np.flatnonzero(opens) + np.arange(opens.sum())
    begins[opening], ends[opening] = 0, begins[opening]
    return examples, row_of, begins, ends


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
    """Tell whether a row holds more than one segment."""
    return int(batch.segment_ids.max()) > 1


def _select(batch: MicroBatch, place: tuple) -> MicroBatch:
    rows, columns = place
    arrays = (batch.token_ids, batch.targets, batch.segment_ids, batch.position_ids, batch.loss_mask)
    return MicroBatch(*(array[rows, columns] for array in arrays))
