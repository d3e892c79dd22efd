"""A chat template: from messages to the text that the model reads, and the answers that the template itself marks.

Rendered by a sandboxed Jinja with what Hugging Face gives templates, without transformers: a start takes
milliseconds. Output is taken piece by piece, so that its size is known while it grows. `{% generation %}` writes two
empty pieces that carry its place; where they don't reach the output (a macro or a block swallows them) the template
counts as one without marks, rather than with wrong ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from common.data.limits import Limits
from common.data.records import RecordError
from common.data.sandbox import Guard, Sandbox
from common.errors import UserError

MAX_TEMPLATE_CHARACTERS = 1_000_000
# Templates that print "today" get this day (Llama 3's own default), or a run resumed tomorrow would read other
# tokens than today's.
TEMPLATE_DATE = datetime(2024, 7, 26)
MAX_INDENT = 16  # of JSON, and characters of its separators


class Rendered(NamedTuple):
    """Hold a conversation as text, and the characters [begin, end) that the template marks as answers."""

    text: str
    answers: tuple[tuple[int, int], ...]


class ChatTemplate:
    """Render conversations as a base model's template says."""

    def __init__(self, source: str, place: str) -> None:
        """Compile a template; raises UserError that names its `place` where it can't be read."""
        self._limits = Limits()
        environment = Sandbox(
            self._limits,
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        environment.filters["tojson"] = self._tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise UserError(f"{place}: a chat template of {len(source):,} characters; download the model again")
        try:
            self._template = environment.from_string(Guard().visit(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{place}: the chat template can't be read: {error}, line {error.lineno}") from None
        except Exception as error:  # Python's compiler has its own limits: of depth, of digits, of nesting
            raise UserError(f"{place}: the chat template can't be read: {_said(error)}") from None
        self._template.globals = dict(self._template.globals)  # Jinja's chain of dicts is copied slowly, each time

    def render(self, variables: Mapping[str, Any]) -> Rendered:
        """Write a conversation; raises RecordError where the template refuses it or does not come to an end."""
        self._limits.start()
        try:
            return self._collect(variables)
        except RecordError:
            raise
        except RecursionError:
            raise RecordError("the chat template calls itself without end; check the model's chat_template") from None
        except Exception as error:  # a template is a program, and may fail in every way
            raise RecordError(f"the chat template refuses this conversation: {_said(error)}") from None

    def _collect(self, variables: Mapping[str, Any]) -> Rendered:
        pieces: list[str] = []
        answers: list[tuple[int, int]] = []
        size = begin = 0
        for piece in self._template.generate(variables):
            if type(piece) is Mark:
                if piece.opens:
                    begin = size
                else:
                    answers.append((begin, size))
                continue
            size += len(piece)
            self._limits.bound(size)
            pieces.append(piece)
        return Rendered("".join(pieces), tuple(answers))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        self._limits.value(value)
        written = (indent if isinstance(indent, str) else " " * min(indent or 0, MAX_INDENT + 1), *(separators or ()))
        if max(map(len, written)) > MAX_INDENT:
            raise RecordError(f"the chat template indents or separates JSON by more than {MAX_INDENT}; check it")
        if indent is None:
            return self._limits.text(
                json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
            )
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        pieces, size = [], 0
        for piece in encoder.iterencode(value):
            size += len(piece)
            self._limits.bound(size)
            pieces.append(piece)
        return "".join(pieces)


class Mark(str):
    """Be an empty piece of output that says where an answer begins or ends."""

    opens: bool

    def __new__(cls, opens: bool) -> Mark:
        """Make one of the two."""
        mark = super().__new__(cls)
        mark.opens = opens
        return mark

    def __str__(self) -> str:
        return self  # Jinja prints str(value), which would make a plain text of it


class GenerationTag(Extension):
    """Read {% generation %} ... {% endgeneration %}, around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)
    opening = Mark(True)
    closing = Mark(False)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Put a mark before and after the body, which has a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [
            nodes.Output([self.attr("opening")], lineno=line),
            nodes.Scope(body, lineno=line),
            nodes.Output([self.attr("closing")], lineno=line),
        ]


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
