"""Which examples begin alike, so that packed rows compute their beginning once (`prefix_sharing`).

What stands at a position depends on the tokens up to it alone, so a system prompt has the same hidden states in every
example that it opens: a row holds it once, and each of its examples continues it. Losses and gradients are the same
sums in another order. Shared is what nobody trains on: a trained token counts once for each example it stands in. The
cost: rows hold one group of examples that begin alike, and the last row of each group may stay half empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from common.data.tokens import TokenDataset
from common.engine import Array

SHORTEST = 8  # tokens that examples of a group have in common at least
# At least, by a group that is not all of the data: it may leave a row half empty, and its rows are of one kind.
ROWS_SAVED = 2
SHARE_SAVED = 0.25  # of its positions
CHUNK = 1 << 20  # tokens looked at together


@dataclass(frozen=True)
class Prefixes:
    """Hold how many of its first tokens each example shares with the others of its group."""

    lengths: Array  # int64 (examples,), 0 where it shares nothing
    groups: Array  # int64 (examples,)

    @classmethod
    def none(cls, examples: int) -> Prefixes:
        """Let no example share anything."""
        return cls(np.zeros(examples, np.int64), np.zeros(examples, np.int64))


def find_prefixes(data: TokenDataset, capacity: int) -> Prefixes:
    """Find groups of examples that begin alike and save positions in packed rows of `capacity`.

    System prompts often begin alike themselves, so a part of a group becomes one where its own prompt is long.
    Questions that begin alike don't divide a group: rows of like examples teach less.
    """
    prefixes = Prefixes.none(len(data))
    found, number = [(np.arange(len(data)), 0)], 0
    while found:
        examples, shared = found.pop()
        prefixes.lengths[examples], prefixes.groups[examples] = shared, number
        found += _parts(data, examples, shared, capacity)
        number += 1
    return prefixes


def _parts(data: TokenDataset, examples: Array, shared: int, capacity: int) -> Iterator[tuple[Array, int]]:
    """Yield the parts of a group that share enough more to be groups themselves, and how many tokens that is."""
    wanted, enough = shared + SHORTEST, ROWS_SAVED * capacity
    for part in _alike(data, examples, shared, wanted, enough):
        length = _common_length(data, part, shared)
        own = int(data.lengths[part].sum()) - len(part) * (length + 1)
        in_a_row = (capacity - length) * len(part) // own
        more = len(part) * (length - shared)
        saved = (1 - 1 / in_a_row) * more
        if length >= wanted and (len(part) == len(examples) or saved >= max(enough, SHARE_SAVED * (own + more))):
            yield part, length


def _alike(data: TokenDataset, examples: Array, start: int, stop: int, enough: int) -> Iterator[Array]:
    """Yield those of the examples, `enough` tokens or all, whose [start, stop) is the same and not trained."""
    long = examples[data.lengths[examples] > stop + 1]  # each with a position of its own, as in `_common_length`
    factors = np.random.default_rng(0).integers(1, 2**63, stop - start, np.uint64) | np.uint64(1)
    keys, shareable = np.zeros(len(long), np.uint64), np.zeros(len(long), np.bool_)
    step = max(1, CHUNK // (stop - start))
    for first in range(0, len(long), step):
        part = slice(first, first + step)
        tokens, trained = _windows(data, long[part], start, stop)
        keys[part] = (tokens.astype(np.uint64) * factors).sum(axis=1)
        shareable[part] = ~trained.any(axis=1)
    long, keys = long[shareable], keys[shareable]
    by_key = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.append(True, np.diff(keys[by_key]) > 0)[: len(keys)])
    ends = np.append(begins[1:], len(keys))
    counts, tokens_of = ends - begins, np.add.reduceat(data.lengths[long[by_key]], begins, dtype=np.int64)
    for each in np.flatnonzero((counts > 1) & ((tokens_of >= enough) | (counts == len(examples)))):
        yield long[by_key[begins[each] : ends[each]]]


def _common_length(data: TokenDataset, examples: Array, known: int) -> int:
    """Count the first tokens that are the same in all examples, none of them or the next one trained.

    The first `known` of them are known to be. Every example keeps a position of its own: the last of what they share
    would else have to predict different tokens.
    """
    common = int(data.lengths[examples].min()) - 2
    first = 0
    while first < len(examples) and common > known:
        part = examples[first : first + max(1, CHUNK // (common - known))]
        tokens, trained = _windows(data, part, known, common)
        differs = (tokens != data.tokens(examples[0])[known:common]).any(axis=0) | trained.any(axis=0)
        first, common = first + len(part), known + int(differs.argmax()) if differs.any() else common
    return common


def _windows(data: TokenDataset, examples: Array, start: int, stop: int) -> tuple[Array, Array]:
    """Read the tokens [start, stop) of examples, and whether predicting the next one is trained: (examples, tokens)."""
    begins = data.starts[examples] + start
    return tuple(
        sliding_window_view(array, stop - start)[begins + ahead]
        for array, ahead in ((data.token_ids, 0), (data.loss_mask, 1))
    )
