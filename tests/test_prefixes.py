"""What examples share: the same tokens, none of them trained, as many as there are, and only where it pays."""

import numpy as np
import pytest
from calls import calls_of
from hypothesis import given
from hypothesis import strategies as st
from made_data import alike_datasets, common_beginning, datasets

from common import prefixes
from common.data.tokens import TokenDataset, build_dataset
from common.prefixes import ROWS_SAVED, SHARE_SAVED, SHORTEST, Prefixes, find_prefixes

WIDE = 10_000  # positions of rows that no part of a small data set fills


def members(found: Prefixes) -> list[list[int]]:
    return [np.flatnonzero(found.groups == group).tolist() for group in np.unique(found.groups)]


def made(beginnings: list[list[int]], own: int = 6, trained: int = 2) -> TokenDataset:
    """Make an example of each beginning that goes on with tokens of its own, of which the last are trained."""
    random = np.random.default_rng(0)
    rows = [[*beginning, *random.integers(1000, 9999, own).tolist()] for beginning in beginnings]
    return build_dataset([(row, [False] * (len(row) - trained) + [True] * trained, "made") for row in rows])


def saved_by(data: TokenDataset, examples: list[int], length: int, before: int, capacity: int) -> float:
    """Count the positions that examples needn't compute when they share `length` tokens in place of `before`."""
    own = sum(len(data.tokens(each)) - 1 - length for each in examples)
    in_a_row = int((capacity - length) / (own / len(examples)))
    return (len(examples) - len(examples) / in_a_row) * (length - before)


@given(datasets() | alike_datasets(), st.sampled_from([1, 7, 1 << 20]))
def test_what_all_examples_share_is_found_to_its_last_token(data, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "CHUNK", chunk)
        found = find_prefixes(data, WIDE)
    length = common_beginning(data, range(len(data)))
    expected = length if length >= SHORTEST and len(data) > 1 else 0
    assert found.lengths.tolist() == [expected] * len(data)


@given(alike_datasets(), st.integers(64, 100))
def test_groups_share_nothing_trained_and_no_part_of_one_would_be_better_off(data, capacity):
    found = find_prefixes(data, capacity)
    for examples in members(found):
        (shared,) = set(found.lengths[examples].tolist())
        assert shared == 0 or SHORTEST <= shared <= common_beginning(data, examples)
        wanted, parts = shared + SHORTEST, {}
        for each in examples:
            if common_beginning(data, [each]) >= wanted:
                parts.setdefault(tuple(data.tokens(each)[:wanted].tolist()), []).append(each)
        for part in parts.values():
            saved = saved_by(data, part, common_beginning(data, part), shared, capacity)
            positions = sum(len(data.tokens(each)) - 1 - shared for each in part)
            assert saved < max(ROWS_SAVED * capacity, SHARE_SAVED * positions)


def test_system_prompts_that_begin_alike_are_told_apart():
    header, prompts = list(range(1, 31)), [list(range(100, 150)), list(range(200, 230))]
    beginnings = [header + prompts[0]] * 60 + [header + prompts[1]] * 60 + [header] * 20
    found = find_prefixes(made(beginnings), 128)
    assert found.lengths.tolist() == [80] * 60 + [60] * 60 + [30] * 20
    assert sorted(map(len, members(found))) == [20, 60, 60]


def test_a_word_more_in_common_divides_no_group():
    header = list(range(1, 41))
    beginnings = [[*header, 50 + number % 2, 60 + number % 2] for number in range(400)]
    found = find_prefixes(made(beginnings), 128)
    assert set(found.lengths.tolist()) == {40} and len(members(found)) == 1


def test_some_that_begin_alike_go_by_themselves_only_where_that_saves_rows():
    alike, others = [list(range(1, 21))], [[500 + number] for number in range(50)]
    few, many = (find_prefixes(made(alike * number + others), 128) for number in (6, 60))
    assert not few.lengths.any()
    assert many.lengths.tolist() == [20] * 60 + [0] * 50


def test_prefixes_that_leave_room_for_one_example_a_row_save_nothing():
    beginnings = [list(range(1, 91))] * 30 + [[500 + number] for number in range(30)]
    assert not find_prefixes(made(beginnings, own=60), 160).lengths.any()
    assert find_prefixes(made(beginnings, own=20), 160).lengths.max() == 90


def test_nothing_is_shared_where_everything_is_trained():
    data = build_dataset([([*range(1, 30), 40 + number], [True] * 30, "made") for number in range(50)])
    assert not find_prefixes(data, 64).lengths.any()


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_short_and_few_examples_share_nothing_and_break_nothing(number):
    short = made([[1]] * number, own=1, trained=1)
    found = find_prefixes(short if number else made([[1]]).select(np.arange(0)), 64)
    assert len(found.lengths) == len(found.groups) == number and not found.lengths.any()


def test_the_same_example_twice_keeps_a_position_of_its_own():
    data = build_dataset([(list(range(1, 21)), [False] * 19 + [True], "made")] * 2)
    assert find_prefixes(data, 64).lengths.tolist() == [18, 18]


def test_many_examples_are_looked_at_together():
    """Of 200,000 examples, as many pairs: no loop goes over either."""
    random = np.random.default_rng(0)
    ids, half = random.integers(1, 9999, 100_000 * 20, np.int32).tolist(), 100_000
    rows = build_dataset([(ids[20 * i : 20 * i + 20], [False] * 19 + [True], "made") for i in range(half)])
    twice = rows.select(np.repeat(np.arange(half), 2))
    assert calls_of(lambda: find_prefixes(twice, 256)) < 1000
    assert not find_prefixes(twice, 256).lengths.any()
