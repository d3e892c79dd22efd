"""From token arrays to step batches: every example once an epoch, nothing lost, nothing trained that is padding."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import alike_datasets, datasets, examples_in, examples_of

from common.batches import BatchPlan, chain_hash, evaluation_batches
from common.data.tokens import TokenDataset, build_dataset

GOLDEN_ORDER = [
    (5, 6, 0, 7, 3, 2, 4, 9, 1, 8),
    (0, 8, 7, 4, 3, 1, 2, 9, 6, 5),
]  # of ten examples, seed 42, epochs 0 and 1


def numbered_dataset(count: int) -> TokenDataset:
    """Make examples that their first token tells apart: [1, 5, 5], [2, 5, 5], ..."""
    return build_dataset([([i + 1, 5, 5], [False, True, True], f"file:{i + 1}") for i in range(count)])


def plan_of(
    data: TokenDataset, batch_size: int = 2, accumulation: int = 1, seed: int = 0, epochs: float = 1
) -> BatchPlan:
    return BatchPlan(data, batch_size, accumulation, seed, epochs)


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


def test_packed_steps_hold_rows_of_many_examples_and_every_example_once_an_epoch():
    data = numbered_dataset(50)  # two positions each
    plan = BatchPlan(data, 2, 2, seed=3, num_train_epochs=2, capacity=10)
    assert plan.steps_per_epoch == 3  # ten rows of five examples, four rows a step
    for epoch in (0, 1):
        batches = [plan.step_batch(3 * epoch + step) for step in (1, 2, 3)]
        assert sorted(example for batch in batches for example in batch.examples) == list(range(50))
        assert [[micro.token_ids.shape[0] for micro in batch.micro_batches] for batch in batches] == [
            [2, 2],
            [2, 2],
            [2],
        ]
        assert [batch.num_tokens for batch in batches] == [40, 40, 20]


@given(datasets(), st.integers(1, 3))
def test_packed_evaluation_counts_every_supervised_token(data, batch_size):
    batches = list(evaluation_batches(data, batch_size, capacity=64))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(
        int(data.mask(row)[1:].sum()) for row in range(len(data))
    )


def sharing(data: TokenDataset, **settings) -> BatchPlan:
    return BatchPlan(data, 2, 2, seed=3, num_train_epochs=2, capacity=100, prefix_sharing=True, **settings)


@given(alike_datasets())
def test_steps_that_share_hold_every_example_once_an_epoch_and_whole(data):
    plan = sharing(data)
    for epoch in (0, 1):
        batches = [plan.step_batch(plan.steps_per_epoch * epoch + step + 1) for step in range(plan.steps_per_epoch)]
        micros = [micro for batch in batches for micro in batch.micro_batches]
        assert sorted(example for batch in batches for example in batch.examples) == list(range(len(data)))
        assert sorted(example for micro in micros for example in examples_of(micro)) == sorted(examples_in(data))
        assert sum(batch.num_loss_tokens for batch in batches) == sum(map(sum, (e[3] for e in examples_in(data))))
        used = [int(row.sum()) for micro in micros for row in micro.segment_ids > 0]
        assert max(used) <= 100 and sorted(used) == sorted(plan.row_lengths.tolist())
        assert sum(batch.num_tokens for batch in batches) == sum(used)


def with_a_system_prompt(count: int) -> TokenDataset:
    random = np.random.default_rng(0)
    rows = [[*range(1, 41), *random.integers(50, 99, random.integers(4, 20)).tolist()] for _ in range(count)]
    return build_dataset([(row, [False] * (len(row) - 2) + [True] * 2, "made") for row in rows])


def test_a_shared_beginning_is_computed_once_a_row():
    data = with_a_system_prompt(30)
    plan = sharing(data)
    own = int(data.input_lengths().sum()) - 30 * 40
    assert plan.row_lengths.sum() == own + 40 * len(plan.rows) and len(plan.rows) < 12
    assert plan.steps_per_epoch < dataclasses.replace(plan, prefix_sharing=False).steps_per_epoch


def test_shared_batches_of_a_resumed_run_are_those_of_the_whole():
    data = with_a_system_prompt(40)
    whole, resumed = sharing(data), sharing(data)
    for step in (whole.total_steps, 2):  # out of order, as after a resume
        assert chain_hash("", resumed.step_batch(step)) == chain_hash("", whole.step_batch(step))
    unshared = dataclasses.replace(whole, prefix_sharing=False)
    assert chain_hash("", whole.step_batch(1)) != chain_hash("", unshared.step_batch(1))


def test_rows_that_are_not_packed_share_nothing():
    plan = dataclasses.replace(sharing(with_a_system_prompt(10)), capacity=None)
    assert plan.row_lengths.sum() == plan.data.input_lengths().sum() and not plan.prefixes.lengths.any()


@given(alike_datasets(), st.integers(1, 3))
def test_shared_evaluation_sees_every_supervised_token_once(data, batch_size):
    batches = list(evaluation_batches(data, batch_size, capacity=100, prefix_sharing=True))
    assert sorted(example for batch in batches for example in examples_of(batch)) == sorted(examples_in(data))
    expected = sum(int(data.mask(row)[1:].sum()) for row in range(len(data)))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == expected


def test_grouped_steps_pad_less():
    lengths = np.random.default_rng(0).integers(5, 200, 400)
    data = build_dataset([([1] * n, [True] * n, f"made:{i}") for i, n in enumerate(lengths)])

    def positions(grouped: bool) -> int:
        plan = BatchPlan(data, 4, 2, seed=0, num_train_epochs=1, group_by_length=grouped)
        steps = [plan.step_batch(step) for step in range(1, plan.steps_per_epoch + 1)]
        return sum(micro.token_ids.size for batch in steps for micro in batch.micro_batches)

    assert positions(grouped=True) < 0.8 * positions(grouped=False)
