"""How the next token is chosen from logits: once, in NumPy, so that both engines choose alike."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.engine import Array

LET_GO = 0.75  # go on with the open rows alone once they are no more than this share
WORTH_SHARING = 8  # tokens of a common beginning that are worth a forward pass of their own


@dataclass(frozen=True)
class Sampling:
    """Say how to generate: `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep every token.

    Penalty and cuts are transformers', in its order.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()


class Chooser:
    """Choose one token a row and step, and know which rows are done."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        rows = len(prompts)
        self._sampling = sampling
        self._seen = [set(prompt) for prompt in prompts] if sampling.repetition_penalty != 1 else None
        self._random = np.random.default_rng(sampling.seed)
        self._chosen = 0
        self._open = np.full(rows, sampling.max_new_tokens > 0)
        self._rows = np.arange(rows)  # those that the engine still computes

    @property
    def finished(self) -> bool:
        """Tell whether every row has ended."""
        return not self._open.any()

    def choose(self, logits: Array) -> Array:
        """Return a token id (B,) for logits (B, V); rows that have ended get one too, to be passed over."""
        if self._seen:
            seen = [self._seen[row] for row in self._rows]
            logits = penalised(logits, seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            return logits.argmax(axis=-1)
        cumulative = truncated_probabilities(logits, self._sampling).cumsum(axis=-1)
        draws = self._random.random((len(self._open), 1))[self._rows]  # a row's draws are its own, whoever has ended
        return (cumulative > draws * cumulative[:, -1:]).argmax(axis=-1)  # rounded, the sum may be just below 1

    def accept(self, tokens: Array) -> Iterator[tuple[int, int]]:
        """Yield (row, token) of the rows still open, and close those that stop here."""
        self._chosen += 1
        stops = np.isin(tokens, list(self._sampling.stop_ids))
        for row, token, stop in zip(self._rows, tokens, stops, strict=True):
            if self._seen:
                self._seen[row].add(int(token))
            if self._open[row]:
                yield int(row), int(token)
            self._open[row] &= not stop
        if self._chosen >= self._sampling.max_new_tokens:
            self._open[:] = False

    def rows_to_keep(self) -> Array | None:
        """Return which of the computed rows to go on with, None for all; call it once a step.

        Rows that have ended are let go by the quarter: each time caches are copied.
        """
        is_open = self._open[self._rows]
        if self.finished or is_open.mean() > LET_GO:
            return None
        kept = np.flatnonzero(is_open)
        self._rows = self._rows[kept]
        return kept


def penalised(logits: Array, seen: Sequence[Collection[int]], penalty: float) -> Array:
    """Return logits (B, V) with those of each row's seen tokens made smaller (CTRL, arXiv:1909.05858, section 4.1)."""
    logits = logits.copy()
    for row, tokens in zip(logits, seen, strict=True):
        index = np.fromiter(tokens, np.int64, len(tokens))
        row[index] = np.where(row[index] < 0, row[index] * penalty, row[index] / penalty)
    return logits


def truncated_probabilities(logits: Array, sampling: Sampling) -> Array:
    """Return softmax(logits / temperature), float64 (B, V), over the tokens that the cuts leave.

    They are the top k, of these the nucleus (arXiv:1904.09751), of these such as have at least the share `min_p` of the
    likeliest one's probability (arXiv:2407.01082).
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        kept = min(sampling.top_k, scaled.shape[-1])
        floor = np.partition(scaled, -kept, axis=-1)[:, -kept, None]
        scaled = np.where(scaled < floor, -np.inf, scaled)
    probabilities = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, axis=-1, kind="stable")
        ranked = np.take_along_axis(probabilities, order, axis=-1)
        ranked[ranked.cumsum(axis=-1) - ranked >= sampling.top_p] = 0  # the token that crosses top_p stays
        np.put_along_axis(probabilities, order, ranked, axis=-1)
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max(axis=-1, keepdims=True)] = 0
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
    return probabilities


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Array, list[int]]:
    """Lay prompts out as int32 (B, T), aligned at their ends; returns them and the padding of each row."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    return np.array(rows, np.int32), padding


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens with which all prompts begin (a system prompt), at most all but one of the shortest.

    0 where it is not worth computing once for all rows.
    """
    shortest = min(map(len, prompts))
    columns = zip(*(prompt[: shortest - 1] for prompt in prompts), strict=True)
    count = next((i for i, column in enumerate(columns) if len(set(column)) > 1), shortest - 1)
    return count if len(prompts) > 1 and count >= WORTH_SHARING else 0


def shifted_columns(count: int, padding: Sequence[int]) -> Array:
    """Return where each of the first `count` columns of left-padded rows lies in their common beginning, (B, count).

    A row's padding points to column 0; attention masks it.
    """
    return np.maximum(np.arange(count) - np.array(padding)[:, None], 0)
