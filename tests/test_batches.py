"""From token arrays to step batches: every example once an epoch, nothing lost, nothing trained that is padding."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.batches import (
    BatchPlan,
    TokenDataset,
    build_dataset,
    chain_hash,
    evaluation_batches,
    make_micro_batch,
    padded_length,
    split_by_length,
    supervised_positions,
)
from common.engine import MicroBatch

GOLDEN_ORDER = [
    (5, 6, 0, 7, 3, 2, 4, 9, 1, 8),
    (0, 8, 7, 4, 3, 1, 2, 9, 6, 5),
]  # of ten examples, seed 42, epochs 0 and 1


@st.composite
def datasets(draw) -> TokenDataset:
    """Draw examples of 2 to 40 tokens, none of which is 0 (the padding), each with a supervised token."""
    examples = []
    for number in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.integers(1, 99), min_size=2, max_size=40))
        mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        mask[draw(st.integers(1, len(ids) - 1))] = True
        examples.append((ids, mask, f"file:{number + 1}"))
    return build_dataset(examples)


def numbered_dataset(count: int) -> TokenDataset:
    """Make examples that their first token tells apart: [1, 5, 5], [2, 5, 5], ..."""
    return build_dataset([([i + 1, 5, 5], [False, True, True], f"file:{i + 1}") for i in range(count)])


def plan_of(
    data: TokenDataset, batch_size: int = 2, accumulation: int = 1, seed: int = 0, epochs: float = 1
) -> BatchPlan:
    return BatchPlan(data, batch_size, accumulation, seed, epochs)


def test_dataset_gives_back_what_it_was_built_from():
    data = build_dataset([([3, 4, 5], [False, True, True], "a:1"), ([9], [True], "a:2")])
    assert len(data) == 2
    assert data.tokens(0).tolist() == [3, 4, 5] and data.tokens(1).tolist() == [9]
    assert data.mask(0).tolist() == [False, True, True] and data.mask(1).tolist() == [True]
    assert (data.token_ids.dtype, data.loss_mask.dtype, data.offsets.dtype) == (np.int32, np.bool_, np.int64)
    assert data.sources == ["a:1", "a:2"]


@pytest.mark.parametrize(
    "other",
    [
        [([3, 4, 6], [False, True, True], "a:1"), ([9, 9], [True, True], "a:2")],
        [([3, 4, 5], [False, False, True], "a:1"), ([9, 9], [True, True], "a:2")],
        [([3, 4], [False, True], "a:1"), ([5, 9, 9], [True, True, True], "a:2")],
        [([9, 9], [True, True], "a:2"), ([3, 4, 5], [False, True, True], "a:1")],
    ],
    ids=["a token", "a mask", "a boundary", "the order"],
)
def test_fingerprint_changes_with(other):
    examples = [([3, 4, 5], [False, True, True], "a:1"), ([9, 9], [True, True], "a:2")]
    fingerprint = build_dataset(examples).fingerprint()
    assert build_dataset(examples).fingerprint() == fingerprint
    assert build_dataset(other).fingerprint() != fingerprint


def test_fingerprint_does_not_depend_on_where_the_files_lie():
    here, there = (
        build_dataset([([3, 4], [False, True], "here:1")]),
        build_dataset([([3, 4], [False, True], "there:1")]),
    )
    assert here.fingerprint() == there.fingerprint()


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
    batch = make_micro_batch(data, range(len(data)))
    for row in range(len(data)):
        tokens, length = data.tokens(row), len(data.tokens(row)) - 1
        assert batch.token_ids[row, :length].tolist() == tokens[:-1].tolist()
        assert batch.targets[row, :length].tolist() == tokens[1:].tolist()
        assert batch.loss_mask[row, :length].tolist() == data.mask(row)[1:].tolist()
        assert batch.segment_ids[row, :length].tolist() == [1] * length
        assert batch.position_ids[row, :length].tolist() == list(range(length))


@given(datasets())
def test_padding_is_segment_zero_and_never_supervised(data):
    batch = make_micro_batch(data, range(len(data)))
    padding = batch.segment_ids == 0
    assert padding.sum() == padding.size - sum(len(data.tokens(row)) - 1 for row in range(len(data)))
    assert not batch.loss_mask[padding].any()
    assert not batch.token_ids[padding].any() and not batch.targets[padding].any()
    # Drawn tokens are never 0, the padding, so a supervised target of 0 would be padding.
    assert (batch.targets[batch.loss_mask] > 0).all()


@given(datasets())
def test_arrays_of_a_micro_batch_have_one_shape_and_the_dtypes_of_the_seam(data):
    batch = make_micro_batch(data, range(len(data)))
    width = padded_length(max(len(data.tokens(row)) for row in range(len(data))) - 1)
    for field in dataclasses.fields(MicroBatch):
        array = getattr(batch, field.name)
        assert array.shape == (len(data), width)
        assert array.dtype == (np.bool_ if field.name == "loss_mask" else np.int32)


@given(datasets())
def test_supervised_positions_name_every_supervised_target_once(data):
    batch = make_micro_batch(data, range(len(data)))
    index, targets, weight = supervised_positions(batch)
    count = int(batch.loss_mask.sum())
    assert len(index) == len(targets) == len(weight) == padded_length(count)
    assert weight.tolist() == [1.0] * count + [0.0] * (len(weight) - count)
    assert index[:count].tolist() == np.flatnonzero(batch.loss_mask).tolist()
    assert targets[:count].tolist() == batch.targets[batch.loss_mask].tolist()
    assert (index.dtype, targets.dtype, weight.dtype) == (np.int32, np.int32, np.float32)


def test_supervised_positions_of_a_batch_without_any_have_no_weight():
    data = build_dataset([([1, 2, 3], [True, False, False], "a:1")])
    _, _, weight = supervised_positions(make_micro_batch(data, [0]))
    assert len(weight) > 0 and not weight.any()


@given(datasets(), st.integers(1, 5))
def test_splitting_by_length_keeps_every_row_and_cuts_only_padding(data, parts):
    batch = make_micro_batch(data, range(len(data)))
    groups = split_by_length(batch, parts)
    assert len(groups) == min(parts, len(data))

    def rows(part: MicroBatch) -> list[tuple]:
        arrays = (part.token_ids, part.targets, part.segment_ids, part.position_ids, part.loss_mask)
        lengths = (part.segment_ids > 0).sum(axis=1)
        return [tuple(tuple(a[row, :n].tolist()) for a in arrays) for row, n in enumerate(lengths)]

    assert sorted(row for group in groups for row in rows(group)) == sorted(rows(batch))
    assert sum(int(group.loss_mask.sum()) for group in groups) == batch.loss_mask.sum()


@settings(max_examples=60)
@given(datasets(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_every_epoch_holds_every_example_exactly_once(data, batch_size, accumulation, seed, epochs):
    plan = plan_of(data, batch_size, accumulation, seed, epochs)
    assert plan.total_steps == plan.steps_per_epoch * epochs
    for epoch in range(epochs):
        first = epoch * plan.steps_per_epoch
        batches = [plan.step_batch(first + step) for step in range(1, plan.steps_per_epoch + 1)]
        assert sorted(row for batch in batches for row in batch.examples) == list(range(len(data)))
        sizes = [len(batch.examples) for batch in batches]
        assert all(size == batch_size * accumulation for size in sizes[:-1]) and sizes[-1] > 0


@settings(max_examples=60)
@given(datasets(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_step_counts_are_those_of_its_examples(data, batch_size, accumulation, seed):
    plan = plan_of(data, batch_size, accumulation, seed)
    for step in range(1, plan.steps_per_epoch + 1):
        batch = plan.step_batch(step)
        assert batch.num_loss_tokens == sum(int(data.mask(row)[1:].sum()) for row in batch.examples)
        assert batch.num_tokens == sum(len(data.tokens(row)) - 1 for row in batch.examples)
        assert len(batch.micro_batches) == math.ceil(len(batch.examples) / batch_size)
        inputs = [row for micro in batch.micro_batches for row in micro.token_ids.tolist()]
        for row, tokens in zip(batch.examples, inputs, strict=True):
            assert tokens[: len(data.tokens(row)) - 1] == data.tokens(row)[:-1].tolist()


def test_last_step_of_an_epoch_takes_what_is_left():
    plan = plan_of(numbered_dataset(11), batch_size=2, accumulation=2, epochs=2)
    assert plan.steps_per_epoch == 3
    assert [len(plan.step_batch(step).examples) for step in range(1, 7)] == [4, 4, 3, 4, 4, 3]
    assert [micro.token_ids.shape[0] for micro in plan.step_batch(3).micro_batches] == [2, 1]


def test_epoch_counts_up_to_whole_numbers_at_its_last_step():
    plan = plan_of(numbered_dataset(8), batch_size=2, epochs=2)
    assert [plan.step_batch(step).epoch for step in range(1, 9)] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert [plan.step_batch(step).step for step in (1, 8)] == [1, 8]


def test_order_is_another_in_every_epoch_and_with_every_seed():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        plan = plan_of(numbered_dataset(50), batch_size=50, seed=seed, epochs=2)
        return plan.step_batch(epoch + 1).examples

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


def test_order_does_not_depend_on_how_steps_are_cut():
    data = numbered_dataset(24)
    whole = plan_of(data, batch_size=24).step_batch(1).examples
    for batch_size, accumulation in ((1, 1), (4, 2), (5, 3)):
        plan = plan_of(data, batch_size, accumulation)
        assert sum((plan.step_batch(s).examples for s in range(1, plan.steps_per_epoch + 1)), ()) == whole


def test_order_is_the_same_on_every_machine():
    # NumPy promises that PCG64 streams stay; `permutation` may change in a major version, and resumes with it.
    plan = plan_of(numbered_dataset(10), batch_size=10, seed=42, epochs=2)
    assert plan.step_batch(1).examples == GOLDEN_ORDER[0]
    assert plan.step_batch(2).examples == GOLDEN_ORDER[1]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, -1, 3), (2, -1, 6), (0.5, -1, 2), (2.01, -1, 7), (3, 4, 4), (1, 100, 100), (3, 0, 9)],
)
def test_total_steps_go_by_epochs_rounded_up_unless_max_steps_is_set(epochs, max_steps, expected):
    plan = BatchPlan(numbered_dataset(11), 2, 2, 0, epochs, max_steps)
    assert plan.total_steps == expected


def test_max_steps_goes_on_through_as_many_epochs_as_it_takes():
    plan = BatchPlan(numbered_dataset(4), 2, 1, 0, 1, max_steps=7)
    assert sorted(plan.step_batch(6).examples + plan.step_batch(5).examples) == [0, 1, 2, 3]
    assert plan.step_batch(7).epoch == 3.5


@given(datasets(), st.integers(1, 5))
def test_evaluation_reads_the_whole_data_set_in_order(data, batch_size):
    batches = list(evaluation_batches(data, batch_size))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(
        int(data.mask(row)[1:].sum()) for row in range(len(data))
    )
    rows = [row for batch in batches for row in batch.token_ids.tolist()]
    assert len(rows) == len(data)
    assert all(tokens[0] == data.tokens(row)[0] for row, tokens in enumerate(rows))


@pytest.mark.parametrize("name", ["token_ids", "targets", "segment_ids", "position_ids", "loss_mask"])
def test_hash_of_the_batches_sees_a_change_in(name):
    batch = plan_of(numbered_dataset(4), batch_size=2, accumulation=2).step_batch(1)
    array = getattr(batch.micro_batches[1], name).copy()
    array[0, 0] = not array[0, 0] if name == "loss_mask" else array[0, 0] + 1
    changed = dataclasses.replace(batch.micro_batches[1], **{name: array})
    other = dataclasses.replace(batch, micro_batches=(batch.micro_batches[0], changed))
    assert chain_hash("", other) != chain_hash("", batch)


def test_hash_of_the_batches_depends_on_all_before():
    plan = plan_of(numbered_dataset(8))
    first, second = plan.step_batch(1), plan.step_batch(2)
    assert chain_hash(chain_hash("", first), second) != chain_hash("", second)
    assert chain_hash(chain_hash("", first), second) != chain_hash(chain_hash("", second), first)
    assert chain_hash("", first) == chain_hash("", plan.step_batch(1))
