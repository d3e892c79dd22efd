"""The data set as flat arrays: what went in comes out, and its fingerprint sees every change."""

import numpy as np
import pytest

from common.data.tokens import build_dataset


def test_dataset_gives_back_what_it_was_built_from():
    data = build_dataset([([3, 4, 5], [False, True, True], "a:1"), ([9], [True], "a:2")])
    assert len(data) == 2
    assert data.tokens(0).tolist() == [3, 4, 5] and data.tokens(1).tolist() == [9]
    assert data.mask(0).tolist() == [False, True, True] and data.mask(1).tolist() == [True]
    assert (data.token_ids.dtype, data.loss_mask.dtype, data.starts.dtype) == (np.int32, np.bool_, np.int64)
    assert list(data.places) == ["a:1", "a:2"]


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


def test_selecting_examples_copies_no_token_and_takes_places_along():
    data = build_dataset(
        [([3, 4, 5], [False, True, True], "a:1"), ([9], [True], "a:2"), ([7, 8], [False, True], "a:3")]
    )
    some = data.select(np.array([2, 0, 2]))
    assert [some.tokens(i).tolist() for i in range(3)] == [[7, 8], [3, 4, 5], [7, 8]]
    assert list(some.places) == ["a:3", "a:1", "a:3"]
    assert some.token_ids is data.token_ids
    assert (some.num_tokens, some.num_loss_tokens) == (7, 4)
    assert len({data.fingerprint(), some.fingerprint(), data.select(np.array([0, 1])).fingerprint()}) == 3
    assert data.select(np.arange(3)).fingerprint() == data.fingerprint()
