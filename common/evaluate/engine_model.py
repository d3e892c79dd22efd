"""An engine as lm-evaluation-harness asks a model: likelihoods of continuations and of whole texts, and answers.

All of it comes from an engine's `logits` and `generate`, tokenised as the harness's own `hf` model does it. The cost:
logits come to the host, which for long texts of large vocabularies is slow; `LONGEST` tokens are looked at, or
`max_seq_length` if that is more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common.base.weights import context_length
from common.config import TrainConfig
from common.data.chat import ChatTokenizer
from common.engine import Array, Engine
from common.errors import UserError
from common.sampling import Sampling

LONGEST = 2048  # tokens of a text, lm-eval's own default
LOGITS_AT_A_TIME = 2**28  # numbers, 1 GB
MAX_NEW_TOKENS = 256  # lm-eval's own default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names that tasks have for it
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Tokens = Sequence[int]


class EngineModel:
    """Answer the harness's requests with an engine's current weights."""

    def __init__(self, engine: Engine, config: TrainConfig, tokenizer: ChatTokenizer) -> None:
        super().__init__()
        self._engine = engine
        self._batch_size = config.per_device_eval_batch_size
        self._answers_at_a_time = config.evaluation.batch_size
        self._tokenizer = tokenizer
        self._longest = min(context_length(tokenizer.directory) or LONGEST, max(LONGEST, config.max_seq_length))
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        self._start = start if start is not None else tokenizer.pad_id  # what a text without context stands behind

    @property
    def tokenizer_name(self) -> str:
        """Name the tokenizer for the harness's caches of requests."""
        return str(self._tokenizer.directory)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Name the template for the harness's records; there is one a model."""
        return self.tokenizer_name if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model's template does."""
        text = self._tokenizer.render(chat_history, None, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].rstrip()  # an answer that has begun: the model is to go on with it
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) the log-likelihood in nats, and whether greedy decoding gives it."""
        return self._loglikelihoods([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each (text,) in nats, every token predicted once from all that fits before."""
        windows = [list(self._windows(self._tokenizer.text_ids(request.args[0]))) for request in requests]
        found = iter(self._loglikelihoods([window for each in windows for window in each]))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each (prompt, options), cut where the first of the texts in `until` begins."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: len(requests[index].args[0]))
            for start in range(0, len(group), self._answers_at_a_time):
                rows = group[start : start + self._answers_at_a_time]
                texts = self._generate([requests[index].args[0] for index in rows], requests[rows[0]].args[1])
                for index, text in zip(rows, texts, strict=True):
                    answers[index] = text
        return answers

    def _pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """Tokenise both together and split after the context's tokens; white space at its end goes to the other."""
        if not context:
            ids = self._tokenizer.text_ids(continuation, add_special_tokens=False)
            return (ids[:1], ids[1:]) if ids[:1] == [self._start] else ([self._start], ids)
        stripped = context.rstrip()
        whole = self._tokenizer.text_ids(context + continuation)
        before = self._tokenizer.text_ids(stripped) if stripped else []
        return whole[: len(before)] or [self._start], whole[len(before) :]

    def _windows(self, ids: Tokens) -> Iterator[tuple[Tokens, Tokens]]:
        """Cut a text into (context, continuation) of at most `_longest` tokens seen at a time."""
        size = self._longest
        yield [self._start], ids[:size]
        for start in range(size, len(ids), size):
            part = ids[start : start + size]
            yield ids[start + len(part) - size - 1 : start], part

    def _loglikelihoods(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Score continuations; those that differ in their last token alone share a row."""
        inputs = [tuple([*context, *continuation][-(self._longest + 1) : -1]) for context, continuation in pairs]
        asked: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(inputs):
            asked.setdefault(row, []).append(index)
        found = dict.fromkeys(asked.pop((), []), (0.0, True))  # a text of nothing
        for rows in self._batches(sorted(asked, key=len, reverse=True)):
            logits = self._engine.logits(_right_padded(rows, self._tokenizer.pad_id))
            for row, values in zip(rows, logits, strict=True):
                for index in asked[row]:
                    found[index] = _loglikelihood(values[: len(row)], pairs[index][1])
        return [found[index] for index in range(len(pairs))]

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Cut rows, the longest first, into batches whose logits the host can hold."""
        start = 0
        while start < len(rows):
            fitting = LOGITS_AT_A_TIME // (len(rows[start]) * self._tokenizer.vocabulary_size)
            stop = start + max(1, min(self._batch_size, fitting))
            yield rows[start:stop]
            start = stop

    def _generate(self, prompts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        until, sampling = _understood(options, self._tokenizer.stop_ids)
        room = self._longest - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"--lm-eval: a task wants {sampling.max_new_tokens} new tokens of a model that is given "
                f"{self._longest} at a time; raise max_seq_length"
            )
        ids = [self._tokenizer.text_ids(prompt)[-room:] for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in ids]
        texts, waiting = [""] * len(ids), set(range(len(ids)))
        for row, token in self._engine.generate(ids, sampling):
            tokens[row].append(token)
            if row in waiting:
                texts[row] = self._tokenizer.decode(tokens[row])
                if any(end in texts[row] for end in until) or token in sampling.stop_ids:
                    waiting.remove(row)
                    if not waiting:
                        break
        return [_cut(text, until) for text in texts]


def _understood(options: Mapping[str, Any], stop_ids: frozenset[int]) -> tuple[list[str], Sampling]:
    """Return where answers end and how they are sampled; greedily unless a task says otherwise."""
    given = dict(options)
    until = given.pop("until", None) or []
    lengths = [given.pop(name) for name in LENGTHS if given.get(name) is not None]
    sampled = given.pop("do_sample", None)
    settings = {name: given.pop(name) for name in SAMPLING if given.get(name) is not None}
    unknown = [name for name, value in given.items() if value is not None]
    if unknown:
        raise UserError(f"--lm-eval: a task sets {', '.join(unknown)} for its answers, which is not supported")
    if sampled is False:
        settings["temperature"] = 0.0
    elif sampled:
        settings.setdefault("temperature", 1.0)
    sampling = Sampling(int(lengths[0]) if lengths else MAX_NEW_TOKENS, **settings, stop_ids=stop_ids)
    return [until] if isinstance(until, str) else [text for text in until if text], sampling


def _cut(text: str, until: Iterable[str]) -> str:
    for end in until:
        text = text.partition(end)[0]
    return text


def _right_padded(rows: Sequence[Tokens], pad: int) -> Array:
    """Lay rows out as int32 (B, T); what stands behind a row's end changes nothing before it."""
    width = max(map(len, rows))
    return np.array([[*row, *[pad] * (width - len(row))] for row in rows], np.int32)


def _loglikelihood(logits: Array, continuation: Tokens) -> tuple[float, bool]:
    """Sum log softmax of the continuation's tokens over the last of logits (T, V), in float64."""
    if not continuation:
        return 0.0, True
    values, targets = logits[-len(continuation) :].astype(np.float64), np.array(continuation)[-len(logits) :]
    highest = values.max(axis=-1)
    normaliser = highest + np.log(np.exp(values - highest[:, None]).sum(axis=-1))
    chosen = values[np.arange(len(targets)), targets]
    return float((chosen - normaliser).sum()), bool((values.argmax(axis=-1) == targets).all())
