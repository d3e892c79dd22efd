"""Choosing tokens from logits, with the formulas of transformers' logits processors as the oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from common.sampling import (
    Chooser,
    Sampling,
    left_padded,
    penalised,
    shared_beginning,
    shifted_columns,
    truncated_probabilities,
)

# Distinct logits far apart: ties are broken differently by different sorts, and are tested by themselves.
LOGITS = npst.arrays(np.int64, (3, 12), elements=st.integers(-400, 400), unique=True).map(lambda a: a / 50.0)


def transformers_probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(float(temperature))(None, torch.from_numpy(logits))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1).numpy()


@settings(max_examples=60, deadline=None)  # the first call imports torch
@given(
    LOGITS,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 12]),
    st.sampled_from([0.05, 0.617, 1.0]),
    st.sampled_from([0.0, 0.0312, 0.417]),
)
def test_probabilities_are_those_of_transformers(logits, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = truncated_probabilities(logits, sampling)
    theirs = transformers_probabilities(logits, temperature, top_k, top_p, min_p)
    # Both in float64; a cumulative sum from the other end differs by roundings.
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@settings(max_examples=40)
@given(LOGITS, st.sampled_from([1.3, 0.8, 4.0]), npst.arrays(np.int64, (3, 6), elements=st.integers(0, 11)))
def test_repetition_is_penalised_as_in_transformers(logits, penalty, prompts):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(prompts), torch.from_numpy(logits))
    chooser = Chooser(Sampling(repetition_penalty=penalty), prompts.tolist())
    np.testing.assert_array_equal(penalised(logits, [set(row) for row in prompts.tolist()], penalty), theirs.numpy())
    assert chooser.choose(logits).tolist() == theirs.argmax(-1).tolist()


def test_what_was_generated_is_penalised_too_in_its_own_row_alone():
    logits = np.array([[0.0, 3.0, 2.0]] * 2)
    chooser, generated = Chooser(Sampling(repetition_penalty=2.0, stop_ids=frozenset({9})), [[0], [0]]), []
    for _ in range(2):
        chosen = chooser.choose(logits)
        generated.append(chosen.tolist())
        list(chooser.accept(np.array([chosen[0], 0])))  # the second row says something else
    assert generated == [[1, 1], [2, 1]]


def test_a_row_that_goes_on_keeps_its_own_penalties():
    chooser = Chooser(Sampling(repetition_penalty=2.0, stop_ids=frozenset({9})), [[1], [2]])
    list(chooser.accept(np.array([9, 0])))
    assert chooser.rows_to_keep().tolist() == [1]
    assert chooser.choose(np.array([[0.0, 3.0, 4.0]])).tolist() == [1]


def test_softmax_alone_is_the_textbook_formula():
    logits = np.array([[1.0, 2.0, 3.0, -1.0]])
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    # Subtracting the maximum first costs a rounding.
    np.testing.assert_allclose(truncated_probabilities(logits, Sampling(temperature=0.7)), expected, rtol=1e-14)


def test_huge_float32_logits_do_not_overflow():
    logits = np.array([[1e38, 0.0, -1e38]], np.float32)
    assert truncated_probabilities(logits, Sampling(temperature=0.01)).tolist() == [[1.0, 0.0, 0.0]]


def test_top_k_beyond_the_vocabulary_keeps_every_token():
    logits = np.array([[0.0, 1.0, 2.0]])
    every = truncated_probabilities(logits, Sampling(temperature=1.0))
    assert (truncated_probabilities(logits, Sampling(temperature=1.0, top_k=50)) == every).all()


def test_top_p_keeps_the_token_that_crosses_it_and_always_one():
    logits = np.log([[0.5, 0.3, 0.15, 0.05]])
    kept = truncated_probabilities(logits, Sampling(temperature=1.0, top_p=0.6))
    # 0.5 / 0.8 through a log and an exp.
    np.testing.assert_allclose(kept, [[0.625, 0.375, 0, 0]], rtol=1e-12)
    assert truncated_probabilities(logits, Sampling(temperature=1.0, top_p=0.0001)).tolist() == [[1, 0, 0, 0]]


def test_greedy_takes_the_highest_logit_and_draws_nothing():
    logits = np.array([[0.0, 3.0, 2.0], [9.0, -1.0, 8.0]])
    chooser = Chooser(Sampling(temperature=0.0, top_k=1, seed=5), [[1], [1]])
    assert [chooser.choose(logits).tolist() for _ in range(3)] == [[1, 0]] * 3


def test_draws_have_the_frequencies_of_the_probabilities():
    logits = np.tile(np.log([0.5, 0.3, 0.15, 0.05]), (20_000, 1))
    tokens = Chooser(Sampling(temperature=1.0, seed=3), [[1]] * 20_000).choose(logits)
    # Three standard deviations of a share of 20,000 draws at p = 0.5 are 0.0106; the seed is fixed.
    np.testing.assert_allclose(np.bincount(tokens) / 20_000, [0.5, 0.3, 0.15, 0.05], atol=0.0106)


def test_same_seed_draws_the_same_tokens_and_another_seed_others():
    logits = np.zeros((64, 50))
    draw = [Chooser(Sampling(temperature=1.0, seed=seed), [[1]] * 64).choose(logits).tolist() for seed in (7, 7, 8)]
    assert draw[0] == draw[1] != draw[2]


def test_highest_draw_never_picks_a_token_that_was_cut():
    # Rounded probabilities may sum to less than 1; a draw above that sum must not fall through to token 0.
    logits = np.array([[-1e9] + [0.0] * 10])
    sampling = Sampling(temperature=1.0)
    assert truncated_probabilities(logits, sampling).cumsum()[-1] < 1.0, "no longer a case of rounding: choose another"
    chooser = Chooser(sampling, [[1]])
    chooser._random = type("Highest", (), {"random": staticmethod(lambda shape: np.full(shape, 1 - 2**-53))})()
    assert chooser.choose(logits).tolist() == [10]


def test_rows_end_at_a_stop_token_which_is_still_given_out():
    chooser = Chooser(Sampling(max_new_tokens=9, stop_ids=frozenset({7, 8})), [[1]] * 3)
    assert list(chooser.accept(np.array([1, 7, 2]))) == [(0, 1), (1, 7), (2, 2)]
    assert list(chooser.accept(np.array([8, 5, 3]))) == [(0, 8), (2, 3)]
    assert not chooser.finished
    assert list(chooser.accept(np.array([5, 5, 7]))) == [(2, 7)]
    assert chooser.finished


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_every_row_ends_after_max_new_tokens(limit):
    chooser, given_out = Chooser(Sampling(max_new_tokens=limit), [[1], [1]]), []
    while not chooser.finished:
        given_out += chooser.accept(np.array([4, 5]))
    assert given_out == [(0, 4), (1, 5)] * limit


def test_prompts_are_aligned_at_their_ends():
    rows, padding = left_padded([[1, 2, 3], [4], [5, 6]])
    assert rows.tolist() == [[1, 2, 3], [0, 0, 4], [0, 5, 6]]
    assert rows.dtype == np.int32
    assert padding == [0, 2, 1]


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ([[*range(10), 3], [*range(10), 4, 5]], 10),
        ([[*range(10)], [*range(10)]], 9),  # every row still computes its last token
        ([[*range(10), 3]], 0),  # nothing to share it with
        ([[*range(7), 3, 3], [*range(7), 4, 4]], 0),  # too short
        ([[1, *range(10)], [*range(11)]], 0),
    ],
)
def test_a_common_beginning_is_shared_where_it_is_worth_it(prompts, count):
    assert shared_beginning(prompts) == count


def test_a_common_beginning_stands_behind_each_rows_padding():
    assert shifted_columns(4, [0, 1, 3]).tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0]]
