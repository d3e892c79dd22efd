"""What a model is worth on held-out examples: loss, perplexity, and scores of the answers it really gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import TrainConfig
from common.data.chat import ChatTokenizer
from common.data.records import Example, RecordError
from common.data.tokens import TokenDataset
from common.engine import Engine
from common.errors import UserError
from common.sampling import Sampling
from common.trainer import total_loss


@dataclass(frozen=True)
class Question:
    """Hold the prompt of a held-out example, as text for people and as tokens, and the answer it expects."""

    shown: str
    prompt_ids: tuple[int, ...]
    expected: str


@dataclass(frozen=True)
class Evaluation:
    """Hold the scores of one model and its answers, in the order of the questions."""

    scores: dict[str, float | int]
    answers: list[str]


@dataclass(frozen=True)
class Comparison:
    """Hold base and adapter side by side: their scores, and some held-out examples with both answers."""

    scores: dict[str, dict[str, float | int]]  # "base" and "adapter"
    answers: list[dict[str, str]]  # prompt, expected, base, adapter


def compare_answers(
    scores: dict[str, dict[str, float | int]], questions: Sequence[Question], base: Sequence[str], tuned: Sequence[str]
) -> Comparison:
    """Put the answers to some of the first questions side by side."""
    rows = zip(questions, base, tuned, strict=False)
    return Comparison(
        scores,
        [
            {"prompt": question.shown, "expected": question.expected, "base": before, "adapter": after}
            for question, before, after in rows
        ],
    )


def make_questions(examples: Sequence[Example], tokenizer: ChatTokenizer, skip: bool = False) -> list[Question]:
    """Turn examples into questions; those without an answer's text to compare (plain text, tool calls) make none.

    Raises UserError for a conversation that the chat template refuses, unless these are to be skipped.
    """
    questions = []
    for example in examples:
        if example.prompt:
            ids = tokenizer.text_ids(example.prompt)
            questions.append(Question(example.prompt, tuple(ids), example.completion))
        elif example.messages:
            questions.extend(_chat_question(example, tokenizer, skip))
    return questions


def _chat_question(example: Example, tokenizer: ChatTokenizer, skip: bool) -> list[Question]:
    last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    before, answer = example.messages[:last], example.messages[last]["content"]
    if not answer:
        return []
    try:
        ids = tokenizer.prompt_ids(before, example.tools)
    except RecordError as error:
        if skip:
            return []
        raise UserError(f"{example.source}: {error}") from None
    shown = next((str(message["content"]) for message in reversed(before) if message["role"] == "user"), "")
    return [Question(shown, tuple(ids), str(answer))]


def evaluate(
    engine: Engine,
    config: TrainConfig,
    data: TokenDataset | None,
    questions: Sequence[Question],
    tokenizer: ChatTokenizer,
    advance: Callable[[int], None],
) -> Evaluation:
    """Score the engine's current weights; `advance` is told how many answers have been generated.

    The loss is that of `data`, where there is any. Answers are generated for all questions where the config names
    metrics, else only for those it shows.
    """
    scores: dict[str, float | int] = _loss_scores(engine, config, data) if data else {}
    asked = questions if config.evaluation.metrics else questions[: config.evaluation.samples]
    answers = generate_answers(engine, config, asked, tokenizer, advance)
    if asked and config.evaluation.metrics:
        scores["num_examples"] = len(asked)
        for metric in config.evaluation.metrics:
            right = sum(score(metric, answer, q.expected) for answer, q in zip(answers, asked, strict=True))
            scores[metric] = right / len(asked)
    return Evaluation(scores, answers)


def _loss_scores(engine: Engine, config: TrainConfig, data: TokenDataset) -> dict[str, float | int]:
    loss_sum, count = total_loss(engine, data, config.per_device_eval_batch_size, config.row_capacity)
    loss = loss_sum / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "num_loss_tokens": count}


def generate_answers(
    engine: Engine,
    config: TrainConfig,
    questions: Sequence[Question],
    tokenizer: ChatTokenizer,
    advance: Callable[[int], None],
) -> list[str]:
    """Answer questions greedily, in batches of like length; returns texts in the order of the questions."""
    sampling = Sampling(config.evaluation.max_new_tokens, stop_ids=tokenizer.stop_ids)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt_ids))
    tokens: dict[int, list[int]] = {index: [] for index in order}
    for start in range(0, len(order), config.evaluation.batch_size):
        rows = order[start : start + config.evaluation.batch_size]
        for row, token in engine.generate([questions[index].prompt_ids for index in rows], sampling):
            tokens[rows[row]].append(token)
        advance(start + len(rows))
    return [tokenizer.decode(tokens[index]) for index in range(len(questions))]


def score(metric: str, answer: str, expected: str) -> bool:
    """Judge one answer: valid_json, exact_match (equal as JSON if the expected one is JSON), json_field:<name>."""
    found, wanted = _parse(answer), _parse(expected)
    if metric == "valid_json":
        return found is not None
    if metric == "exact_match":
        return found == wanted if wanted is not None else answer.strip() == expected.strip()
    if metric.startswith("json_field:"):
        name = metric.split(":", 1)[1]
        if not isinstance(wanted, dict) or name not in wanted:
            raise UserError(f"evaluation.metrics: {metric}: an expected answer has no field {name!r}: {expected[:80]}")
        return isinstance(found, dict) and name in found and found[name] == wanted[name]
    raise AssertionError(f"unknown metric {metric}; the config should have refused it")


def _parse(text: str) -> Any:
    """Return the JSON object or list that a text is, None where it is none (a bare word or number counts as none)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a number of thousands of digits is a plain ValueError
        return None
    return value if isinstance(value, dict | list) else None
