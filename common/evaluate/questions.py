"""Held-out examples as questions: what is asked, as text and as tokens, and the answer that is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.data.chat import ChatTokenizer
from common.data.records import Example, RecordError
from common.errors import UserError


@dataclass(frozen=True)
class Question:
    """Hold the prompt of a held-out example, as text for people and as tokens, and the answer it expects."""

    shown: str
    prompt_ids: tuple[int, ...]
    expected: str
    source: str = ""  # file:line
    record: Mapping[str, Any] = field(default_factory=dict)  # as the file has it


def make_questions(examples: Sequence[Example], tokenizer: ChatTokenizer, skip: bool = False) -> list[Question]:
    """Turn examples into questions; those without an answer's text to compare (plain text, tool calls) make none.

    Raises UserError for a conversation that the chat template refuses, unless these are to be skipped.
    """
    questions = []
    for example in examples:
        if example.prompt:
            ids = tuple(tokenizer.text_ids(example.prompt))
            questions.append(Question(example.prompt, ids, example.completion, example.source, example.record))
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
    return [Question(shown, tuple(ids), str(answer), example.source, example.record)]
