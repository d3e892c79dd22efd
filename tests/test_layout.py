"""How tokens stand in a micro-batch: nothing lost, nothing trained that is padding, examples kept apart."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from made_data import datasets

from common.data.tokens import TokenDataset, build_dataset
from common.engine import MicroBatch
from common.layout import (
    LIKE_LENGTH,
    end_to_end,
    example_lengths,
    is_packed,
    make_micro_batch,
    padded_length,
    side_by_side,
    split_by_length,
    supervised_positions,
)


def one_a_row(data: TokenDataset) -> list[list[int]]:
    return [[example] for example in range(len(data))]


@st.composite
def packed_batches(draw) -> tuple[TokenDataset, list[list[int]], MicroBatch]:
    """Draw a data set and deal its examples out to rows in any way."""
    data = draw(datasets())
    rows: list[list[int]] = []
    for example in range(len(data)):
        if not rows or draw(st.booleans()):
            rows.append([])
        rows[-1].append(example)
    return data, rows, make_micro_batch(data, rows)


def examples_of(batch: MicroBatch) -> list[tuple]:
    """Read every example out of a batch by its segment ids: tokens, targets, positions, mask."""
    found = []
    for row in range(len(batch.token_ids)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            here = batch.segment_ids[row] == segment
            arrays = (batch.token_ids, batch.targets, batch.position_ids, batch.loss_mask)
            found.append(tuple(tuple(array[row][here].tolist()) for array in arrays))
    return found


def examples_in(data: TokenDataset) -> list[tuple]:
    """Give the same of the data set itself."""
    return [
        (
            tuple(data.tokens(i)[:-1].tolist()),
            tuple(data.tokens(i)[1:].tolist()),
            tuple(range(len(data.tokens(i)) - 1)),
            tuple(data.mask(i)[1:].tolist()),
        )
        for i in range(len(data))
    ]


@given(st.integers(1, 300_000))
def test_padded_length_wastes_at_most_an_eighth_of_a_long_row(length):
    padded = padded_length(length)
    assert padded >= length
    assert padded - length < max(16, length / 8)


def test_padded_lengths_are_few_and_never_shrink():
    lengths = [padded_length(length) for length in range(1, 8193)]
    assert lengths == sorted(lengths)
    # Up to 128 in sixteens, then eight an octave for six octaves.
    assert len(set(lengths)) == 8 + 6 * 8


@given(datasets())
def test_micro_batch_pairs_every_token_with_the_one_after_it(data):
    batch = make_micro_batch(data, one_a_row(data))
    for row in range(len(data)):
        tokens, length = data.tokens(row), len(data.tokens(row)) - 1
        assert batch.token_ids[row, :length].tolist() == tokens[:-1].tolist()
        assert batch.targets[row, :length].tolist() == tokens[1:].tolist()
        assert batch.loss_mask[row, :length].tolist() == data.mask(row)[1:].tolist()
        assert batch.segment_ids[row, :length].tolist() == [1] * length
        assert batch.position_ids[row, :length].tolist() == list(range(length))


@given(datasets())
def test_padding_is_segment_zero_and_never_supervised(data):
    batch = make_micro_batch(data, one_a_row(data))
    padding = batch.segment_ids == 0
    assert padding.sum() == padding.size - sum(len(data.tokens(row)) - 1 for row in range(len(data)))
    assert not batch.loss_mask[padding].any()
    assert not batch.token_ids[padding].any() and not batch.targets[padding].any()
    # Drawn tokens are never 0, the padding, so a supervised target of 0 would be padding.
    assert (batch.targets[batch.loss_mask] > 0).all()


@given(datasets())
def test_arrays_of_a_micro_batch_have_one_shape_and_the_dtypes_of_the_seam(data):
    batch = make_micro_batch(data, one_a_row(data))
    width = padded_length(max(len(data.tokens(row)) for row in range(len(data))) - 1)
    for field in dataclasses.fields(MicroBatch):
        array = getattr(batch, field.name)
        assert array.shape == (len(data), width)
        assert array.dtype == (np.bool_ if field.name == "loss_mask" else np.int32)


@given(datasets())
def test_supervised_positions_name_every_supervised_target_once(data):
    batch = make_micro_batch(data, one_a_row(data))
    index, targets, weight = supervised_positions(batch)
    count = int(batch.loss_mask.sum())
    assert len(index) == len(targets) == len(weight) == padded_length(count)
    assert weight.tolist() == [1.0] * count + [0.0] * (len(weight) - count)
    assert index[:count].tolist() == np.flatnonzero(batch.loss_mask).tolist()
    assert targets[:count].tolist() == batch.targets[batch.loss_mask].tolist()
    assert (index.dtype, targets.dtype, weight.dtype) == (np.int32, np.int32, np.float32)


def test_supervised_positions_of_a_batch_without_any_have_no_weight():
    data = build_dataset([([1, 2, 3], [True, False, False], "a:1")])
    _, _, weight = supervised_positions(make_micro_batch(data, [[0]]))
    assert len(weight) > 0 and not weight.any()


@given(datasets(), st.integers(1, 5))
def test_splitting_by_length_keeps_every_row_and_cuts_only_padding(data, parts):
    batch = make_micro_batch(data, one_a_row(data))
    groups = split_by_length(batch, parts)
    assert len(groups) == min(parts, len(data))

    def rows(part: MicroBatch) -> list[tuple]:
        arrays = (part.token_ids, part.targets, part.segment_ids, part.position_ids, part.loss_mask)
        lengths = (part.segment_ids > 0).sum(axis=1)
        return [tuple(tuple(a[row, :n].tolist()) for a in arrays) for row, n in enumerate(lengths)]

    assert sorted(row for group in groups for row in rows(group)) == sorted(rows(batch))
    assert sum(int(group.loss_mask.sum()) for group in groups) == batch.loss_mask.sum()


@given(packed_batches())
def test_a_packed_row_holds_its_examples_one_after_the_other(drawn):
    data, rows, batch = drawn
    assert examples_of(batch) == examples_in(data)
    for row, examples in enumerate(rows):
        length = sum(len(data.tokens(example)) - 1 for example in examples)
        assert (np.diff(batch.segment_ids[row, :length]) >= 0).all()
        assert not batch.segment_ids[row, length:].any() and not batch.loss_mask[row, length:].any()
    assert is_packed(batch) == any(len(row) > 1 for row in rows)


@given(packed_batches(), st.integers(1, 4))
def test_laying_examples_end_to_end_keeps_them_all_and_drops_all_padding(drawn, parts):
    data, _, batch = drawn
    laid = end_to_end(batch, parts)
    assert 1 <= len(laid) <= parts
    assert sorted(example for part in laid for example in examples_of(part)) == sorted(examples_in(data))
    for part in laid:
        assert part.segment_ids.min() == 1
        assert example_lengths(part).tolist() == [len(tokens) for tokens, *_ in examples_of(part)]


@given(packed_batches())
def test_one_part_keeps_the_order(drawn):
    data, _, batch = drawn
    (row,) = end_to_end(batch)
    assert examples_of(row) == examples_in(data)


def test_parts_share_the_tokens_evenly():
    lengths = [9, 40, 12, 31, 25, 11, 38, 8, 17, 30]
    data = build_dataset([([1] * (n + 1), [True] * (n + 1), "made") for n in lengths])
    parts = end_to_end(make_micro_batch(data, [range(10)]), 2)
    # A boundary between examples is at most one example away from the middle.
    assert abs(parts[0].token_ids.size - parts[1].token_ids.size) <= 40


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_examples_side_by_side_are_whole_and_of_like_length(lengths):
    starts = np.cumsum(lengths) - lengths
    groups = side_by_side(np.array(lengths))
    rows = [row[row >= 0].tolist() for group in groups for row in group]
    assert sorted(rows) == sorted(
        list(range(start, start + n)) for start, n in zip(starts.tolist(), lengths, strict=True)
    )
    for group in groups:
        inside = group >= 0
        assert (np.diff(inside.astype(int), axis=1) <= 0).all()  # padding is on the right
        assert inside.sum(axis=1).min() >= LIKE_LENGTH * group.shape[1]
