"""From raw records to chunks of tokens: decoded, read, rendered, tokenised and cut to length, by any process.

A chunk is a pure function of its records and a `Recipe`, so several processes can make chunks and the result does not
depend on how many there were. A Recipe is small enough to travel with every chunk, and each process keeps the
tokenizer that it made of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.config import DataConfig
from common.data.chat import ChatTokenizer, Encoded
from common.data.readers import Raw, RecordError, decode, place
from common.data.records import SHOWN_ERRORS, Example, to_example
from common.data.sources import DataFile
from common.data.tokens import Chunk, make_chunk


@dataclass(frozen=True)
class Recipe:
    """Say all that tokens depend on besides the records."""

    model_dir: Path
    files: tuple[DataFile, ...]
    data_config: str  # as JSON
    max_seq_length: int

    def config(self) -> DataConfig:
        """Return the config of the data."""
        return DataConfig.model_validate_json(self.data_config)


@dataclass
class DataReport:
    """Count what was read and what was lost."""

    num_records: int = 0
    errors: list[str] = field(default_factory=list)  # why records are unusable, the first of them
    num_errors: int = 0
    truncated: int = 0  # examples longer than max_seq_length
    lost_loss_tokens: int = 0  # supervised tokens cut off with them
    dropped: int = 0  # examples left out because nothing in them is supervised

    def refuse(self, error: str) -> None:
        """Count an unusable record."""
        self.num_errors += 1
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append(error)

    def add(self, other: DataReport) -> None:
        """Count what came after this."""
        self.num_records += other.num_records
        self.errors += other.errors[: SHOWN_ERRORS - len(self.errors)]
        self.num_errors += other.num_errors
        self.truncated += other.truncated
        self.lost_loss_tokens += other.lost_loss_tokens
        self.dropped += other.dropped


def tokenise(recipe: Recipe, raws: Sequence[Raw]) -> tuple[Chunk, DataReport]:
    """Turn records into tokens; unusable ones are counted in the report."""
    return Tokeniser(recipe, _tokenizer(recipe.model_dir))(raws)


class Tokeniser:
    """Turn records into tokens as a recipe says."""

    def __init__(self, recipe: Recipe, tokenizer: ChatTokenizer) -> None:
        self._files = recipe.files
        self._config = recipe.config()
        self._limit = recipe.max_seq_length
        self._tokenizer = tokenizer

    def __call__(self, raws: Sequence[Raw]) -> tuple[Chunk, DataReport]:
        """Return the tokens of some records."""
        report = DataReport(num_records=len(raws))
        read = [self._read(raw) for raw in raws]
        encoded = iter(self._tokenizer.encode_batch([e for e in read if isinstance(e, Example)], self._config.train_on))
        rows: list[tuple[Sequence[int], Sequence[bool], int, int]] = []
        for raw, example in zip(raws, read, strict=True):
            result = next(encoded) if isinstance(example, Example) else example
            try:
                if isinstance(result, RecordError):
                    raise result
                pieces = list(fit(result, self._limit, self._config.truncation, report))
            except RecordError as error:
                report.refuse(f"{place(self._files, raw)}: {error}")
                continue
            for piece in pieces:
                if True in piece.loss_mask:
                    rows.append((piece.token_ids, piece.loss_mask, raw.file, raw.line))
                else:
                    report.dropped += 1
        return make_chunk(rows), report

    def _read(self, raw: Raw) -> Example | RecordError:
        try:
            return to_example(decode(raw), "", self._config)
        except RecordError as error:
            return error


def fit(encoded: Encoded, limit: int, truncation: str, report: DataReport) -> Iterator[Encoded]:
    """Yield what of an example is trained, by `data.truncation`; raises RecordError where that is "error"."""
    ids, mask = encoded.token_ids, encoded.loss_mask
    if mask[:1] == [True]:  # nothing stands before the first token to predict it from
        mask = [False, *mask[1:]]
    if len(ids) <= limit:
        yield Encoded(ids, mask)
        return
    if truncation == "error":
        raise RecordError(
            f"{len(ids)} tokens; max_seq_length is {limit}; raise it, or set data.truncation to truncate, split or drop"
        )
    report.truncated += 1
    if truncation == "split":
        # The last token of a piece is the first of the next, which is predicted from it: no target is lost.
        for start in range(0, len(ids) - 1, max(1, limit - 1)):
            yield Encoded(ids[start : start + limit], [False, *mask[start + 1 : start + limit]])
        return
    report.lost_loss_tokens += sum(mask[limit:] if truncation == "truncate" else mask)
    if truncation == "truncate":
        yield Encoded(ids[:limit], mask[:limit])


@functools.lru_cache(maxsize=1)
def _tokenizer(model_dir: Path) -> ChatTokenizer:
    return ChatTokenizer(model_dir)
