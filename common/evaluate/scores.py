"""Scores of one model on held-out examples: the loss exactly, and what the answers it really gives are judged to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.config import TrainConfig
from common.data.chat import ChatTokenizer
from common.data.tokens import TokenDataset
from common.engine import Engine
from common.evaluate.metrics import Judgement, Metric
from common.evaluate.questions import Question
from common.sampling import Sampling
from common.trainer import total_loss

Scores = dict[str, float | int]


@dataclass(frozen=True)
class HeldOut:
    """Hold the held-out examples, as tokens where their loss is wanted, as questions, and what judges the answers."""

    data: TokenDataset | None
    questions: Sequence[Question]
    metrics: Sequence[Metric] = ()

    def asked(self, config: TrainConfig) -> Sequence[Question]:
        """Give the questions to be answered: all where there are metrics, else those that the config shows."""
        return self.questions if self.metrics else self.questions[: config.evaluation.samples]


@dataclass(frozen=True)
class Evaluation:
    """Hold the scores of one model, its answers in the order of the questions, and how each was judged."""

    scores: Scores
    answers: list[str]
    judgements: list[Judgement]


def evaluate(
    engine: Engine, config: TrainConfig, test: HeldOut, tokenizer: ChatTokenizer, advance: Callable[[int], None]
) -> Evaluation:
    """Score the engine's current weights; `advance` is told how many answers have been generated.

    The loss is that of the examples' data, where they have any.
    """
    scores: Scores = _loss_scores(engine, config, test.data) if test.data else {}
    asked = test.asked(config)
    answers = generate_answers(engine, config, asked, tokenizer, advance)
    judgements: list[Judgement] = []
    if asked and test.metrics:
        judgements = [judge(test.metrics, *pair) for pair in zip(asked, answers, strict=True)]
        scores |= {"num_examples": len(asked), **add_up(judgements)}
    return Evaluation(scores, answers, judgements)


def judge(metrics: Sequence[Metric], question: Question, answer: str) -> Judgement:
    """Return what an answer adds to each score of all metrics."""
    return {name: ratio for metric in metrics for name, ratio in metric.judge(question, answer).items()}


def add_up(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Return the scores: ratios of sums; nothing over nothing is 0, the precision of a model that gives no field."""
    sums: dict[str, tuple[float, float]] = {}
    for judgement in judgements:
        for name, (part, whole) in judgement.items():
            parts, wholes = sums.get(name, (0.0, 0.0))
            sums[name] = parts + part, wholes + whole
    return {name: parts / wholes if wholes else 0.0 for name, (parts, wholes) in sums.items()}


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


def _loss_scores(engine: Engine, config: TrainConfig, data: TokenDataset) -> Scores:
    batch_size = config.per_device_eval_batch_size
    loss_sum, count = total_loss(engine, data, batch_size, config.row_capacity, config.prefix_sharing)
    loss = loss_sum / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "num_loss_tokens": count}
