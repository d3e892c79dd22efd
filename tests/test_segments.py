"""Segments end to end, as attention wants them: every example whole, with what it continues, and no padding."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_data import examples_in, examples_of, packed_batches, places_of

from common.data.tokens import build_dataset
from common.engine import MicroBatch
from common.layout import make_micro_batch
from common.segments import LIKE_LENGTH, Segments, end_to_end, side_by_side


def numbered(batch: MicroBatch) -> MicroBatch:
    """Give every position a token of its own, so that it is known again wherever it goes."""
    return dataclasses.replace(batch, token_ids=np.arange(batch.token_ids.size).reshape(batch.token_ids.shape))


@given(packed_batches(), st.integers(1, 4))
def test_laying_examples_end_to_end_keeps_them_all_and_drops_all_padding(drawn, parts):
    data, _, batch = drawn
    laid = end_to_end(batch, parts)
    assert 1 <= len(laid) <= parts
    assert sorted(example for part in laid for example in examples_of(part)) == sorted(examples_in(data))
    for part in laid:
        assert part.token_ids.shape[0] == 1 and part.segment_ids.min() == 1
        assert np.unique(part.segment_ids).tolist() == list(range(1, part.segment_ids.max() + 1))
    assert sum(int(part.loss_mask.sum()) for part in laid) == batch.loss_mask.sum()


@given(packed_batches())
def test_one_part_keeps_the_order(drawn):
    data, _, batch = drawn
    (row,) = end_to_end(batch)
    assert examples_of(row) == examples_in(data)


@given(packed_batches(), st.integers(1, 4))
def test_every_part_has_once_what_its_examples_share_and_nothing_else(drawn, parts):
    _, _, batch = drawn
    batch = numbered(batch)
    width = batch.token_ids.shape[1]
    whole = {columns[-1] + row * width: columns + row * width for row, columns, _ in places_of(batch)}
    seen = []
    for part in end_to_end(batch, parts):
        tokens = part.token_ids[0]
        here = [tokens[columns] for _, columns, _ in places_of(part)]
        seen += [example[-1] for example in here]
        for example in here:
            assert example.tolist() == whole[example[-1]].tolist()
        assert sorted(tokens.tolist()) == sorted({token for example in here for token in example.tolist()})
    assert sorted(seen) == sorted(whole)


@pytest.mark.parametrize("shared", [0, 6])
def test_parts_share_the_tokens_evenly(shared):
    lengths = [9, 40, 12, 31, 25, 11, 38, 8, 17, 30]
    data = build_dataset([([1] * (n + 1), [False] * 7 + [True] * (n - 6), "made") for n in lengths])
    parts = end_to_end(make_micro_batch(data, [range(10)], np.full(10, shared)), 2)
    # A boundary between examples is at most one example away from the middle.
    assert abs(parts[0].token_ids.size - parts[1].token_ids.size) <= 40


@given(packed_batches(), st.integers(1, 3))
def test_a_segment_sees_itself_and_what_it_continues(drawn, parts):
    for row in end_to_end(drawn[2], parts):
        segments, positions = Segments.of(row), row.position_ids[0]
        expected = [np.flatnonzero(row.segment_ids[0] == number + 1) for number in range(row.segment_ids.max())]
        assert segments.starts.tolist() == [span[0] for span in expected]
        assert segments.lengths.tolist() == [len(span) for span in expected]
        seen = np.split(segments.seen(), np.cumsum(segments.prefix_lengths + segments.lengths)[:-1])
        whole = {columns[-1]: columns.tolist() for _, columns, _ in places_of(row)}
        for number, (span, keys) in enumerate(zip(expected, seen, strict=True)):
            assert positions[keys].tolist() == list(range(len(keys)))
            assert keys.tolist() == whole.get(span[-1], span.tolist())
            assert segments.prefix_lengths[number] == len(keys) - len(span)
            assert segments.prefixes[number] == row.segment_ids[0][keys[0]] - 1


@given(packed_batches())
def test_segments_side_by_side_are_whole_and_of_like_length_and_continue_the_same(drawn):
    (row,) = end_to_end(drawn[2])
    segments = Segments.of(row)
    ends = np.cumsum(segments.prefix_lengths + segments.lengths)
    expected = {keys[-1]: keys.tolist() for keys in np.split(segments.seen(), ends[:-1])}
    last = []
    for group, shared in side_by_side(segments):
        inside = group >= 0
        assert (np.diff(inside.astype(int), axis=1) <= 0).all()  # padding is on the right
        assert (group[:, :shared] == group[0, :shared]).all()
        assert (inside.sum(axis=1) - shared).min() >= LIKE_LENGTH * (group.shape[1] - shared)
        for keys in (each[each >= 0].tolist() for each in group):
            assert keys == expected[keys[-1]]
            assert shared == row.position_ids[0][keys[shared]]
            last.append(keys[-1])
    assert sorted(last) == sorted(expected)
