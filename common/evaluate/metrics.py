"""What an answer is judged by: the names that `evaluation.metrics` takes, and what each means.

A judgement is a ratio to each score it has a part in, and a score is the ratio of the sums over all answers: a share
where every answer counts one, the micro-averaged precision, recall and F1 of fields where each counts its fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from common.errors import UserError
from common.evaluate.json_values import fields, lookup, parse, same
from common.evaluate.own import OwnFunction
from common.evaluate.questions import Question

Judgement = dict[str, tuple[float, float]]  # score -> what this answer adds to its numerator and denominator
FIELD_SCORES = ("precision", "recall", "f1")


class Metric(Protocol):
    """Judge answers in one way."""

    def check(self, question: Question) -> None:
        """Raise UserError where answers to a question can't be judged this way; called before any are asked for."""

    def judge(self, question: Question, answer: str) -> Judgement:
        """Return what an answer adds to each score."""


def field_of(score: str) -> tuple[str, str] | None:
    """Return the kind and the field of a score of `json_fields` for one field, None for any other score."""
    metric, *parts = score.split(":", 2)
    return (parts[0], parts[1]) if metric == "json_fields" and len(parts) == 2 else None


def make_metrics(names: Sequence[str], questions: Sequence[Question]) -> list[Metric]:
    """Make the metrics that a config names, each fit to judge every question.

    Raises UserError where one isn't, or a function of the user's can't be had.
    """
    metrics = [_make(name) for name in names]
    for question in questions:
        for metric in metrics:
            metric.check(question)
    return metrics


def _make(name: str) -> Metric:
    kind, _, detail = name.partition(":")
    match kind:
        case "valid_json":
            return ValidJson()
        case "exact_match":
            return ExactMatch()
        case "json_field":
            return JsonField(detail)
        case "json_fields":
            return JsonFields()
        case "regex":
            return Regex(detail)
        case "python":
            return Own(detail)
    raise AssertionError(f"unknown metric {name}; the config should have refused it")


class ValidJson:
    """Ask for a JSON object or list."""

    def check(self, question: Question) -> None:
        """Take every question."""

    def judge(self, question: Question, answer: str) -> Judgement:
        """Tell whether the answer is one."""
        return {"valid_json": (parse(answer) is not None, 1)}


class ExactMatch:
    """Ask for the expected answer: equal as JSON where that is JSON, else as text without white space around it."""

    def check(self, question: Question) -> None:
        """Take every question."""

    def judge(self, question: Question, answer: str) -> Judgement:
        """Tell whether the answer is the expected one."""
        wanted = parse(question.expected)
        right = same(parse(answer), wanted) if wanted is not None else answer.strip() == question.expected.strip()
        return {"exact_match": (right, 1)}


class JsonField:
    """Ask for the right value of one field, `json_field:<name>`; a nested one by names joined by dots."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._name = f"json_field:{field}"

    def check(self, question: Question) -> None:
        """Refuse a question whose expected answer lacks the field."""
        if not lookup(parse(question.expected), self._field)[0]:
            raise UserError(
                f"evaluation.metrics: {self._name}: the expected answer of {question.source} has no field "
                f"{self._field!r}: {question.expected[:80]}"
            )

    def judge(self, question: Question, answer: str) -> Judgement:
        """Tell whether the answer has the field with the expected value."""
        found, value = lookup(parse(answer), self._field)
        right = found and same(value, lookup(parse(question.expected), self._field)[1])
        return {self._name: (right, 1)}


class JsonFields:
    """Count right fields among those given (precision) and those expected (recall), of all and of each name."""

    def check(self, question: Question) -> None:
        """Refuse a question whose expected answer is no JSON."""
        if parse(question.expected) is None:
            raise UserError(
                f"evaluation.metrics: json_fields: the expected answer of {question.source} is no JSON object or "
                f"list: {question.expected[:80]}"
            )

    def judge(self, question: Question, answer: str) -> Judgement:
        """Count the answer's fields."""
        given, wanted = fields(parse(answer)), fields(parse(question.expected))
        right = given & wanted
        judgement = dict(_field_scores("", right.total(), given.total(), wanted.total()))
        for name in dict.fromkeys(name for name, _ in [*wanted, *given]):
            counts = (sum(n for (each, _), n in some.items() if each == name) for some in (right, given, wanted))
            judgement |= dict(_field_scores(f":{name}", *counts))
        return judgement


def _field_scores(suffix: str, right: int, given: int, wanted: int) -> Iterator[tuple[str, tuple[float, float]]]:
    ratios = ((right, given), (right, wanted), (2 * right, given + wanted))
    yield from zip((f"json_fields:{score}{suffix}" for score in FIELD_SCORES), ratios, strict=True)


class Regex:
    """Look for a pattern in the answer, `regex:<pattern>`; what its groups catch must be what the expected one has."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)
        self._name = f"regex:{pattern}"

    def check(self, question: Question) -> None:
        """Refuse a question whose expected answer has nothing for the groups to be compared with."""
        if self._pattern.groups and not self._pattern.search(question.expected):
            raise UserError(
                f"evaluation.metrics: {self._name}: its groups are compared with the expected answer, and that of "
                f"{question.source} doesn't match: {question.expected[:80]}"
            )

    def judge(self, question: Question, answer: str) -> Judgement:
        """Tell whether the answer matches, with the same groups."""
        found = self._pattern.search(answer)
        wanted = self._pattern.search(question.expected) if self._pattern.groups else None
        return {self._name: (found is not None and (wanted is None or found.groups() == wanted.groups()), 1)}


class Own:
    """Let a function of the user's judge, `python:<file.py or module>:<function>`; a score is the mean."""

    def __init__(self, place: str) -> None:
        self._function = OwnFunction(place)
        self._name = f"python:{place}"

    def check(self, question: Question) -> None:
        """Take every question."""

    def judge(self, question: Question, answer: str) -> Judgement:
        """Call the function; each name that it returns is a score of its own."""
        values = self._function(question, answer)
        return {f"{self._name}:{name}" if name else self._name: (value, 1) for name, value in values.items()}
