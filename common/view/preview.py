"""What the model really sees: examples as tokens with the supervised ones marked, and what became of all the data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.base.hub import resolve_model
from common.batches import BatchPlan
from common.config import TrainConfig, require_trainable
from common.data.chat import ChatTokenizer
from common.data.dataset import load_training, report_lines
from common.data.tokenise import DataReport
from common.data.tokens import TokenDataset
from common.engine import Array
from common.layout import padded_length
from common.prefixes import SHORTEST
from common.view.display import say

BAR = 24  # characters of the histogram's longest bar
SHARED = "what examples of a row begin with is computed once"
WORTH_SAYING = 0.05  # of the tokens of an epoch, that `prefix_sharing` would leave out


@dataclass(frozen=True)
class Totals:
    """Sum up a data set: what is there, what was lost, and how much of a step is padding."""

    num_examples: int
    num_tokens: int
    num_loss_tokens: int
    shortest: int
    longest: int
    truncated: int  # examples longer than max_seq_length
    lost_loss_tokens: int  # supervised tokens cut off with them
    dropped: int  # examples without a supervised token
    skipped: int  # unusable records left out
    steps_per_epoch: int
    rows_per_epoch: int
    padding_share: float  # of the positions that a step computes
    shared_tokens: int  # left out of an epoch, as another example of the row begins with them too
    length_histogram: dict[str, int]  # examples of at most so many tokens, and more than the bin before


def preview_data(config: TrainConfig, number: int, as_json: bool) -> None:
    """Show the first training examples and the totals, for people or as one JSON object a line."""
    base = require_trainable(config, "preview")
    tokenizer = ChatTokenizer(resolve_model(base, config.revision))
    data, _, report = load_training(config, tokenizer)
    plan = BatchPlan.of(data, config)
    totals = sum_up(plan, report)
    if as_json:
        _print_json(data, totals, number)
        return
    _print_text(data, totals, report, number, tokenizer, config)
    if advice := sharing_advice(plan):
        say(Console(), advice)


def sum_up(plan: BatchPlan, report: DataReport) -> Totals:
    """Compute the totals of a data set and its steps."""
    data = plan.data
    return Totals(
        num_examples=len(data),
        num_tokens=data.num_tokens,
        num_loss_tokens=data.num_loss_tokens,
        shortest=int(data.lengths.min()),
        longest=int(data.lengths.max()),
        truncated=report.truncated,
        lost_loss_tokens=report.lost_loss_tokens,
        dropped=report.dropped,
        skipped=report.num_errors,
        steps_per_epoch=plan.steps_per_epoch,
        rows_per_epoch=len(plan.rows),
        padding_share=_padding_share(plan),
        shared_tokens=_shared_tokens(plan),
        length_histogram=_histogram(data.lengths),
    )


def _padding_share(plan: BatchPlan) -> float:
    """Return which share of the positions of the first epoch's micro-batches is padding."""
    used = plan.row_lengths
    starts = np.arange(0, len(used), plan.batch_size)
    widths = np.array([padded_length(int(longest)) for longest in np.maximum.reduceat(used, starts)])
    computed = int((widths * np.diff([*starts, len(used)])).sum())
    return 1 - int(used.sum()) / computed


def _shared_tokens(plan: BatchPlan) -> int:
    """Count the tokens that `prefix_sharing` leaves out of an epoch: all but the first of their row."""
    return int(plan.data.input_lengths().sum() - plan.row_lengths.sum())


def sharing_advice(plan: BatchPlan) -> str:
    """Say what `prefix_sharing` would leave out where it is off, packing on, and that is worth saying."""
    if plan.prefix_sharing or not plan.capacity:
        return ""
    trial = replace(plan, prefix_sharing=True)
    shared, tokens = _shared_tokens(trial), int(plan.data.input_lengths().sum())
    if shared < WORTH_SAYING * tokens:
        return ""
    rows = f"{len(trial.rows):,} rows in place of {len(plan.rows):,}"
    return f"prefix_sharing: true would leave out {shared:,} tokens ({shared / tokens:.0%}), {rows}: {SHARED}"


def _histogram(lengths: Array) -> dict[str, int]:
    """Count lengths in bins that double."""
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(exponents)
    return {str(2**e): int(counts[e]) for e in range(int(exponents.min()), len(counts))}


def _print_json(data: TokenDataset, totals: Totals, number: int) -> None:
    for index in range(min(number, len(data))):
        tokens, mask = data.tokens(index), data.mask(index)
        row = {
            "source": data.places[index],
            "token_ids": tokens.tolist(),
            "loss_mask": mask.tolist(),
            "num_tokens": len(tokens),
            "num_loss_tokens": int(mask.sum()),
        }
        print(json.dumps(row))
    print(json.dumps(asdict(totals)))


def _print_text(
    data: TokenDataset, totals: Totals, report: DataReport, number: int, tokenizer: ChatTokenizer, config: TrainConfig
) -> None:
    console = Console()
    say(console, "Supervised tokens stand in [[ ]] and, where there are colours, in green; special tokens in magenta.")
    for index in range(min(number, len(data))):
        tokens, mask = data.tokens(index), data.mask(index)
        say(console, f"\n{data.places[index]}  {len(tokens)} tokens, {int(mask.sum())} supervised")
        console.print(_marked(tokens, mask, tokenizer), soft_wrap=True)
    console.print(_table(totals, config))
    for line in [*report_lines(report, config), *report.errors]:
        say(console, line)


def _marked(tokens: Array, mask: Array, tokenizer: ChatTokenizer) -> Text:
    """Write tokens out with the supervised stretches in brackets and special tokens in a colour of their own."""
    text = Text()
    special = np.isin(tokens, list(tokenizer.special_ids))
    for start, stop in _runs(mask):
        text.append("[[" if mask[start] else "")
        for begin, end in _runs(special[start:stop]):
            piece = tokenizer.decode(tokens[start + begin : start + end].tolist(), skip_special=False)
            style = "magenta" if special[start + begin] else "green" if mask[start] else ""
            text.append(piece, style=style)
        text.append("]]" if mask[start] else "")
    return text


def _table(totals: Totals, config: TrainConfig) -> Table:
    table = Table(title="The training data", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    for name, value in _facts(totals, config):
        table.add_row(name, value)
    most = max(totals.length_histogram.values())
    for index, (bound, count) in enumerate(totals.length_histogram.items()):
        bar = "#" * round(BAR * count / most)
        table.add_row("lengths" if index == 0 else "", f"up to {int(bound):>7,}  {count:>9,}  {bar}")
    return table


def _facts(totals: Totals, config: TrainConfig) -> Iterator[tuple[str, str]]:
    share = totals.num_loss_tokens / totals.num_tokens
    yield "examples", f"{totals.num_examples:,}"
    yield "tokens", f"{totals.num_tokens:,}, {totals.shortest:,} to {totals.longest:,} an example"
    yield "supervised", f"{totals.num_loss_tokens:,} tokens ({share:.1%})"
    yield "truncated", f"{totals.truncated:,} examples, {totals.lost_loss_tokens:,} supervised tokens lost"
    yield "dropped", f"{totals.dropped:,} examples without a supervised token"
    yield "skipped", f"{totals.skipped:,} unusable records"
    rows = f", {totals.rows_per_epoch:,} packed rows of {config.max_seq_length:,} tokens" if config.packing else ""
    if config.prefix_sharing:
        yield "shared", _shared_text(totals)
    yield "an epoch", f"{totals.steps_per_epoch:,} steps{rows}; {totals.padding_share:.1%} of the positions are padding"


def _shared_text(totals: Totals) -> str:
    if not totals.shared_tokens:
        return f"nothing: too few examples have their first {SHORTEST} tokens or more in common, all of them untrained"
    share = totals.shared_tokens / (totals.num_tokens - totals.num_examples)
    return f"{totals.shared_tokens:,} tokens ({share:.1%}) are left out: {SHARED}"


def _runs(values: Array) -> list[tuple[int, int]]:
    """Return [start, stop) of every stretch of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(itertools.pairwise(edges))
