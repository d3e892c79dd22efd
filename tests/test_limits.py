"""A template can't run code, fill the memory or go on for ever, and what is rewritten to bound it computes the same."""

import time
import tracemalloc

import pytest

from common.data.limits import MAX_RENDERED_CHARACTERS
from common.data.records import RecordError
from common.data.template import ChatTemplate
from common.errors import UserError

MESSAGES = [
    {"role": "user", "content": "What <is> it?"},
    {"role": "assistant", "content": "Yes & no.\nMore."},
    {"role": "user", "content": "aaa"},
]


def grown(step: str, start: str = "'xx'") -> str:
    """Write a template that does something to a value again and again, and prints it."""
    return (
        "{% set ns = namespace(x=" + start + ") %}{% for _ in range(99) %}{% set ns.x = " + step + " %}{% endfor %}"
        "{{ ns.x }}"
    )


def long_loop(body: str) -> str:
    return (
        "{% set x = 'x' * 9000000 %}{% for a in range(99999) %}{% for b in range(99999) %}"
        + body
        + "{% endfor %}{% endfor %}"
    )


REACHES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages.append(1) }}",
]
GROWS = [
    "{{ 'x' * 10**10 }}",
    "{{ ([0] * 10**10)|length }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{n}}'.format(1, n=10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.encode().ljust(10**10) }}",
    "{{ (5).to_bytes(10**10) }}",
    "{{ 'x\n'|indent(10**10) }}",
    "{{ 2 ** (10**10) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ range(99999)|list|tojson(separators=('x' * 10**7, 'y')) }}",
    grown("ns.x ~ ns.x"),
    grown("ns.x + ns.x"),
    grown("ns.x * 2"),
    grown("ns.x * ns.x", "10"),
    grown("ns.x.join(ns.x)"),
    grown("ns.x|join(ns.x)"),
    grown("ns.x.replace('x', ns.x)"),
    grown("ns.x|replace('x', ns.x)"),
    grown("[ns.x, ns.x]"),
    grown("(ns.x, ns.x)"),
    grown("{'a': ns.x, 'b': ns.x}"),
    grown("dict(a=ns.x, b=ns.x)"),
    "{% set ns = namespace(x='x') %}{% for _ in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
]
NEVER_ENDS = [
    "{% for a in range(10**9) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    long_loop("{% if 'y' in x %}{% endif %}"),
    long_loop("{% set y = x[1:] %}"),
    long_loop("{% set y = x.upper() %}"),
]


SAME = [
    "{{ 1 + 2 }} {{ 1.5 + 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ 6 * 7 }} {{ 'ab' * 3 }} {{ 3 * 'ab' }} {{ -2 * 3 + 1 }}",
    "{{ 'a' + 'b' + 'c' }} {{ [1] + [2] + [[3]] }} {{ (1, 2) + (3,) }} {{ [0] * 3 }} {{ {'a': [1, messages]} }}",
    "{{ 'a' ~ 1 ~ none ~ missing ~ [1, 'x'] }} {{ missing }} {{ none }} {{ true }} {{ 1.0 }}",
    "{{ '%s-%d %05.1f%%' % ('a', 3, 2.5) }} {{ '%s' % 'a' }} {{ '{} {:>5} {{}} {x}'.format(1, 2, x=3) }}",
    "{{ '%s=%s'|format('a', 1) }} {{ 2.345|round(1) }} {{ 'a\nb'|indent(2, true) }} {{ 'a\n\nb'|indent('> ') }}",
    "{{ 'aXbXc'|replace('X', '-') }} {{ 'aXbXc'|replace('X', '-', 1) }} "
    "{{ 'aXb'.replace('X', '') }} {{ 5|replace(5, 6) }}",
    "{{ messages|map(attribute='role')|join(', ') }} {{ [1, 2]|join }} {{ ', '.join(['a', 'b']) }} {{ 'abc'|list }}",
    "{{ '<'|e + '<' }} {{ ('<'|safe) ~ '<' }} {{ messages[0].content|upper|trim }} {{ [3, 1, 2]|sort|string }}",
    "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.revindex0 }}"
    "{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{{ loop.cycle('a', 'b') }};{% endfor %}",
    "{% for k, v in messages[0].items() if k != 'role' %}{{ k }}={{ v }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% for x in [] %}a{% else %}empty{% endfor %}{% for x in 'ab' %}{{ x }}.{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "{% macro m(a, b='d') %}<{{ a }}{{ b }}{{ varargs }}{{ caller() if caller }}>{% endmacro %}{"
    "{ m(1) }}{{ m(1, 2, 3) }}"
    "{% call m(4) %}inside{% endcall %}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x }}{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}"
    "{% filter upper %}c{{ x }}{% endfilter %}",
    "{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.l = ns.l + [m.role] %}"
    "{% endfor %}{{ ns.n }}{{ ns.l }}",
    "{{ messages|tojson }} {{ messages|tojson(indent=2) }} {{ messages[::-1]|length }} "
    "{{ 'abc'[1:] }} {{ messages[0]['role'] }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }} "
    "{{ messages|map('length')|sum }} {{ 5 in (4, 5) }}",
    "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}|{%- generation -%}  y  {%- endgeneration -%}  |",
    "{{ messages.items }} {{ {'items': 1}.get('items') }} {{ {'x': {'y': 2}}.x.y }} {{ loop }} {{ dict(a=1).a }}",
]


@pytest.mark.parametrize("source", REACHES + GROWS + NEVER_ENDS)
def test_a_hostile_template_is_an_error_in_bounded_time_and_memory(source, monkeypatch):
    monkeypatch.setattr("common.data.limits.MAX_WORK", 300_000)  # a tenth, as measuring memory is slow
    monkeypatch.setattr("common.data.limits.MAX_SECONDS", 1.0)
    template = ChatTemplate(source, "base")
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(RecordError, match="the chat template ") as caught:
            template.render({"messages": MESSAGES})
        assert time.monotonic() - started < 15, "the limit is 1 s; on a busy machine a step may take long"
        assert tracemalloc.get_traced_memory()[1] < 12 * MAX_RENDERED_CHARACTERS
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400


def test_a_tree_of_namespaces_is_not_written_out():
    template = ChatTemplate(grown("namespace(a=ns.x, b=ns.x)") + "{{ [ns.x] }}", "base")
    assert template.render({}).text == "<Namespace>[<Namespace>]"


def test_the_real_budget_ends_nested_loops_within_seconds():
    started = time.monotonic()
    with pytest.raises(RecordError, match=r"does not come to an end with this conversation: stopped after 4,000,000"):
        ChatTemplate(NEVER_ENDS[1], "base").render({})
    assert time.monotonic() - started < 30


def test_a_template_keeps_its_budget_for_the_next_conversation(monkeypatch):
    monkeypatch.setattr("common.data.limits.MAX_WORK", 1000)
    template = ChatTemplate("{% for m in messages %}x{% endfor %}", "base")
    for _ in range(3):
        assert template.render({"messages": [0] * 900}).text == "x" * 900
    with pytest.raises(RecordError, match="does not come to an end"):
        template.render({"messages": [0] * 1100})
    assert template.render({"messages": [0] * 900}).text == "x" * 900


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 5000,
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "9" * 5000 + " }}",
        "{{ 'x'|center(9) }}",
        "{% debug %}",
        "{% if %}",
    ],
    ids=["deep", "unclosed", "nested", "digits", "missing filter", "unknown tag", "no condition"],
)
def test_a_template_that_python_can_not_compile_is_named(source):
    with pytest.raises(UserError, match=r"^base: the chat template can't be read: ."):
        ChatTemplate(source, "base")


def test_a_template_of_a_megabyte_is_refused():
    with pytest.raises(UserError, match="base: a chat template of 1,000,001 characters"):
        ChatTemplate("x" * 1_000_001, "base")


@pytest.mark.parametrize("source", SAME)
def test_what_is_rewritten_computes_what_transformers_computes(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template([MESSAGES], chat_template=source)
    assert (
        ChatTemplate(source, "base").render({"messages": MESSAGES, "tools": None, "documents": None}).text
        == expected[0]
    )
