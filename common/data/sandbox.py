"""What a chat template may reach and do, since a model's template is a stranger's code.

Jinja's sandbox keeps a template from Python's internals but not from filling the memory or never ending. Here the
parsed template is rewritten so that every operation that can grow a value (`+ ~ * % **`, lists, loops, output) goes
through `Limits`. The cost: a few filters and text methods that no known chat template uses and that only pad are
missing (`center`, `ljust`, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from common.data.limits import PADS_BRACES, Limits

PADDING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode", "format_map", "maketrans"}
)
# They pad, nest, or (random) change from day to day; no known chat template uses one.
LEFT_OUT = frozenset(
    {"center", "wordwrap", "batch", "slice", "groupby", "random", "xmlattr", "urlize", "pprint", "filesizeformat"}
)
DICT_METHODS = frozenset(dir(dict))
LOOP_FIELDS = frozenset({"index", "index0", "first", "last", "length", "previtem", "nextitem"})


class Fields(Namespace):
    """Be a namespace whose text is short: one may hold others, twice each, to any depth."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Guard(NodeTransformer):
    """Rewrite a parsed template so that what can grow or repeat goes through `Limits`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Count rounds."""
        self.generic_visit(node)
        node.iter = _through("_rounds", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        """Measure what is printed."""
        self.generic_visit(node)
        known = (nodes.TemplateData, nodes.Const, nodes.ExtensionAttribute)
        node.nodes = [
            each
            if isinstance(each, known) or (isinstance(each, nodes.Filter) and each.name in ("_add", "_concat"))
            else _through("_text", each)
            for each in node.nodes
        ]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:
        """Join a whole chain of `+` at once."""
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(left.right)
            left = left.left
        return _through("_add", nodes.Tuple([self.visit(part) for part in (left, *reversed(parts))], "load"))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """Join texts."""
        self.generic_visit(node)
        return _through("_concat", nodes.Tuple(node.nodes, "load"))

    def visit_Mul(self, node: nodes.Mul) -> nodes.Filter:
        """Repeat, or multiply."""
        return self._binary("_multiply", node)

    def visit_Pow(self, node: nodes.Pow) -> nodes.Filter:
        """Raise to a power."""
        return self._binary("_power", node)

    def visit_Mod(self, node: nodes.Mod) -> nodes.Filter:
        """Fill a pattern, or take a remainder."""
        return self._binary("_modulo", node)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        """Measure a list that holds other values."""
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _through("_value", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        """Measure a tuple that holds other values, unless names are assigned to."""
        self.generic_visit(node)
        fixed = node.ctx != "load" or all(isinstance(item, (nodes.Const, nodes.Slice)) for item in node.items)
        return node if fixed else _through("_value", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        """Measure a dict."""
        self.generic_visit(node)
        return _through("_value", node)

    def _binary(self, name: str, node: nodes.BinExpr) -> nodes.Filter:
        return _through(name, nodes.Tuple([self.visit(node.left), self.visit(node.right)], "load"))


class Sandbox(ImmutableSandboxedEnvironment):
    """Hold a template to its limits, and from anything but the values it is given."""

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self.limits = limits
        self.concat = limits.concat  # type: ignore[assignment]
        names = self.filters.keys() - LEFT_OUT
        self.filters = {name: _counted(self.filters[name], limits) for name in names}
        self.filters |= {"indent": limits.filter_indent, "format": limits.filter_format, "round": limits.filter_round}
        self.filters |= {"replace": limits.filter_replace, "string": limits.text}
        self.filters |= {"join": _counted(_join(limits), limits)}
        self.filters |= {"_rounds": limits.rounds, "_text": limits.text, "_add": limits.add, "_concat": limits.concat}
        self.filters |= {"_multiply": limits.multiply, "_power": limits.power, "_modulo": limits.modulo}
        self.filters |= {"_value": limits.value}
        self.globals["namespace"] = Fields
        del self.globals["lipsum"]  # random words, as many as asked for

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up `obj.attribute`, the two usual cases first: a field of a message, and `loop.first`."""
        kind = type(obj)
        if kind is dict and attribute not in DICT_METHODS and attribute in obj:
            return obj[attribute]
        if kind is LoopContext and attribute in LOOP_FIELDS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Bound the width that `"{}".format` pads to."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            self.limits.width(value.__self__, PADS_BRACES)
        return wrapped

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse what the sandbox forbids at once, rather than printing nothing in its place."""
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which no template may")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow what Jinja's sandbox allows, save the methods that pad and those of numbers and bytes."""
        if isinstance(obj, (int, float, bytes)) or (isinstance(obj, str) and attr in PADDING):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a call and its result."""
        __self.limits.before_call(__obj, args)
        return __self.limits.value(super().call(__context, __obj, *args, **kwargs))


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counted(function: Callable[..., Any], limits: Limits) -> Callable[..., Any]:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return limits.value(function(*args, **kwargs))

    return counted


def _join(limits: Limits) -> Callable[..., Any]:
    """Make the `join` filter, which is `concat` with something between the values."""
    original = FILTERS["join"]

    @wraps(original)
    def join(eval_context: Any, value: Any, between: str = "", attribute: Any = None) -> Any:
        values = list(limits.rounds(value))
        limits.fit(len(values) * len(between))
        limits.value(values)
        return original(eval_context, values, between, attribute)

    return join
