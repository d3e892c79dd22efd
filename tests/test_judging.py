"""What answers are judged by: each metric by itself, fields against Donut's formula, functions of the user's own."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import EvaluationConfig
from common.errors import OwnCodeError, UserError
from common.evaluate.json_values import fields, parse, same
from common.evaluate.metrics import field_of, make_metrics
from common.evaluate.questions import Question
from common.evaluate.scores import add_up, judge

KEYS = st.text("abc", min_size=1, max_size=2)
LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["x", "y", "1"])
# Lists and objects that hold something: for Donut an empty one is nothing at all.
INNER = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(KEYS, INNER, min_size=1, max_size=4)


def question(expected: str, record: dict | None = None) -> Question:
    return Question("asked", (1,), expected, "test.jsonl:3", record or {})


def scores(metric: str, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Judge pairs of an answer and what was expected."""
    questions = [question(expected) for _, expected in pairs]
    metrics = make_metrics([metric], questions)
    return add_up([judge(metrics, q, answer) for q, (answer, _) in zip(questions, pairs, strict=True)])


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "right"),
    [
        ("valid_json", '{"a": 1}', "", True),
        ("valid_json", "[1, 2]", "", True),
        ("valid_json", ' {"a": 1}\n', "", True),
        ("valid_json", '{"a": 1', "", False),
        ("valid_json", '{"a": NaN}', "", False),
        ("valid_json", "12", "", False),
        ("valid_json", "yes", "", False),
        ("valid_json", "[" * 100_000, "", False),
        ("valid_json", "[" * 101 + "]" * 101, "", False),
        ("valid_json", "[" * 100 + "]" * 100, "", True),
        ("valid_json", "[" + "9" * 5000 + "]", "", False),
        ("exact_match", " yes\n", "yes", True),
        ("exact_match", "Yes", "yes", False),
        ("exact_match", '{"b": 2, "a": 1.0}', '{"a":1,"b":2}', True),
        ("exact_match", '{"a": 1}', '{"a": 1, "b": 2}', False),
        ("exact_match", "not JSON", '{"a": 1}', False),
        ("exact_match", '{"a": "12"}', '{"a": 12}', False),
        ("exact_match", '{"a": [true]}', '{"a": [1]}', False),
        ("exact_match", "[2, 1]", "[1, 2]", False),
        ("json_field:a", '{"a": "x", "b": 9}', '{"a": "x", "b": 2}', True),
        ("json_field:a", '{"b": 2}', '{"a": "x", "b": 2}', False),
        ("json_field:a", "[1]", '{"a": 1}', False),
        ("json_field:a", "{}", '{"a": null}', False),
        ("json_field:a.b", '{"a": {"b": 1, "c": 2}}', '{"a": {"b": 1}}', True),
        ("json_field:a.b", '{"a": 1}', '{"a.b": 1}', False),
        ("json_field:a.b", '{"a.b": 1}', '{"a": {"b": 1}}', True),
        ("regex:^[a-z]+$", "word", "anything", True),
        ("regex:^[a-z]+$", "two words", "anything", False),
        (r"regex:#### (\d+)", "so it is #### 42", "that makes #### 42", True),
        (r"regex:#### (\d+)", "so it is #### 41", "that makes #### 42", False),
        (r"regex:#### (\d+)", "42", "that makes #### 42", False),
        (r"regex:(?i)(yes)|(no)", "YES", "yes", False),
    ],
)
def test_an_answer_is_judged(metric, answer, expected, right):
    assert scores(metric, [(answer, expected)]) == {metric: float(right)}


@pytest.mark.parametrize("expected", ["yes", "[1]", '{"b": 1}'])
def test_a_field_that_an_expected_answer_lacks_is_the_users_mistake_before_anything_is_asked(expected):
    with pytest.raises(UserError, match=r"json_field:a: the expected answer of test\.jsonl:3 has no field 'a'"):
        make_metrics(["json_field:a"], [question(expected)])


def test_groups_need_something_to_be_compared_with_and_a_pattern_without_groups_does_not():
    with pytest.raises(UserError, match=r"regex:=(\(x\)|.*): its groups .* test\.jsonl:3 doesn't match: y"):
        make_metrics(["regex:=(x)"], [question("y")])
    make_metrics(["regex:=x"], [question("y")])


def test_fields_need_json():
    with pytest.raises(UserError, match=r"json_fields: the expected answer of test\.jsonl:3 is no JSON"):
        make_metrics(["json_fields"], [question("yes")])


def donut_f1(answers: list[dict], expected: list[dict]) -> float:
    """Count as JSONParseEvaluator.cal_f1 of clovaai/donut does (donut/util.py, MIT), apart from true being 1 there."""

    def flatten(data: dict) -> list[tuple[str, object]]:
        found: list[tuple[str, object]] = []

        def visit(value: object, key: str = "") -> None:
            if type(value) is dict:
                for child_key, child_value in value.items():
                    visit(child_value, f"{key}.{child_key}" if key else child_key)
            elif type(value) is list:
                for item in value:
                    visit(item, key)
            else:
                found.append((key, (type(value), value)))

        visit(data)
        return found

    total_tp, total_fn_or_fp = 0, 0
    for said, answer in zip(map(flatten, answers), map(flatten, expected), strict=True):
        for field in said:
            if field in answer:
                total_tp += 1
                answer.remove(field)
            else:
                total_fn_or_fp += 1
        total_fn_or_fp += len(answer)
    return total_tp / (total_tp + total_fn_or_fp / 2)


@given(st.lists(st.tuples(DOCUMENTS, DOCUMENTS), min_size=1, max_size=4))
def test_fields_are_counted_as_donut_counts_them(pairs):
    found = scores("json_fields", [(json.dumps(answer), json.dumps(expected)) for answer, expected in pairs])
    # The same whole numbers, divided once; Donut divides twice.
    assert found["json_fields:f1"] == pytest.approx(donut_f1(*map(list, zip(*pairs, strict=True))), rel=1e-12)


def test_precision_and_recall_are_those_of_all_fields_and_of_each():
    pairs = [
        ('{"room": "hall", "lamp": {"on": true}}', '{"room": "hall", "lamp": {"on": false, "dim": 3}}'),
        ('{"room": "attic"}', '{"room": "attic"}'),
        ("no JSON", '{"room": "hall"}'),
    ]
    found = scores("json_fields", pairs)
    assert found["json_fields:precision"] == 2 / 3 and found["json_fields:recall"] == 2 / 5
    assert found["json_fields:f1"] == 2 * 2 / (3 + 5)
    assert found["json_fields:precision:room"] == 1 and found["json_fields:recall:room"] == 2 / 3
    assert found["json_fields:f1:lamp.on"] == 0 and found["json_fields:precision:lamp.dim"] == 0
    assert field_of("json_fields:f1:lamp.on") == ("f1", "lamp.on")
    assert field_of("json_fields:f1") is None and field_of("json_field:f1:x") is None


@given(INNER, INNER)
def test_equal_values_have_equal_fields_and_only_lists_may_differ_in_order(one, other):
    assert same(one, one) and same(one, json.loads(json.dumps(one)))
    if isinstance(one, dict) and same(one, other):
        assert fields(one) == fields(other)


def test_empty_values_are_fields_too():
    assert fields(parse('{"a": [], "b": {}}')) != fields(parse('{"a": {}, "b": []}')) != fields(parse("{}"))
    assert fields(parse('{"a": "list"}')) != fields(parse('{"a": []}'))


# Functions of the user's own

OWN = """
from neighbour import HALF

def half(answer, expected, record):
    assert record["level"] == "easy"
    return HALF if answer != expected else True

def several(answer, expected, record):
    return {"length": len(answer), "same": answer == expected}

def broken(answer, expected, record):
    return deeper(answer)

def deeper(answer):
    return int(answer)  # line 15

def nothing(answer, expected, record):
    pass

def too_few(answer, expected):
    return 1

not_callable = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "neighbour.py").write_text("HALF = 0.5\n")
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("x = 1\nimport nosuchlibrary\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("neighbour", "mine"):
        sys.modules.pop(name, None)


def judged(metric: str, answers: list[str]) -> dict[str, float]:
    asked = question("yes", {"level": "easy"})
    metrics = make_metrics([metric], [asked])
    return add_up([judge(metrics, asked, answer) for answer in answers])


@pytest.mark.parametrize("place", ["mine.py:half", "mine:half"])
def test_a_function_of_the_users_is_given_answer_expected_and_record(own, place):
    assert judged(f"python:{place}", ["yes", "no"]) == {f"python:{place}": 0.75}


def test_a_dict_makes_a_score_of_each_number(own):
    assert judged("python:mine.py:several", ["yes", "certainly"]) == {
        "python:mine.py:several:length": 6.0,
        "python:mine.py:several:same": 0.5,
    }


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("mine.py:broken", r"mine\.py:15: ValueError: invalid literal .*'no', on the answer to test\.jsonl:3"),
        ("mine.py:nothing", r"returned None on the answer to test\.jsonl:3; expected a number"),
        ("bad.py:f", r"bad\.py:1: SyntaxError: "),
        ("raises.py:f", r"raises\.py:2: ModuleNotFoundError: No module named 'nosuchlibrary'"),
        ("raises:f", r"raises\.py:2: ModuleNotFoundError: No module named 'nosuchlibrary'"),
    ],
)
def test_what_the_users_code_raises_is_told_with_its_line(own, metric, message):
    with pytest.raises(OwnCodeError, match=message) as caught:
        judged(f"python:{metric}", ["no"])
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("nosuch.py:f", r"no such file \(looked from "),
        ("nosuch.module:f", r"no module nosuch\.module"),
        ("mine.py:nosuch", "has no nosuch; expected a function of"),
        ("mine.py:not_callable", "is no function; expected a function of"),
        ("mine.py:too_few", r"too many positional arguments; expected a function of \(answer, expected, record\)"),
    ],
)
def test_a_function_that_is_not_there_is_the_users_mistake(own, metric, message):
    with pytest.raises(UserError, match=message):
        judged(f"python:{metric}", ["no"])


@pytest.mark.parametrize(
    "metric", ["exact", "json_field:", "json_fields:a", "regex:", "regex:(", "python:f", "python:a.py:", "valid_json:x"]
)
def test_a_config_takes_no_other_metrics(metric):
    with pytest.raises(ValueError, match=r"expected valid_json, exact_match|is no regular expression"):
        EvaluationConfig(metrics=[metric])
