"""From rows of examples to step batches: a pure function of (data, config, step), so that every resume is exact.

A step takes the next `per_device_train_batch_size * gradient_accumulation_steps` rows of the epoch's order
(common/rows.py); the last step of an epoch takes what is left.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from common.data.tokens import TokenDataset
from common.engine import Array, MicroBatch, StepBatch
from common.layout import make_micro_batch
from common.prefixes import Prefixes, find_prefixes
from common.rows import RowOrder, pack, single

if TYPE_CHECKING:
    from common.config import TrainConfig


@dataclass(frozen=True)
class BatchPlan:
    """Know every step's batch of a run, by number."""

    data: TokenDataset
    batch_size: int  # rows of a micro-batch
    accumulation: int  # micro-batches of a step
    seed: int
    num_train_epochs: float
    max_steps: int = -1
    capacity: int | None = None  # positions of a packed row; None: a row is one example
    group_by_length: bool = False
    prefix_sharing: bool = False

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
            capacity=config.row_capacity,
            group_by_length=config.group_by_length,
            prefix_sharing=config.prefix_sharing,
        )

    @cached_property
    def prefixes(self) -> Prefixes:
        """Know what the examples of a packed row share."""
        return _prefixes(self.data, self.capacity, self.prefix_sharing)

    @cached_property
    def rows(self) -> RowOrder:
        """Know the rows of every epoch."""
        group = self.batch_size * self.accumulation if self.group_by_length else None
        return RowOrder(self.data.input_lengths(), self.seed, self.capacity, group, self.prefixes)

    @property
    def row_lengths(self) -> Array:
        """Count the positions of each row of the first epoch without padding, int64 (rows,)."""
        rows = self.rows.of_epoch(0)
        shared = self.prefixes.lengths[rows.members]
        own = np.add.reduceat(self.data.input_lengths()[rows.members] - shared, rows.offsets[:-1])
        return own + shared[rows.offsets[:-1]]

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimizer steps of an epoch, its short last one included."""
        return math.ceil(len(self.rows) / (self.batch_size * self.accumulation))

    @property
    def total_steps(self) -> int:
        """Count the optimizer steps of the run: `max_steps`, or the epochs rounded up."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.steps_per_epoch * self.num_train_epochs)

    def step_batch(self, step: int) -> StepBatch:
        """Build the batch of a step, counted from 1."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        order = self.rows.of_epoch(epoch)
        rows = [order[row] for row in range(within * size, min((within + 1) * size, len(order)))]
        micro = tuple(
            make_micro_batch(self.data, rows[start : start + self.batch_size], self.prefixes.lengths)
            for start in range(0, len(rows), self.batch_size)
        )
        return StepBatch(
            step=step,
            epoch=epoch + (within + 1) / self.steps_per_epoch,
            micro_batches=micro,
            num_loss_tokens=sum(int(each.loss_mask.sum()) for each in micro),
            num_tokens=sum(int((each.segment_ids > 0).sum()) for each in micro),
            examples=tuple(int(example) for row in rows for example in row),
        )


def evaluation_batches(
    data: TokenDataset, batch_size: int, capacity: int | None = None, prefix_sharing: bool = False
) -> Iterator[MicroBatch]:
    """Yield the whole data set in order, or packed into rows of `capacity`."""
    order = np.arange(len(data))
    prefixes = _prefixes(data, capacity, prefix_sharing)
    rows = pack(data.input_lengths(), capacity, order, prefixes) if capacity else single(order)
    for start in range(0, len(rows), batch_size):
        stop = min(start + batch_size, len(rows))
        yield make_micro_batch(data, [rows[row] for row in range(start, stop)], prefixes.lengths)


def _prefixes(data: TokenDataset, capacity: int | None, sharing: bool) -> Prefixes:
    return find_prefixes(data, capacity) if capacity and sharing else Prefixes.none(len(data))


def chain_hash(previous: str, batch: StepBatch) -> str:
    """Extend the hash of all batches so far by one step: equal on both engines, or the data differed."""
    digest = hashlib.sha256(previous.encode())
    for micro in batch.micro_batches:
        for array in (micro.token_ids, micro.targets, micro.segment_ids, micro.position_ids, micro.loss_mask):
            digest.update(array.data)
    return digest.hexdigest()
