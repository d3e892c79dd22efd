"""How tokens stand in a micro-batch: nothing lost, nothing trained that is padding, examples kept apart."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from made_data import datasets, examples_in, examples_of, packed_batches, places_of

from common.data.tokens import TokenDataset, build_dataset
from common.engine import MicroBatch
from common.layout import is_packed, make_micro_batch, padded_length, split_by_length, supervised_positions


def one_a_row(data: TokenDataset) -> list[list[int]]:
    return [[example] for example in range(len(data))]


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
def test_a_packed_row_holds_its_examples_one_after_the_other_and_what_they_share_once(drawn):
    data, rows, batch = drawn
    assert examples_of(batch) == examples_in(data)
    places = places_of(batch)
    assert [row for row, *_ in places] == [row for row, examples in enumerate(rows) for _ in examples]
    for row, segments in enumerate(batch.segment_ids):
        here = [(columns, shared) for number, columns, shared in places if number == row]
        length = here[0][1] + sum(len(columns) - shared for columns, shared in here)
        assert (segments > 0).tolist() == [True] * length + [False] * (len(segments) - length)
        assert (np.diff(segments[:length]) >= 0).all()
        assert not batch.loss_mask[row, : here[0][1]].any() and not batch.loss_mask[row, length:].any()
    assert is_packed(batch) == (len(data) > len(rows) or any(shared for *_, shared in places))


def test_what_a_row_shares_stands_before_its_examples_which_go_on_from_it():
    shared = [11, 12, 13]
    data = build_dataset([([*shared, 20 + i, 30 + i], [False] * 4 + [True], "made") for i in range(2)])
    batch = make_micro_batch(data, [[1, 0]], np.array([3, 3]))
    assert batch.token_ids[0, :6].tolist() == [11, 12, 13, 21, 20, 0]
    assert batch.segment_ids[0, :6].tolist() == [1, 1, 1, 2, 3, 0]
    assert batch.position_ids[0, :6].tolist() == [0, 1, 2, 3, 3, 0]
    assert batch.targets[0, 3:5].tolist() == [31, 30] and batch.loss_mask[0].sum() == 2
