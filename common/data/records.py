"""From records to examples: every one either becomes an `Example` or an error that names its place.

Reading, meaning and tokens are apart: `readers.py` knows files, this file the names of fields, `chat.py` templates.
Which form a record has is seen from its own fields, so that files may mix forms. All bad records are collected
before a run is refused, so that one look mends them all. The cost: fields nobody asked for are passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from common.data.messages import kind, parsed, read_messages, read_tools, read_turns, require_answer, text, with_system
from common.data.readers import RecordError, decode, list_files, place, read_raw
from common.errors import UserError

if TYPE_CHECKING:
    from common.config import DataConfig, WeightedPath
    from common.data.sources import Split

Fields = Mapping[str, str]  # our name of a field -> the data's, where they differ

SHOWN_ERRORS = 20
SHOWN_KEYS = 12
IGNORED_LABEL = -100  # Hugging Face's mark of a token that is not trained
# The form of a record, in the order they are looked for, and the fields that it can't do without.
FIELDS = {
    "tokenized": ("input_ids",),
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


@dataclass(frozen=True, slots=True)
class Example:
    """Hold one training example in one of four forms, and where it came from.

    Either `messages` (chat), or `prompt` and `completion`, or `text`, or `token_ids` alone.
    """

    source: str  # file:line
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""
    text: str = ""
    tools: tuple[Any, ...] | None = None
    train_from: int = 0  # answers among messages[train_from:] are trained, those before are not
    token_ids: tuple[int, ...] = ()
    loss_mask: tuple[bool, ...] = ()  # of each of token_ids: whether predicting it is trained
    record: Mapping[str, Any] = field(default_factory=dict, compare=False)  # as the file has it, of held-out examples


def read_examples(
    paths: str | Sequence[str | WeightedPath], data: DataConfig, skipped: list[str], split: Split = "train"
) -> list[Example]:
    """Read all examples of the files in order.

    Bad records end the run with one UserError that lists them, or with `data.on_error: skip` are appended to
    `skipped`. An empty file is an error in either case.
    """
    examples: list[Example] = []
    errors: list[str] = []
    files = list_files(paths, split)
    for raw in read_raw(files):
        source = place(files, raw)
        try:
            record = decode(raw)
            examples.append(replace(to_example(record, source, data), record=record))
        except RecordError as error:
            errors.append(f"{source}: {error}")
    if errors and data.on_error == "stop":
        raise UserError(summarise(errors) + "\nmend them, or leave them out with data.on_error: skip")
    skipped.extend(errors)
    if not examples:
        raise UserError(f"{paths}: no usable example is left:\n" + summarise(errors))
    return examples


def summarise(errors: Sequence[str], number: int | None = None) -> str:
    """Join the first errors, one a line, and count the rest of `number`, by default of these."""
    more = (len(errors) if number is None else number) - SHOWN_ERRORS
    return "\n".join(errors[:SHOWN_ERRORS]) + (f"\n... and {more:,} more" if more > 0 else "")


def to_example(value: Any, source: str, data: DataConfig) -> Example:
    """Turn one decoded value into an example; raises RecordError that says what was found and expected."""
    if not isinstance(value, dict):
        raise RecordError(f'found {kind(value)}; expected an object such as {{"messages": [...]}}')
    fields = data.columns
    form = _form(value, fields) if data.format == "auto" else data.format
    missing = [name for field in FIELDS[form] if (name := fields.get(field, field)) not in value]
    if missing:
        wanted = f" (data.format is {form})" if data.format != "auto" else ""
        raise RecordError(f"has no {' and '.join(map(repr, missing))}{wanted}; {_keys(value)}")
    return _READERS[form](value, source, fields)


def _form(value: Mapping[str, Any], fields: Fields) -> str:
    """Find the form of a record: the first with a field that is there and not null, else that is there."""
    for form, (first, *_) in FIELDS.items():
        if value.get(fields.get(first, first)) is not None:
            return form
    for form, (first, *_) in FIELDS.items():
        if fields.get(first, first) in value:
            return form
    *others, last = [" and ".join(map(repr, names)) for names in FIELDS.values()]
    raise RecordError(f"has none of {', '.join(others)}, or {last}; {_keys(value)}: name yours in data.columns")


def _keys(value: Mapping[str, Any]) -> str:
    names = [str(name)[:40].encode("utf-8", "backslashreplace").decode() for name in list(value)[:SHOWN_KEYS]]
    more = f" and {len(value) - SHOWN_KEYS} more" if len(value) > SHOWN_KEYS else ""
    return f"its keys are {', '.join(names) or 'none'}{more}"


def _chat(value: Mapping[str, Any], source: str, fields: Fields) -> Example:
    name = fields.get("messages", "messages")
    messages = read_messages(value[name], name)
    require_answer(messages)
    return Example(source, messages=messages, tools=_tools(value, fields))


def _sharegpt(value: Mapping[str, Any], source: str, fields: Fields) -> Example:
    name = fields.get("conversations", "conversations")
    messages = _add_system(read_turns(value[name], name), value, fields)
    require_answer(messages)
    return Example(source, messages=messages, tools=_tools(value, fields))


def _prompt_completion(value: Mapping[str, Any], source: str, fields: Fields) -> Example:
    """Read two texts, which no template is applied to, or two lists of messages, of which the second is trained."""
    names = fields.get("prompt", "prompt"), fields.get("completion", "completion")
    prompt, completion = value[names[0]], value[names[1]]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Example(source, prompt=text(prompt, names[0], may_be_empty=True), completion=text(completion, names[1]))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RecordError(
            f"{names[0]!r} is {kind(prompt)} and {names[1]!r} {kind(completion)}; "
            "expected two texts, or two lists of messages"
        )
    before = read_messages(prompt, names[0])
    messages = before + read_messages(completion, names[1])
    require_answer(messages, train_from=len(before))
    return Example(source, messages=messages, tools=_tools(value, fields), train_from=len(before))


def _alpaca(value: Mapping[str, Any], source: str, fields: Fields) -> Example:
    """Read instruction, input and output as a question and its answer, after `history`'s pairs of these."""
    names = [fields.get(field, field) for field in ("instruction", "input", "output", "history")]
    instruction = text(value[names[0]], names[0], may_be_empty=True)
    context = "" if value.get(names[1]) is None else text(value[names[1]], names[1], may_be_empty=True)
    question = "\n\n".join(part for part in (instruction, context) if part.strip())
    if not question:
        raise RecordError(f"{names[0]!r} is empty; expected the question, or remove the example")
    answer = text(value[names[2]], names[2])
    turns = [*_history(value.get(names[3]), names[3]), ("user", question), ("assistant", answer)]
    messages = tuple([{"role": role, "content": content} for role, content in turns])
    return Example(source, messages=_add_system(messages, value, fields), tools=_tools(value, fields))


def _history(value: Any, name: str) -> list[tuple[str, str]]:
    """Read earlier turns, a list of [question, answer]."""
    pairs = parsed(value)
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RecordError(f"{name!r} is {kind(pairs)}; expected a list of pairs [question, answer]")
    return [(role, text(each, name)) for pair in pairs for role, each in zip(("user", "assistant"), pair, strict=True)]


def _text(value: Mapping[str, Any], source: str, fields: Fields) -> Example:
    name = fields.get("text", "text")
    return Example(source, text=text(value[name], name))


def _tokenized(value: Mapping[str, Any], source: str, fields: Fields) -> Example:
    """Read ids as they are; labels of -100 are not trained, nor is what attention_mask calls padding."""
    name = fields.get("input_ids", "input_ids")
    token_ids = _integers(value[name], name)
    if not token_ids:
        raise RecordError(f"{name!r} is an empty list; there is nothing to learn from it")
    if min(token_ids) < 0 or max(token_ids) >= 2**31:
        found = next(each for each in token_ids if not 0 <= each < 2**31)
        raise RecordError(f"{name!r} holds {found}; expected token ids, from 0")
    begin, end = _unpadded(_beside(value, fields, "attention_mask", token_ids, name), len(token_ids))
    labels = (_beside(value, fields, "labels", token_ids, name) or token_ids)[begin:end]
    token_ids = token_ids[begin:end]
    pairs = zip(labels, token_ids, strict=True)
    wrong = [(label, token_id) for label, token_id in pairs if label != token_id and label != IGNORED_LABEL]
    if wrong:
        found, expected = wrong[0]
        raise RecordError(f"a label is {found} where the token is {expected}; expected {expected} or {IGNORED_LABEL}")
    mask = tuple([label != IGNORED_LABEL for label in labels])
    if not any(mask):
        raise RecordError(f"all labels are {IGNORED_LABEL}; there is nothing to learn from it")
    return Example(source, token_ids=tuple(token_ids), loss_mask=mask)


def _integers(value: Any, name: str) -> list[int]:
    value = parsed(value)
    if not isinstance(value, list):
        raise RecordError(f"{name!r} is {kind(value)}; expected a list of whole numbers")
    if not set(map(type, value)) <= {int}:
        found = next(each for each in value if type(each) is not int)
        raise RecordError(f"{name!r} holds {kind(found)}; expected whole numbers alone: one example, not a batch")
    return value


def _beside(value: Mapping[str, Any], fields: Fields, field: str, token_ids: list[int], name: str) -> list[int] | None:
    """Read a field that has one number for each token, if it is there."""
    own = fields.get(field, field)
    if value.get(own) is None:
        return None
    numbers = _integers(value[own], own)
    if len(numbers) != len(token_ids):
        raise RecordError(f"{own!r} has {len(numbers)} numbers and {name!r} {len(token_ids)}; expected as many")
    return numbers


def _unpadded(attention: list[int] | None, length: int) -> tuple[int, int]:
    """Return begin and end of the tokens that are no padding, which may stand before or after them alone."""
    if attention is None:
        return 0, length
    if not set(attention) <= {0, 1} or 1 not in attention:
        raise RecordError("'attention_mask' holds other numbers than 0 and 1, or no 1; expected 1 for each true token")
    begin, end = attention.index(1), length - attention[::-1].index(1)
    if 0 in attention[begin:end]:
        raise RecordError("'attention_mask' is 0 between ones; expected it only for padding before or after the tokens")
    return begin, end


def _tools(value: Mapping[str, Any], fields: Fields) -> tuple[Any, ...] | None:
    name = fields.get("tools", "tools")
    return read_tools(value[name], name) if name in value else None


def _add_system(
    messages: tuple[Mapping[str, Any], ...], value: Mapping[str, Any], fields: Fields
) -> tuple[Mapping[str, Any], ...]:
    name = fields.get("system", "system")
    return with_system(messages, value.get(name), name)


_READERS: dict[str, Callable[[Mapping[str, Any], str, Fields], Example]] = {
    "tokenized": _tokenized,
    "chat": _chat,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}
