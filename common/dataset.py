"""From files to token arrays: read, tokenised, cut to length, and an account of what was lost on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from common.batches import TokenDataset, build_dataset
from common.chat import ChatTokenizer, Encoded
from common.config import TrainConfig
from common.errors import UserError
from common.records import Example, RecordError, read_examples, summarise


@dataclass
class DataReport:
    """Count what was read and what was lost."""

    num_examples: int = 0
    skipped: list[str] = field(default_factory=list)
    truncated: int = 0  # examples longer than max_seq_length
    lost_loss_tokens: int = 0  # supervised tokens cut off with them
    dropped: int = 0  # examples left out because nothing in them is supervised

    def lines(self, config: TrainConfig) -> list[str]:
        """Say what was lost, one line each; nothing where nothing was."""
        lines = []
        if self.skipped:
            lines.append(f"{len(self.skipped)} unusable lines were left out, the first: {self.skipped[0]}")
        if self.truncated:
            verb = {"truncate": "were cut", "drop": "were left out", "split": "were split"}[config.data.truncation]
            lines.append(
                f"{self.truncated} examples longer than max_seq_length {config.max_seq_length} {verb}"
                f"{f', {self.lost_loss_tokens} supervised tokens lost' if self.lost_loss_tokens else ''}"
            )
        if self.dropped:
            lines.append(f"{self.dropped} examples without a supervised token were left out")
        return lines


def load_dataset(
    paths: str | Sequence[str], config: TrainConfig, tokenizer: ChatTokenizer
) -> tuple[TokenDataset, list[Example], DataReport]:
    """Read and tokenise files; raises UserError for bad lines (all of them) and where nothing is left to train."""
    report = DataReport()
    examples = read_examples(paths, config.data, report.skipped)
    rows: list[tuple[list[int], list[bool], str]] = []
    kept: list[Example] = []
    errors: list[str] = []
    for example in examples:
        try:
            encoded = tokenizer.encode(example, config.data.train_on)
            pieces = list(_fit(encoded, config, report))
        except RecordError as error:
            errors.append(f"{example.source}: {error}")
            continue
        kept.append(example)
        for piece in pieces:
            if any(piece.loss_mask[1:]):
                rows.append((piece.token_ids, piece.loss_mask, example.source))
            else:
                report.dropped += 1
    if errors and config.data.on_error == "stop":
        raise UserError(summarise(errors) + "\nmend them, or leave them out with data.on_error: skip")
    report.skipped.extend(errors)
    if not rows:
        raise UserError(
            f"{paths if isinstance(paths, str) else ', '.join(paths)}: no example with a supervised token is left "
            f"({report.truncated} were longer than max_seq_length {config.max_seq_length}); see `twintune preview`"
        )
    report.num_examples = len(rows)
    return build_dataset(rows), kept, report


def _fit(encoded: Encoded, config: TrainConfig, report: DataReport) -> Iterator[Encoded]:
    """Yield what of an example is trained, by `data.truncation`; raises RecordError where that is "error"."""
    ids, limit = encoded.token_ids, config.max_seq_length
    mask = [False, *encoded.loss_mask[1:]]  # nothing stands before the first token to predict it from
    if len(ids) <= limit:
        yield Encoded(ids, mask)
        return
    if config.data.truncation == "error":
        raise RecordError(
            f"{len(ids)} tokens; max_seq_length is {limit}; raise it, or set data.truncation to truncate, split or drop"
        )
    report.truncated += 1
    if config.data.truncation == "split":
        # The last token of a piece is the first of the next, which is predicted from it: no target is lost.
        for start in range(0, len(ids) - 1, max(1, limit - 1)):
            yield Encoded(ids[start : start + limit], [False, *mask[start + 1 : start + limit]])
        return
    report.lost_loss_tokens += sum(mask[limit:] if config.data.truncation == "truncate" else mask)
    if config.data.truncation == "truncate":
        yield Encoded(ids[:limit], mask[:limit])
