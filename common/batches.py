"""Token arrays to step batches: a pure function of (data, config, step), so that every resume is exact.

Epoch e visits the examples in a permutation drawn from (seed, e). A step takes the next
`per_device_train_batch_size * gradient_accumulation_steps` of them; the last step of an epoch takes what is left.
Rows are padded to one of few lengths (eight an octave, at most an eighth of padding) because MLX traces a graph
for every shape. The cost of random access: one permutation an epoch, 8 bytes an example.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from common.engine import Array, MicroBatch, StepBatch

if TYPE_CHECKING:
    from common.config import TrainConfig


@dataclass(frozen=True)
class TokenDataset:
    """Hold tokenised examples end to end: example i is [offsets[i], offsets[i + 1]) of the flat arrays."""

    token_ids: Array  # int32 (tokens,)
    loss_mask: Array  # bool (tokens,): whether predicting this token is trained
    offsets: Array  # int64 (examples + 1,)
    sources: Sequence[str] = field(default=())  # file:line of each example

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tokens(self, index: int) -> Array:
        """Return the token ids of one example."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def mask(self, index: int) -> Array:
        """Return the loss mask of one example."""
        return self.loss_mask[self.offsets[index] : self.offsets[index + 1]]

    def fingerprint(self) -> str:
        """Return the sha256 of tokens, masks and boundaries."""
        digest = hashlib.sha256()
        for array in (self.token_ids, self.loss_mask, self.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def build_dataset(examples: Sequence[tuple[Sequence[int], Sequence[bool], str]]) -> TokenDataset:
    """Join (token ids, mask, source) into one data set."""
    lengths = [len(ids) for ids, _, _ in examples]
    return TokenDataset(
        token_ids=np.fromiter((i for ids, _, _ in examples for i in ids), np.int32, sum(lengths)),
        loss_mask=np.fromiter((m for _, mask, _ in examples for m in mask), np.bool_, sum(lengths)),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        sources=[source for _, _, source in examples],
    )


def padded_length(length: int, smallest: int = 16) -> int:
    """Round a length up to one of eight an octave, at least `smallest` apart."""
    step = max(smallest, 2 ** math.floor(math.log2(max(length, 1))) // 8)
    return math.ceil(length / step) * step


def make_micro_batch(data: TokenDataset, rows: Sequence[int] | Array) -> MicroBatch:
    """Lay examples out as rows (B, T): inputs are all but the last token, targets all but the first."""
    width = padded_length(max(len(data.tokens(row)) for row in rows) - 1)
    shape = (len(rows), width)
    token_ids, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    loss_mask = np.zeros(shape, np.bool_)
    for b, row in enumerate(rows):
        tokens, mask = data.tokens(row), data.mask(row)
        length = len(tokens) - 1
        token_ids[b, :length] = tokens[:-1]
        targets[b, :length] = tokens[1:]
        segments[b, :length] = 1
        positions[b, :length] = np.arange(length)
        loss_mask[b, :length] = mask[1:]
    return MicroBatch(token_ids, targets, segments, positions, loss_mask)


def supervised_positions(batch: MicroBatch) -> tuple[Array, Array, Array]:
    """Return where the loss is taken: flat positions into (B * T), their targets, and weights 1 or 0.

    All are (N,) with N rounded up to one of few lengths; what is padding has weight 0. Logits for these positions
    are all that the loss needs, a half or less of them where only answers are trained.
    """
    flat = np.flatnonzero(batch.loss_mask)
    size = padded_length(max(len(flat), 1))
    index, weight = np.zeros(size, np.int32), np.zeros(size, np.float32)
    index[: len(flat)] = flat
    weight[: len(flat)] = 1
    return index, batch.targets.reshape(-1)[index].astype(np.int32), weight


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, num_examples: int) -> Array:
    """Draw the order of an epoch's examples; kept, as each of its steps asks for it."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def split_by_length(batch: MicroBatch, parts: int) -> list[MicroBatch]:
    """Split a micro-batch into groups of rows of like length, each cut to its own longest row.

    The sums over the groups are those over the whole; what is saved is padding, a fifth of the tokens of short
    examples. MLX computes the groups side by side on a CPU.
    """
    lengths = (batch.segment_ids > 0).sum(axis=1)
    groups = np.array_split(np.argsort(lengths, kind="stable"), min(parts, len(lengths)))
    return [_cut(batch, rows, padded_length(int(lengths[rows].max()), smallest=8)) for rows in groups]


def _cut(batch: MicroBatch, rows: Array, width: int) -> MicroBatch:
    arrays = (batch.token_ids, batch.targets, batch.segment_ids, batch.position_ids, batch.loss_mask)
    return MicroBatch(*(array[rows, :width] for array in arrays))


@dataclass(frozen=True)
class BatchPlan:
    """Know every step's batch of a run, by number."""

    data: TokenDataset
    batch_size: int  # rows of a micro-batch
    accumulation: int  # micro-batches of a step
    seed: int
    num_train_epochs: float
    max_steps: int = -1

    @classmethod
    def of(cls, data: TokenDataset, config: TrainConfig) -> BatchPlan:
        """Plan the run that a config describes."""
        return cls(
            data,
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimizer steps of an epoch, its short last one included."""
        return math.ceil(len(self.data) / (self.batch_size * self.accumulation))

    @property
    def total_steps(self) -> int:
        """Count the optimizer steps of the run: `max_steps`, or the epochs rounded up."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.steps_per_epoch * self.num_train_epochs)

    def step_batch(self, step: int) -> StepBatch:
        """Build the batch of a step, counted from 1."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        rows = epoch_order(self.seed, epoch, len(self.data))[within * size : (within + 1) * size]
        micro = tuple(
            make_micro_batch(self.data, rows[start : start + self.batch_size])
            for start in range(0, len(rows), self.batch_size)
        )
        return StepBatch(
            step=step,
            epoch=epoch + (within + 1) / self.steps_per_epoch,
            micro_batches=micro,
            num_loss_tokens=sum(int(each.loss_mask.sum()) for each in micro),
            num_tokens=sum(int((each.segment_ids > 0).sum()) for each in micro),
            examples=tuple(int(row) for row in rows),
        )


def evaluation_batches(data: TokenDataset, batch_size: int) -> Iterator[MicroBatch]:
    """Yield the whole data set in order."""
    for start in range(0, len(data), batch_size):
        yield make_micro_batch(data, range(start, min(start + batch_size, len(data))))


def chain_hash(previous: str, batch: StepBatch) -> str:
    """Extend the hash of all batches so far by one step: equal on both engines, or the data differed."""
    digest = hashlib.sha256(previous.encode())
    for micro in batch.micro_batches:
        for array in (micro.token_ids, micro.targets, micro.segment_ids, micro.position_ids, micro.loss_mask):
            digest.update(array.tobytes())
    return digest.hexdigest()
