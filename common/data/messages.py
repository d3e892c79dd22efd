"""Messages as chat templates expect them, from what data sets hold: `messages` of any dialect, and ShareGPT's turns.

A message of role and text, by far the most common, is checked and passed on as it is. Others become that: parts are
joined, tool calls and tools written as JSON text are read, the names of reasoning are made one. What is no message is
refused with its number. The cost: what a template would find in the dialect itself it finds in this form alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.data.readers import RecordError

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
MAX_DEPTH = 64  # of what a message or tool holds: JSON writers and pickle recurse
_SPEAKERS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "chatgpt", "gpt4", "gpt-4", "bing", "bard", "claude", "model", "bot", "chatbot", "ai"), "assistant"
    ),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}


def read_messages(value: Any, name: str) -> tuple[Message, ...]:
    """Check and normalise the messages of the field `name`; raises RecordError that names the message."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise RecordError(f'{name!r} is {kind(value)}; expected a list of {{"role", "content"}}')
    return tuple(
        [m if _is_plain(m) else _normalised(m, f"message {number}") for number, m in enumerate(value, start=1)]
    )


def read_turns(value: Any, name: str) -> tuple[Message, ...]:
    """Turn ShareGPT's `{"from", "value"}` into messages; raises RecordError that names the message."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise RecordError(f'{name!r} is {kind(value)}; expected a list of {{"from", "value"}}')
    messages = [_from_turn(turn, f"message {number}") for number, turn in enumerate(value, start=1)]
    return tuple([m if _is_plain(m) else _normalised(m, f"message {n}") for n, m in enumerate(messages, start=1)])


def read_tools(value: Any, name: str) -> tuple[Any, ...] | None:
    """Read the schemas of the tools, also where they or each of them are JSON text; None for none."""
    value = parsed(value)
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list):
        raise RecordError(f"{name!r} is {kind(value)}; expected a list of JSON schemas")
    tools = tuple([parsed(tool) for tool in value])
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict):
            raise RecordError(f"tool {number} of {name!r} is {kind(tool)}; expected a JSON schema")
    check_plain(list(tools), repr(name))
    return tools


def with_system(messages: tuple[Message, ...], system: Any, name: str) -> tuple[Message, ...]:
    """Put a system text before the messages; raises RecordError where they begin with another."""
    if system is None or system == "":
        return messages
    first = {"role": "system", "content": text(system, name, may_be_empty=True)}
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system:
            raise RecordError(f"{name!r} is not the first system message; keep one of them")
        return messages
    return (first, *messages)


def require_answer(messages: Sequence[Message], train_from: int = 0) -> None:
    """Raise RecordError unless an assistant answers from message `train_from` on, and never with nothing."""
    answers = [message for message in messages[train_from:] if message["role"] == "assistant"]
    if not answers:
        raise RecordError("has no answer: no message has the role 'assistant'")
    for message in answers:
        content = message["content"]
        if not (content and not content.isspace()) and not message.get("tool_calls"):
            raise RecordError("has an empty answer; remove the example or write one")
        if message.get("weight", 1) != 1:
            raise RecordError(
                f"has an answer of weight {shown(message['weight'])}, but all answers count the same; to learn only "
                "the last ones, write the messages before them as 'prompt' and the others as 'completion'"
            )


def text(value: Any, name: str, may_be_empty: bool = False) -> str:
    """Check a text; raises RecordError for another type, for half characters and, unless allowed, for nothing."""
    if type(value) is not str:
        raise RecordError(f"{name!r} is {kind(value)}; expected a text")
    if not may_be_empty and (not value or value.isspace()):
        raise RecordError(f"{name!r} is empty; there is nothing to learn from it")
    if not _is_unicode(value):
        raise RecordError(_half_character(repr(name), value))
    return value


def parsed(value: Any) -> Any:
    """Read a list or object that a data set holds as JSON text; anything else stays as it is."""
    if type(value) is not str or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def kind(value: Any) -> str:
    """Name the kind of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    numbers = {int: "a number", float: "a number"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value)) or numbers.get(type(value)) or f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """Show a found value, cut short and printable whatever it is."""
    try:
        short = repr(value[:40] if isinstance(value, str | list) else value)
    except RecursionError:
        short = kind(value)
    return short if len(short) <= 60 else f"{short[:60]}..."


def check_plain(value: Any, where: str) -> None:
    """Raise RecordError for what templates can't write: too deep, half characters, infinite numbers."""
    level = [value]
    for _ in range(MAX_DEPTH):
        for item in level:
            if isinstance(item, str) and not _is_unicode(item):
                raise RecordError(_half_character(where, item))
            if isinstance(item, float) and not math.isfinite(item):
                raise RecordError(f"{where} holds the number {item}, which JSON has not; write null or leave it out")
        level = [each for item in level if isinstance(item, dict | list) for each in _inside(item)]
        if not level:
            return
    raise RecordError(f"{where} is nested more than {MAX_DEPTH} levels deep; expected at most that")


def _inside(item: dict[Any, Any] | list[Any]) -> list[Any]:
    return item if isinstance(item, list) else [*item, *item.values()]


def _is_plain(message: Any) -> bool:
    """Tell whether a message is a known role and a text and nothing else, which needs no work."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(content := message.get("content")) is str
        and (content.isascii() or _is_unicode(content))
    )


def _normalised(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not ({"role", "content"} <= message.keys() or _calls(message)):
        turn = isinstance(message, dict) and "from" in message
        hint = (
            "; for from and value set data.format: sharegpt and data.columns: {conversations: messages}" if turn else ""
        )
        raise RecordError(f"{where} is {kind(message)} without role and content{hint}")
    role = message.get("role")
    if role not in ROLES:
        raise RecordError(f"{where} has the role {shown(role)}; expected {', '.join(ROLES)}")
    check_plain(message, where)
    optional = ("tool_calls", *REASONING)
    result = {name: value for name, value in message.items() if name not in optional and value is not None}
    calls = _tool_calls(_calls(message), where) if _calls(message) else None
    reasoning = _reasoning(message, where)
    result["content"] = _content(message.get("content", ""), where, may_be_null=bool(calls or reasoning))
    return result | ({"reasoning_content": reasoning} if reasoning else {}) | ({"tool_calls": calls} if calls else {})


def _content(content: Any, where: str, may_be_null: bool) -> str | None:
    """Return the text of a message, its parts joined; null stays where the message is a tool call."""
    if isinstance(content, str) or (content is None and may_be_null):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise RecordError(f"{where} has {kind(content)} as content; expected a text")
    if not content and not may_be_null:
        raise RecordError(f"{where} has an empty list as content; expected a text")
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise RecordError(
                f"{where} has a part of type {shown(part['type'])}; expected text: nothing else is learnt"
            )
    return "".join(part["text"] for part in content)


def _reasoning(message: Message, where: str) -> str | None:
    """Return the reasoning under whichever of its names; raises RecordError where two differ."""
    found = {name: message[name] for name in REASONING if message.get(name) not in (None, "")}
    for name, value in found.items():
        if not isinstance(value, str):
            raise RecordError(f"{where} has {kind(value)} as {name}; expected a text")
    if len(set(found.values())) > 1:
        raise RecordError(f"{where} has different texts as {' and '.join(found)}; keep one of them")
    return next(iter(found.values()), None)


def _calls(message: Message) -> Any:
    return parsed(message.get("tool_calls"))


def _tool_calls(calls: Any, where: str) -> list[Message]:
    """Return tool calls as `{"function": {"name", "arguments"}}`, the arguments an object."""
    if not isinstance(calls, list):
        raise RecordError(f"{where} has {kind(calls)} as tool_calls; expected a list")
    check_plain(calls, where)
    result: list[Message] = []
    for call in map(parsed, calls):
        flat = isinstance(call, dict) and "function" not in call
        function = call if flat else call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(f"{where} has a tool call without a name; expected {_CALL}")
        arguments = parsed(function.get("arguments"))
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, dict):
            raise RecordError(f"{where} calls {shown(function['name'])} with {kind(arguments)}; expected {_CALL}")
        check_plain(arguments, where)
        function = {**function, "arguments": arguments}
        result.append({"type": "function", "function": function} if flat else {**call, "function": function})
    return result


_CALL = '{"function": {"name": ..., "arguments": {...}}}'


def _from_turn(turn: Any, where: str) -> Any:
    """Give a turn the names of a message; one that has these already stays as it is."""
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return turn
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise RecordError(f"{where} is {kind(turn)} without from and value")
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RecordError(f"{where} is from {shown(speaker)}; expected {', '.join(_SPEAKERS)}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")} if len(turn) > 2 else {}
    if role != "function_call":
        return {"role": role, "content": turn["value"], **rest}
    calls = parsed(turn["value"])
    return {"role": "assistant", "content": "", **rest, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _is_unicode(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _half_character(where: str, value: str) -> str:
    found = next(char for char in value if "\ud800" <= char <= "\udfff")
    return f"{where} holds {found!a}, half a character (a lone surrogate), which is no text; remove it"
