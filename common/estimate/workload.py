"""What a step computes on: from the data where it and a tokenizer are here, else the longest that there may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.batches import BatchPlan
from common.config import TrainConfig
from common.data.chat import TOKENIZER_FILES, ChatTokenizer
from common.data.dataset import load_training
from common.errors import UserError
from common.estimate.activations import Work
from common.layout import padded_length


@dataclass(frozen=True)
class Workload:
    """Hold what is known of a data set: lengths in positions, counts of an epoch."""

    longest: int | None = None  # example; None: not known
    supervised_share: float = 1.0
    seen: float = 1.0  # positions of whole examples for each one computed: more where they share a beginning
    positions_per_epoch: int | None = None
    num_examples: int | None = None
    note: str = ""  # why the data isn't known

    def work(self, config: TrainConfig) -> Work:
        """Describe the largest micro-batch of a config."""
        longest = min(self.longest or config.max_seq_length, config.max_seq_length)
        rows, length = config.per_device_train_batch_size, config.max_seq_length if config.packing else longest
        length = padded_length(min(length, self.positions_per_epoch or length))
        rows = min(rows, self.num_examples or rows)
        share = self.supervised_share if config.packing else 1.0
        supervised = padded_length(max(1, round(rows * length * share)))
        return Work(rows, length, supervised, min(longest, length), self.seen)


def planned_workload(plan: BatchPlan) -> Workload:
    """Describe data that has been read."""
    lengths, positions = plan.data.input_lengths(), int(plan.row_lengths.sum())
    return Workload(
        longest=int(lengths.max()),
        supervised_share=plan.data.num_loss_tokens / positions,
        seen=int(lengths.sum()) / positions,
        positions_per_epoch=positions,
        num_examples=len(lengths),
    )


def read_workload(config: TrainConfig) -> Workload:
    """Read the training data where it and a tokenizer are here; else say why lengths are only bounded."""
    base = Path(config.model_name_or_path or "").expanduser()
    if not config.data.train:
        return Workload(note="no data.train in the config")
    if not any((base / name).is_file() for name in TOKENIZER_FILES):
        return Workload(note=f"the tokenizer of {base} is not here")
    try:
        return planned_workload(BatchPlan.of(load_training(config, ChatTokenizer(base))[0], config))
    except UserError as error:
        return Workload(note=str(error).splitlines()[0])
