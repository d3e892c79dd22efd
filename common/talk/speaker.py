"""A model that answers, streamed: as the base that it is or with its adapter, one loaded model either way."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common.adapters.adapter import fitted_weights, lora_of, read_adapter
from common.base.hub import resolve_model
from common.base.weights import context_length
from common.config import LoraConfig, TrainConfig
from common.data.chat import ChatTokenizer
from common.data.records import RecordError
from common.engine import Engine, TrainState, choose_engine, open_engine
from common.errors import UserError
from common.initial import untrained
from common.sampling import Sampling

Messages = list[dict[str, str]]
BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Answer:
    """Hold what was said and how fast, the first token and what came before it left out."""

    text: str
    num_tokens: int
    tokens_per_second: float

    @property
    def speed(self) -> str:
        """Write the speed as a person reads it."""
        rate = self.tokens_per_second
        return f"({self.num_tokens:,} tokens, {rate:,.{0 if rate >= 10 else 1}f} tokens/s)"


@dataclass
class Speaker:
    """Hold an engine that is ready to answer, its tokenizer, and the weights of who may answer."""

    engine: Engine
    tokenizer: ChatTokenizer
    lora: LoraConfig | None = None  # of the adapter, where there is one
    who: str = BASE
    _states: dict[str, TrainState] = field(default_factory=dict, init=False)

    @cached_property
    def context(self) -> int | None:
        """Tell how many tokens the model can look back on, None where its config doesn't say."""
        return context_length(self.tokenizer.directory)

    def become(self, who: str) -> None:
        """Let the base or the adapter answer from now on; raises UserError where there is no adapter."""
        if who == self.who:
            return
        if self.lora is None:
            raise UserError("there is no adapter to switch to; start with --adapter DIR")
        if who not in self._states:
            self._states[who] = untrained(self.engine, self.lora, seed=0)
        self.engine.load_state(self._states[who])
        self.who = who

    def take_adapter(self, state: TrainState) -> None:
        """Load an adapter's weights and keep them."""
        self._states[ADAPTER] = state
        self.become(ADAPTER)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Tokenise a conversation up to the answer; raises UserError where the chat template refuses it."""
        try:
            return self.tokenizer.prompt_ids(messages)
        except RecordError as error:
            raise UserError(str(error)) from None

    def answer(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        write: Callable[[str], None],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Write the answer's text as it grows, holding back characters whose bytes are not all there yet.

        Raises UserError where the prompt leaves the model no room for an answer.
        """
        room = self.context - len(prompt_ids) if self.context else sampling.max_new_tokens
        if room < 1:
            raise UserError(f"that makes {len(prompt_ids):,} tokens; the model looks back on {self.context:,} at most")
        sampling = replace(
            sampling, stop_ids=self.tokenizer.stop_ids, max_new_tokens=min(sampling.max_new_tokens, room)
        )
        tokens: list[int] = []
        shown = ""
        began = first = time.monotonic()
        for _, token in self.engine.generate([prompt_ids], sampling):
            first = first if tokens else time.monotonic()
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            if not text.endswith("\ufffd"):
                write(text[len(shown) :])
                shown = text
            if is_stopped():
                break
        now, text = time.monotonic(), self.tokenizer.decode(tokens)
        write(text[len(shown) :])
        timed, seconds = (len(tokens) - 1, now - first) if len(tokens) > 1 else (len(tokens), now - began)
        return Answer(text, len(tokens), timed / seconds if seconds else 0.0)


def open_model(model: str | None, adapter: Path | None, engine: str | None, device: str | None) -> Speaker:
    """Load a base and, where given, an adapter; the base is then that of the adapter unless `model` names another."""
    weights, settings = read_adapter(adapter) if adapter else ({}, {})
    base = model or settings.get("base_model_name_or_path")
    if not base:
        raise UserError("--model: missing; name a model folder or Hub name, or an --adapter that names its base")
    values: dict[str, Any] = {"model_name_or_path": base, "engine": engine, "device": device}
    config = TrainConfig.from_dict(values, "command line")
    name = choose_engine(config.engine)
    directory = resolve_model(base, None if model else settings.get("revision"))
    lora = lora_of(settings, adapter) if adapter else None
    speaker = Speaker(open_engine(name, config, directory, lora), ChatTokenizer(directory), lora)
    if adapter:
        speaker.take_adapter(TrainState.fresh(fitted_weights(weights, speaker.engine, adapter)))
    return speaker


def answer_once(speaker: Speaker, prompt: str, system: str | None, sampling: Sampling) -> None:
    """Print the answer to one prompt; a base without a chat template continues the text."""
    if speaker.tokenizer.has_template:
        prompt_ids = speaker.prompt_ids([*system_message(system), {"role": "user", "content": prompt}])
    elif system:
        raise UserError("--system: this base has no chat template, so it has no place for a system prompt")
    else:
        prompt_ids = speaker.tokenizer.text_ids(prompt)
    answer = speaker.answer(prompt_ids, sampling, print_piece)
    print()
    if sys.stderr.isatty():
        print(answer.speed, file=sys.stderr)


def system_message(system: str | None) -> Messages:
    """Return the messages that a system prompt makes: one or none."""
    return [{"role": "system", "content": system}] if system else []


def print_piece(text: str) -> None:
    """Print text to be gone on with, at once."""
    print(text, end="", flush=True)
