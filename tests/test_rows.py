"""Which examples share a row: every one once, no row too full, few rows, the same on every machine."""

import bisect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.prefixes import Prefixes
from common.rows import MEGABATCH, RowOrder, Rows, group_by_length, pack, single

GOLDEN_ROWS = [[1], [4, 9, 3, 8], [7, 5, 6], [2, 0]]  # of ten examples in rows of 16, seed 42, epoch 0
LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=80).map(np.array)


def one_at_a_time(lengths: list[int], capacity: int) -> int:
    """Count the rows of best-fit decreasing as a textbook writes it."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(room, length)
        left = (room.pop(at) if at < len(room) else capacity) - length
        bisect.insort(room, left)
    return len(room)


@given(LENGTHS, st.integers(64, 200), st.integers(0, 99))
def test_packing_places_every_example_once_and_no_row_holds_too_much(lengths, capacity, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = pack(lengths, capacity, order)
    assert sorted(rows.members.tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= capacity for row in rows)


def groups_of(lengths: np.ndarray, shared: list[int], seed: int) -> Prefixes:
    """Deal examples out to groups that share so many tokens each, where an example leaves that many."""
    group = np.random.default_rng(seed).integers(len(shared), size=len(lengths))
    least = [int(lengths[group == number].min(initial=65)) - 1 for number in range(len(shared))]
    return Prefixes(np.minimum(shared, least)[group], group)


@given(LENGTHS, st.integers(64, 200), st.lists(st.integers(0, 63), min_size=1, max_size=4), st.integers(0, 99))
def test_rows_hold_one_group_and_what_it_shares_once(lengths, capacity, shared, seed):
    prefixes = groups_of(lengths, shared, seed)
    rows = pack(lengths, capacity, np.random.default_rng(seed).permutation(len(lengths)), prefixes)
    assert sorted(rows.members.tolist()) == list(range(len(lengths)))
    for row in rows:
        assert len(set(prefixes.groups[row])) == 1
        assert (lengths - prefixes.lengths)[row].sum() + prefixes.lengths[row[0]] <= capacity


def test_nothing_can_be_packed_too():
    nothing = np.zeros(0, np.int64)
    assert len(pack(nothing, 64, nothing)) == len(pack(nothing, 64, nothing, Prefixes.none(0))) == 0


@pytest.mark.parametrize("capacity", [256, 1024, 4096])
def test_packing_makes_hardly_more_rows_than_best_fit_decreasing(capacity):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 1, 5000).astype(int), 1, capacity)
    best = one_at_a_time(lengths.tolist(), capacity)
    assert len(pack(lengths, capacity, rng.permutation(5000))) <= 1.01 * best  # the short ones are not sorted


def test_packing_short_examples_leaves_almost_no_padding():
    lengths = np.random.default_rng(0).integers(20, 120, 5000)
    rows = pack(lengths, 1024, np.arange(5000))
    assert lengths.sum() / (len(rows) * 1024) > 0.98


def test_a_packed_row_mixes_examples_of_all_lengths():
    lengths = np.random.default_rng(0).integers(20, 120, 5000)
    rows = pack(lengths, 1024, np.random.default_rng(1).permutation(5000))
    spread = np.mean([lengths[row].std() for row in rows])
    assert spread > 0.8 * lengths.std()  # of rows of like length it would be near 0


def test_packed_rows_are_the_same_in_every_epoch_and_others_with_another_seed():
    lengths = np.random.default_rng(0).integers(5, 30, 400)
    order = RowOrder(lengths, seed=1, capacity=64)
    first, second = ([tuple(row) for row in order.of_epoch(epoch)] for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second) and len(first) == len(order)
    other = {tuple(sorted(row)) for row in RowOrder(lengths, seed=2, capacity=64).of_epoch(0)}
    assert len({tuple(sorted(row)) for row in first} & other) < len(first) / 10


def test_the_order_of_packed_rows_is_drawn_and_not_from_long_to_short():
    lengths = np.random.default_rng(0).integers(5, 60, 600)
    rows = RowOrder(lengths, seed=1, capacity=128).of_epoch(0)
    longest = [lengths[row].max() for row in rows]
    assert longest != sorted(longest, reverse=True)
    assert abs(np.mean(longest[: len(longest) // 2]) - np.mean(longest[len(longest) // 2 :])) < 5


SHARED = Prefixes(np.repeat([4, 0], 25), np.repeat([1, 0], 25))


@pytest.mark.parametrize(
    "settings",
    [{}, {"capacity": 64}, {"capacity": 64, "prefixes": SHARED}, {"group": 4}],
    ids=["plain", "packed", "shared", "grouped"],
)
def test_epochs_can_be_asked_for_in_any_order(settings):
    lengths = np.random.default_rng(0).integers(5, 30, 50)
    there, back = RowOrder(lengths, 7, **settings), RowOrder(lengths, 7, **settings)
    forward = [there.of_epoch(epoch).members.tolist() for epoch in (0, 1, 2)]
    assert [back.of_epoch(epoch).members.tolist() for epoch in (2, 0, 1)] == [forward[2], forward[0], forward[1]]
    assert len({tuple(members) for members in forward}) == 3


def test_packed_rows_are_the_same_on_every_machine():
    rows = RowOrder(np.array([7, 3, 9, 4, 5, 6, 2, 8, 1, 5]), seed=42, capacity=16).of_epoch(0)
    assert [row.tolist() for row in rows] == GOLDEN_ROWS


@given(LENGTHS, st.integers(1, 7), st.integers(0, 99))
def test_grouping_keeps_every_example(lengths, group, seed):
    rng = np.random.default_rng(seed)
    order = group_by_length(lengths, rng.permutation(len(lengths)), group, rng)
    assert sorted(order.tolist()) == list(range(len(lengths)))


def test_grouped_steps_are_of_like_length_and_come_in_no_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 8 * MEGABATCH)
    steps = lengths[group_by_length(lengths, rng.permutation(len(lengths)), 8, rng)].reshape(-1, 8)
    # Eight neighbours of 400 sorted lengths up to 1000 span about 20.
    assert (steps.max(axis=1) - steps.min(axis=1)).mean() < 40
    assert abs(np.corrcoef(steps.mean(axis=1), np.arange(len(steps)))[0, 1]) < 0.5


def test_grouping_leaves_the_short_step_at_the_end():
    rng = np.random.default_rng(0)
    lengths = np.arange(1, 12)
    order = group_by_length(lengths, rng.permutation(11), 4, rng)
    assert sorted(lengths[order[8:]]) == [1, 2, 3]  # the shortest of the one megabatch


def test_rows_can_be_put_in_another_order():
    rows = Rows(np.array([5, 1, 4, 0, 2, 3]), np.array([0, 2, 3, 6]))
    assert [row.tolist() for row in rows.reordered(np.array([2, 0, 1]))] == [[0, 2, 3], [5, 1], [4]]
    assert [row.tolist() for row in single(np.array([3, 1]))] == [[3], [1]]
