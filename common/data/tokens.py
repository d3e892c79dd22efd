"""The training data as tokens: flat arrays, and for each example where in them it stands.

An example is a view, so that a share held out, or examples seen twice an epoch, copy nothing; the flat arrays may be
files mapped into memory (common/data/token_store.py), so that memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from common.engine import Array

LABEL_ONLY = -1  # the line of an example whose label says all


@dataclass(frozen=True)
class Places(Sequence[str]):
    """Say where each example was read, as `train.jsonl:12`, in 12 bytes an example."""

    labels: Sequence[str]  # of each file, with what stands before a line's number
    files: Array  # int32 (examples,), index into labels
    lines: Array  # int64 (examples,)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> str, and a slice's many, as Sequence has it
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        label, line = self.labels[self.files[index]], self.lines[index]
        return label if line == LABEL_ONLY else f"{label}{line}"

    def select(self, examples: Array) -> Places:
        """Return the places of some examples."""
        return Places(self.labels, self.files[examples], self.lines[examples])


@dataclass(frozen=True)
class TokenDataset:
    """Hold tokenised examples: example i is [starts[i], starts[i] + lengths[i]) of the flat arrays."""

    token_ids: Array  # int32 (tokens,)
    loss_mask: Array  # bool (tokens,): whether predicting this token is trained
    starts: Array  # int64 (examples,)
    lengths: Array  # int32 (examples,)
    loss_lengths: Array  # int32 (examples,): how many tokens of each are trained
    places: Places
    highest_token: int
    digest: str  # sha256 of the flat arrays

    def __len__(self) -> int:
        return len(self.starts)

    def tokens(self, index: int) -> Array:
        """Return the token ids of one example."""
        start = self.starts[index]
        return self.token_ids[start : start + self.lengths[index]]

    def mask(self, index: int) -> Array:
        """Return the loss mask of one example."""
        start = self.starts[index]
        return self.loss_mask[start : start + self.lengths[index]]

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all examples."""
        return int(self.lengths.sum())

    @property
    def num_loss_tokens(self) -> int:
        """Count the supervised tokens of all examples."""
        return int(self.loss_lengths.sum())

    def input_lengths(self) -> Array:
        """Return how many positions of a row each example takes: its tokens but the last, which is only a target."""
        return self.lengths.astype(np.int64) - 1

    def select(self, examples: Array) -> TokenDataset:
        """Return some of the examples, or some several times, without copying a token."""
        return replace(
            self,
            starts=self.starts[examples],
            lengths=self.lengths[examples],
            loss_lengths=self.loss_lengths[examples],
            places=self.places.select(examples),
        )

    def fingerprint(self) -> str:
        """Return a sha256 of tokens, masks and boundaries: the same wherever the files lie."""
        digest = hashlib.sha256(self.digest.encode())
        for array in (self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Chunk:
    """Hold some tokenised examples end to end, on their way into a data set."""

    token_ids: Array  # int32 (tokens,)
    loss_mask: Array  # bool (tokens,)
    lengths: Array  # int32 (examples,)
    loss_lengths: Array  # int32 (examples,)
    files: Array  # int32 (examples,)
    lines: Array  # int64 (examples,)


class Digest:
    """Compute the digest of flat arrays that come in chunks."""

    def __init__(self) -> None:
        self._parts = hashlib.sha256(), hashlib.sha256()

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk."""
        for part, array in zip(self._parts, (chunk.token_ids, chunk.loss_mask), strict=True):
            part.update(np.ascontiguousarray(array).data)

    def hexdigest(self) -> str:
        """Return the digest of all chunks so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).hexdigest()


def join(chunks: Sequence[Chunk], labels: Sequence[str]) -> TokenDataset:
    """Join chunks into one data set in memory."""
    digest = Digest()
    for chunk in chunks:
        digest.add(chunk)
    token_ids, loss_mask, lengths, loss_lengths, files, lines = (
        np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in Chunk.__dataclass_fields__
    )
    highest = int(token_ids.max()) if len(token_ids) else -1
    places = Places(labels, files, lines)
    return TokenDataset(
        token_ids, loss_mask, starts_of(lengths), lengths, loss_lengths, places, highest, digest.hexdigest()
    )


def make_chunk(examples: Sequence[tuple[Sequence[int], Sequence[bool], int, int]]) -> Chunk:
    """Lay (token ids, mask, file, line) out as a chunk."""
    lengths = np.fromiter((len(ids) for ids, *_ in examples), np.int32, len(examples))
    total = int(lengths.sum())
    loss_mask = np.frombuffer(b"".join([bytes(mask) for _, mask, *_ in examples]), np.bool_)
    bounds = starts_of(lengths)
    return Chunk(
        token_ids=np.fromiter(chain.from_iterable(ids for ids, *_ in examples), np.int32, total),
        loss_mask=loss_mask,
        lengths=lengths,
        loss_lengths=np.add.reduceat(loss_mask, bounds, dtype=np.int32) if total else np.zeros(0, np.int32),
        files=np.fromiter((file for *_, file, _ in examples), np.int32, len(examples)),
        lines=np.fromiter((line for *_, line in examples), np.int64, len(examples)),
    )


def build_dataset(examples: Sequence[tuple[Sequence[int], Sequence[bool], str]]) -> TokenDataset:
    """Join (token ids, mask, source) into one data set."""
    chunk = make_chunk([(ids, mask, index, LABEL_ONLY) for index, (ids, mask, _) in enumerate(examples)])
    return join([chunk], [source for *_, source in examples])


def starts_of(lengths: Array) -> Array:
    """Return where each of some examples that stand end to end begins, int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - lengths
