"""From an example to token ids and the mask of what is trained: chat template, answer spans, end tokens.

The template is rendered by a sandboxed Jinja and tokenised by `tokenizers`, without transformers: no torch is
imported and a start takes milliseconds. Which characters are answers is found by rendering the conversation up
to each assistant turn and checking that this is a true prefix of the whole; where a template rewrites its
history the example is refused rather than masked wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from common.errors import UserError
from common.records import Example, RecordError

MAX_RENDERED_CHARACTERS = 20_000_000
# Templates that print "today" get this day (Llama 3's own default), or a run resumed tomorrow would read other
# tokens than today's.
TEMPLATE_DATE = datetime(2024, 7, 26)
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


@dataclass(frozen=True)
class Encoded:
    """Hold one example as token ids and, for each, whether predicting it is trained."""

    token_ids: list[int]
    loss_mask: list[bool]


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
        self._source = _template_source(directory, settings)
        self._template: Any = None
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
        try:
            if example.messages:
                return self._encode_chat(example, train_on)
            return self._encode_plain(example, train_on)
        except UnicodeEncodeError as error:
            raise RecordError(f"text that is no valid Unicode ({error.reason}); remove the lone surrogate") from None

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Tokenise a conversation up to where the assistant's answer begins."""
        return self._tokenize(self.render(messages, tools, add_generation_prompt=True)).ids

    def text_ids(self, text: str) -> list[int]:
        """Tokenise plain text with the special tokens that the tokenizer adds by itself."""
        return self._tokenize(text, add_special_tokens=True).ids

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """Turn token ids back into text."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> str:
        """Apply the chat template; raises RecordError where the template refuses, UserError where there is none."""
        if self._template is None:
            self._template = _compile_template(self._source, self.directory)
        import jinja2

        try:
            text = self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RecordError(f"the chat template refuses this conversation: {error}") from None
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise RecordError(f"{len(text):,} characters after the chat template; at most {MAX_RENDERED_CHARACTERS:,}")
        return text

    def _encode_chat(self, example: Example, train_on: str) -> Encoded:
        whole = self.render(example.messages, example.tools, add_generation_prompt=False)
        if train_on == "all":
            encoding = self._tokenize(whole)
            return Encoded(encoding.ids, [True] * len(encoding.ids))
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        spans = [self._answer_span(example, turn, whole) for turn in turns[-1 if train_on == "last_assistant" else 0 :]]
        encoding = self._tokenize(whole)
        mask = [any(start < stop and end > begin for begin, stop in spans) for start, end in encoding.offsets]
        return Encoded(encoding.ids, mask)

    def _answer_span(self, example: Example, turn: int, whole: str) -> tuple[int, int]:
        """Return the characters [begin, end) of an answer with its end token, without the white space after."""
        before = self.render(example.messages[:turn], example.tools, add_generation_prompt=True)
        after = self.render(example.messages[: turn + 1], example.tools, add_generation_prompt=False)
        if not after.startswith(before) or not whole.startswith(after.rstrip()):
            raise RecordError(
                f"the chat template rewrites what stands before or in message {turn + 1}, so its place is not certain; "
                "split the conversation into one example an answer, or use train_on: all"
            )
        return len(before), len(after.rstrip())

    def _encode_plain(self, example: Example, train_on: str) -> Encoded:
        end = [self.eos_id] if self.eos_id is not None else []
        if example.text:
            ids = self.text_ids(example.text)
            ids = ids if ids[-1:] == end else ids + end
            return Encoded(ids, [True] * len(ids))
        prompt = self.text_ids(example.prompt)
        prompt = prompt[:-1] if end and prompt[-1:] == end else prompt  # some tokenizers close every text
        answer = self._tokenize(example.completion).ids + end
        return Encoded(prompt + answer, [train_on == "all"] * len(prompt) + [True] * len(answer))

    def _tokenize(self, text: str, add_special_tokens: bool = False) -> Encoding:
        # A template writes every special token itself; adding them too would double the BOS.
        text.encode()  # UnicodeEncodeError for a lone surrogate, of which tokenizers says "must be str"
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
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: can't be read as a tokenizer ({error}); download it again") from None


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


def _compile_template(source: str | None, directory: Path) -> Any:
    """Compile a template with what Hugging Face gives templates, in a sandbox that can't reach Python."""
    if source is None:
        raise UserError(
            f"{directory}: the base model has no chat template, so it can't read 'messages'; "
            "use its Instruct version, or data with 'prompt' and 'completion'"
        )
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """Accept {% generation %}, which only marks answers: the spans are found by rendering."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{directory}: the chat template can't be read: {error}, line {error.lineno}") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
