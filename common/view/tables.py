"""Tables for people: what models answer, and their scores, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.evaluate.metrics import FIELD_SCORES, field_of
from common.evaluate.pairs import Difference
from common.evaluate.questions import Question
from common.view.display import say

LONGEST_ANSWER = 200  # characters of one answer; a base model rambles
COUNTS = ("num_loss_tokens", "num_examples")
LOSSES = ("loss", "perplexity")
OWN = "python:"  # how scores of the user's own functions begin: any numbers
NONE = "–"
HEADINGS = {"full_precision": "full precision"}


def answers(questions: Sequence[Question], base: Sequence[str], tuned: Sequence[str], console: Console) -> None:
    """Print held-out questions with the base's answer and the tuned one, which says whether it is as expected."""
    rows = [
        (question.shown, question.expected, {"base": before, "tuned": after})
        for question, before, after in zip(questions, base, tuned, strict=False)
    ]
    _answers("Held-out examples, before and after", rows, console)


def differing(examples: Sequence[Mapping[str, Any]], number: int, console: Console) -> None:
    """Print the first of the examples whose answers were not judged alike, and how many more there are."""
    rows = [(example["prompt"], example["expected"], example["answers"]) for example in examples[:number]]
    _answers("Judged differently", rows, console)
    if len(examples) > number:
        say(console, f"{len(examples) - number:,} more were judged differently; --json has them all")


def scores(columns: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print scores, one column a model, and in a table of their own those of single fields."""
    names = dict.fromkeys(metric for column in columns.values() for metric in column)
    table = Table(title="Scores on held-out examples")
    table.add_column("")
    for name in columns:
        table.add_column(Text(HEADINGS.get(name, name)), justify="right")
    for metric in names:
        if not field_of(metric):
            table.add_row(Text(metric), *_cells(metric, columns))
    console.print(table)
    rows = field_rows(columns)
    if rows:
        by_field = Table(title="Scores by field: precision, recall, F1")
        by_field.add_column("", overflow="fold")
        for name in columns:
            by_field.add_column(Text(HEADINGS.get(name, name)), justify="center", no_wrap=True)
        for field, cells in rows:
            by_field.add_row(Text(field), *cells)
        console.print(by_field)


def field_rows(columns: Mapping[str, Mapping[str, float]]) -> list[tuple[str, list[str]]]:
    """Return precision, recall and F1 of each field that `json_fields` found, in one text for each model."""
    known = (field_of(metric) for column in columns.values() for metric in column)
    names = dict.fromkeys(field for each in known if each for field in [each[1]])
    return [(name, [_field_cell(name, column) for column in columns.values()]) for name in names]


def _field_cell(name: str, column: Mapping[str, float]) -> str:
    keys = [f"json_fields:{score}:{name}" for score in FIELD_SCORES]
    return "  ".join(f"{figure(key, column[key]) if key in column else NONE:>6}" for key in keys)


def differences(found: Sequence[Difference], console: Console) -> None:
    """Print how far models are apart, between what bounds, and who was better how often."""
    for each in found:
        by, low, high = (_gain(each.metric, value) for value in (each.difference, *each.interval))
        unit = "" if each.metric.startswith(OWN) else " points"
        say(
            console,
            f"{each.metric}: {each.second} against {each.first}: {by}{unit} (95% between {low} and {high}); "
            f"better in {each.better}, worse in {each.worse} of {each.num_examples:,} (p = {each.p_value:.2g})",
        )


def tasks(columns: Mapping[str, Mapping[str, Mapping[str, float]]], console: Console) -> None:
    """Print lm-evaluation-harness's scores of tasks with their standard errors, one column a model."""
    table = Table(title="lm-evaluation-harness")
    for heading in ("task", "score"):
        table.add_column(heading)
    for name in columns:
        table.add_column(Text(name), justify="right")
    for task, scores_of_task in next(iter(columns.values())).items():
        for score in scores_of_task:
            if "_stderr" not in score:
                cells = (_with_error(column[task], score) for column in columns.values())
                table.add_row(Text(task), Text(score), *cells)
    console.print(table)


def _with_error(scores_of_task: Mapping[str, float], score: str) -> str:
    name, comma, taken = score.partition(",")
    error = scores_of_task.get(f"{name}_stderr{comma}{taken}")
    return f"{scores_of_task[score]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def figure(metric: str, value: float) -> str:
    """Format a score: counts whole, losses with decimals, what the user's own code gives as is, shares in per cent."""
    if metric in COUNTS:
        return f"{value:,}"
    if metric.startswith(OWN):
        return f"{value:.4g}"
    return f"{value:.4f}" if metric in LOSSES else f"{value:.1%}"


def _gain(metric: str, value: float) -> str:
    return f"{value:+.4g}" if metric.startswith(OWN) else f"{100 * value:+.1f}"


def _cells(metric: str, columns: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Format a score of each model; a dash where one has none."""
    for column in columns.values():
        yield figure(metric, column[metric]) if metric in column else NONE


def _answers(title: str, rows: Sequence[tuple[str, str, Mapping[str, str]]], console: Console) -> None:
    """Print prompts, each with an answer of every model; the last one's tells what was expected, where it isn't."""
    if not rows:
        return
    table = Table(title=title, show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    for name in rows[0][2]:
        table.add_column(Text(name), ratio=3, overflow="fold")
    for prompt, expected, given in rows:
        cells = [_shortened(answer) for answer in given.values()]
        for cell, answer in zip(cells, given.values(), strict=True):
            if answer.strip() == expected.strip():
                cell.append("\n= as expected", style="dim")
            elif cell is cells[-1]:
                cell.append(f"\nexpected: {expected}", style="dim")
        table.add_row(Text(prompt), *cells)
    console.print(table)


def _shortened(answer: str) -> Text:
    return Text(answer if len(answer) <= LONGEST_ANSWER else answer[:LONGEST_ANSWER] + " ...")
