"""What the model really sees: examples as tokens with the supervised ones marked, and the totals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from common.chat import ChatTokenizer
from common.config import TrainConfig, require_trainable
from common.dataset import load_training, report_lines
from common.display import say
from common.hub import resolve_model
from common.tokenise import DataReport
from common.tokens import TokenDataset


def preview_data(config: TrainConfig, number: int, as_json: bool) -> None:
    """Show the first training examples and the totals, for people or as one JSON object a line."""
    require_trainable(config, "preview")
    assert config.model_name_or_path is not None
    tokenizer = ChatTokenizer(resolve_model(config.model_name_or_path, config.revision))
    data, _, report = load_training(config, tokenizer)
    if as_json:
        _print_json(data, report, number)
    else:
        _print_text(data, report, number, tokenizer, config)


def totals(data: TokenDataset, report: DataReport) -> dict[str, int]:
    """Sum up a data set."""
    return {
        "num_examples": len(data),
        "num_tokens": data.num_tokens,
        "num_loss_tokens": data.num_loss_tokens,
        "shortest": int(data.lengths.min()),
        "longest": int(data.lengths.max()),
        "truncated": report.truncated,
        "lost_loss_tokens": report.lost_loss_tokens,
        "dropped": report.dropped,
        "skipped": report.num_errors,
    }


def _print_json(data: TokenDataset, report: DataReport, number: int) -> None:
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
    print(json.dumps(totals(data, report)))


def _print_text(
    data: TokenDataset, report: DataReport, number: int, tokenizer: ChatTokenizer, config: TrainConfig
) -> None:
    console = Console()
    say(console, "Supervised tokens stand in [[ ]] and, where there are colours, in green.")
    for index in range(min(number, len(data))):
        tokens, mask = data.tokens(index), data.mask(index)
        say(console, f"\n{Path(data.places[index])}  {len(tokens)} tokens, {int(mask.sum())} supervised")
        text = Text()
        for start, stop in _runs(mask):
            piece = tokenizer.decode(tokens[start:stop].tolist(), skip_special=False)
            text.append(f"[[{piece}]]" if mask[start] else piece, style="green" if mask[start] else "")
        console.print(text, soft_wrap=True)
    say(console, "")
    for name, value in totals(data, report).items():
        say(console, f"{name.replace('_', ' '):>18} {value:>12,}")
    for line in report_lines(report, config):
        say(console, line)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return [start, stop) of every stretch of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return list(itertools.pairwise(edges))
