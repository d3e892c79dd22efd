"""Text from a model, streamed: one answer, or a conversation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.adapters.adapter import fitted_weights, lora_of, read_adapter
from common.base.hub import resolve_model
from common.config import TrainConfig
from common.data.chat import ChatTokenizer
from common.data.records import RecordError
from common.engine import Engine, TrainState, choose_engine, open_engine
from common.errors import UserError
from common.sampling import Sampling

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Speaker:
    """Hold an engine that is ready to answer, and its tokenizer."""

    engine: Engine
    tokenizer: ChatTokenizer


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
    opened = open_engine(name, config, directory, lora_of(settings, adapter) if adapter else None)
    if adapter:
        opened.load_state(TrainState.fresh(fitted_weights(weights, opened, adapter)))
    return Speaker(opened, ChatTokenizer(directory))


def answer_once(speaker: Speaker, prompt: str, system: str | None, sampling: Sampling) -> None:
    """Print the answer to one prompt; a base without a chat template continues the text."""
    if speaker.tokenizer.has_template:
        prompt_ids = _prompt_ids(speaker, [*_system(system), {"role": "user", "content": prompt}])
    elif system:
        raise UserError("--system: this base has no chat template, so it has no place for a system prompt")
    else:
        prompt_ids = speaker.tokenizer.text_ids(prompt)
    for piece in stream(speaker, prompt_ids, sampling):
        print(piece, end="", flush=True)
    print()


def converse(speaker: Speaker, system: str | None, sampling: Sampling) -> None:
    """Read lines and answer them until an empty one, or the end of input."""
    messages: Messages = _system(system)
    while line := _ask():
        messages.append({"role": "user", "content": line})
        began, pieces = time.monotonic(), []
        for piece in stream(speaker, _prompt_ids(speaker, messages), sampling):
            print(piece, end="", flush=True)
            pieces.append(piece)
        messages.append({"role": "assistant", "content": "".join(pieces)})
        print(f"\n({len(pieces) / (time.monotonic() - began):.0f} tokens/s)")


def stream(speaker: Speaker, prompt_ids: list[int], sampling: Sampling) -> Iterator[str]:
    """Yield the answer's text as it grows, holding back characters whose bytes are not all there yet."""
    sampling = replace(sampling, stop_ids=speaker.tokenizer.stop_ids)
    tokens: list[int] = []
    shown = ""
    for _, token in speaker.engine.generate([prompt_ids], sampling):
        tokens.append(token)
        text = speaker.tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield speaker.tokenizer.decode(tokens)[len(shown) :]


def _prompt_ids(speaker: Speaker, messages: Messages) -> list[int]:
    try:
        return speaker.tokenizer.prompt_ids(messages)
    except RecordError as error:
        raise UserError(str(error)) from None


def _system(system: str | None) -> Messages:
    return [{"role": "system", "content": system}] if system else []


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()  # the shell's prompt belongs on a line of its own
        return ""
