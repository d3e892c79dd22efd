"""From an example to token ids and the mask of what is trained: tokenizer, end tokens, the tokens of a span.

Rendered by `template.py` and tokenised by `tokenizers`, without transformers: no torch is imported and a start takes
milliseconds. `answers.py` says which characters are answers; a token that overlaps one is trained. A conversation
whose texts hold a special token is refused, since the model would read it as the end of a turn and not as text
(others tokenise it in silence); `text`, `prompt` and `completion` are taken as written, special tokens included. A
template that ends the conversation without an end token gets the tokenizer's, or the model would learn not to stop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from common.data.control import THOUGHTS, TokenTexts, refuse_control_tokens
from common.data.records import Example, RecordError
from common.data.spans import Span, SpanEncoder, SpanTokens
from common.errors import UserError

if TYPE_CHECKING:
    from common.data.answers import Frame
    from common.data.template import ChatTemplate, Rendered

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hold one example as token ids and, for each, whether predicting it is trained."""

    token_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class Written:
    """Hold a conversation as text, the characters that are trained (None: all), and what is added after it."""

    text: str
    spans: list[Span] | None
    end: list[int]


class ChatTokenizer:
    """Render, tokenise and decode as the base model's own files say."""

    def __init__(self, directory: Path) -> None:
        """Read tokenizer and chat template from a model folder; raises UserError where they can't be used."""
        self.directory = directory
        self._tokenizer = _read_tokenizer(directory)
        settings = _read_json(directory / "tokenizer_config.json")
        self._special = {
            name: _content(settings[name])
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if settings.get(name)
        }
        added = self._tokenizer.get_added_tokens_decoder()
        self._tokens = {token.content: token.special for token in added.values()}
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self._added = TokenTexts(self._tokens)
        self._source = _template_source(directory, settings)
        self.bos_id = self._token_id(self._special.get("bos_token"))
        self.eos_id = self._token_id(self._special.get("eos_token"))
        self.pad_id = self._token_id(self._special.get("pad_token")) or 0
        self.stop_ids = self._stop_ids()

    @property
    def files(self) -> list[Path]:
        """List the tokenizer's files, to be copied beside an adapter."""
        return [self.directory / name for name in TOKENIZER_FILES if (self.directory / name).is_file()]

    @property
    def vocabulary_size(self) -> int:
        """Count the tokens, added ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def has_template(self) -> bool:
        """Tell whether the model can chat."""
        return self._source is not None

    def encode(self, example: Example, train_on: str) -> Encoded:
        """Tokenise an example and mark what `train_on` (assistant, last_assistant, all) trains.

        Raises RecordError where the template refuses the conversation or hides which part is the answer.
        """
        (result,) = self.encode_batch([example], train_on)
        if isinstance(result, RecordError):
            raise result
        return result

    def encode_batch(self, examples: Sequence[Example], train_on: str) -> list[Encoded | RecordError]:
        """Tokenise many examples as `encode` does; the error of a bad one stands in its place."""
        results: list[Encoded | RecordError | None] = []
        batch: list[tuple[int, Written]] = []
        for index, example in enumerate(examples):
            results.append(None)
            try:
                if example.messages:
                    written = self._write(example, train_on)
                    _require_unicode(written.text)
                    batch.append((index, written))
                else:
                    results[index] = self._encode_plain(example, train_on)
            except RecordError as error:
                results[index] = error
        if batch:
            texts, spans = [w.text for _, w in batch], [w.spans or () for _, w in batch]
            for (index, written), tokens in zip(batch, self._spans.encode(texts, spans), strict=True):
                results[index] = _encoded(tokens, written)
        return [result for result in results if result is not None]

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Tokenise a conversation up to where the assistant's answer begins."""
        return self._tokenize(self.render(messages, tools, add_generation_prompt=True)).ids

    def text_ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenise plain text with the special tokens that the tokenizer adds by itself, or without."""
        ids = self._tokenize(text, add_special_tokens).ids
        if not add_special_tokens:
            return ids
        doubled = len(ids) > 1 and ids[0] == ids[1] == self.bos_id
        return ids[1:] if doubled else ids  # the text begins with the token that the tokenizer adds

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Turn token ids back into text."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> str:
        """Apply the chat template; raises RecordError where the template refuses, UserError where there is none."""
        return self._render(messages, tools, add_generation_prompt).text

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> Rendered:
        return self._template.render(
            {
                **self._special,
                "messages": list(messages),
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        from common.data.template import ChatTemplate  # Jinja is not loaded before a template is there to be rendered

        if self._source is None:
            raise UserError(
                f"{self.directory}: the base model has no chat template, so it can't read 'messages'; "
                "use its Instruct version, or data with 'prompt' and 'completion'"
            )
        return ChatTemplate(self._source, str(self.directory))

    @cached_property
    def _frame(self) -> Frame:
        """What the template writes around an answer, learned once."""
        from common.data.answers import learn_frame

        return learn_frame(lambda messages, prompt: self._render(messages, None, prompt), self._added.last_in)

    @cached_property
    def _spans(self) -> SpanEncoder:
        """What tokenises conversations, cut before the token that begins the template's turns."""
        return SpanEncoder(self._tokenizer, self._added.at_start_of(self._frame.header))

    @cached_property
    def _control(self) -> TokenTexts:
        """The tokens that no content may hold: special ones, and what the template writes around answers."""
        around = "\0".join((self._frame.header, self._frame.end, self._frame.closing))
        return TokenTexts({token for token, special in self._tokens.items() if special or token in around} - THOUGHTS)

    def _write(self, example: Example, train_on: str) -> Written:
        """Render a conversation and find what is trained of it."""
        from common.data.answers import find_answers

        messages, tools = example.messages, example.tools
        refuse_control_tokens(messages, tools, self._control)
        whole = self._render(messages, tools, add_generation_prompt=False)
        if train_on == "all":
            return Written(whole.text, None, [])
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= example.train_from]
        turns = turns[-1:] if train_on == "last_assistant" else turns
        spans = find_answers(
            lambda part, prompt: self._render(part, tools, prompt), messages, turns, whole, self._frame
        )
        if self._frame.end or whole.answers or not spans or turns[-1] != len(messages) - 1:
            return Written(whole.text, spans, [])
        closed = whole.text[: spans[-1][1]]
        if self.eos_id is None or self._added.last_in(closed) == len(closed):
            return Written(whole.text, spans, [])
        return Written(closed, spans, [self.eos_id])

    def _encode_plain(self, example: Example, train_on: str) -> Encoded:
        if example.token_ids:
            ids = list(example.token_ids)
            if self._tokenizer.id_to_token(max(ids)) is None:
                raise RecordError(
                    f"token id {max(ids)}; the model's tokenizer has {self.vocabulary_size}: was the data tokenised "
                    "with another one?"
                )
            return Encoded(ids, [True] * len(ids) if train_on == "all" else list(example.loss_mask))
        end = [self.eos_id] if self.eos_id is not None else []
        if example.text:
            ids = self.text_ids(example.text)
            ids = ids if ids[-1:] == end else ids + end
            return Encoded(ids, [True] * len(ids))
        prompt = self.text_ids(example.prompt)
        prompt = prompt[:-1] if end and prompt[-1:] == end else prompt  # some tokenizers close every text
        answer = self._tokenize(example.completion).ids
        answer = answer if answer[-1:] == end else answer + end
        return Encoded(prompt + answer, [train_on == "all"] * len(prompt) + [True] * len(answer))

    def _tokenize(self, text: str, add_special_tokens: bool = False) -> Encoding:
        # A template writes every special token itself; adding them too would double the BOS.
        _require_unicode(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _token_id(self, token: str | None) -> int | None:
        return self._tokenizer.token_to_id(token) if token else None

    def _stop_ids(self) -> frozenset[int]:
        generation = _read_json(self.directory / "generation_config.json")
        declared = generation.get("eos_token_id", [])
        ids = {declared} if isinstance(declared, int) else set(declared)
        return frozenset(ids | ({self.eos_id} if self.eos_id is not None else set()))


def _read_tokenizer(directory: Path) -> FastTokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: has no tokenizer.json; expected a fast tokenizer beside the weights "
            "(make one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    try:
        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: can't be read as a tokenizer ({error}); download it again") from None
    # A file may ask for texts to be cut or filled to a length, in silence: max_seq_length and data.truncation do that.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error}); download the model again") from None


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _template_source(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


def _encoded(tokens: SpanTokens, written: Written) -> Encoded:
    ids = tokens.ids
    if written.spans is None:
        return Encoded(ids, [True] * len(ids))
    mask = [False] * len(ids)
    for first, last in tokens.spans:
        mask[first:last] = [True] * (last - first)
    return Encoded(ids + written.end, mask + [True] * len(written.end)) if written.end else Encoded(ids, mask)


def _require_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()  # of a lone surrogate, tokenizers says "must be str"
    except UnicodeEncodeError as error:
        raise RecordError(f"text that is no valid Unicode ({error.reason}); remove the lone surrogate") from None
