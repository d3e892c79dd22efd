"""From data files to examples: what is read, and what a person reads for every bad line."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import DataConfig
from common.data.records import SHOWN_ERRORS, Example, read_examples
from common.errors import UserError

USER = {"role": "user", "content": "What is the answer?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
CHAT = {"messages": [USER, ASSISTANT]}
GOOD = json.dumps(CHAT)


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def read(content: str | bytes, name: str = "data.jsonl", **data) -> list[Example]:
    raw = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return read_examples(name, DataConfig(**data), [])


def refusal(content: str | bytes, name: str = "data.jsonl", **data) -> str:
    with pytest.raises(UserError) as caught:
        read(content, name, **data)
    return str(caught.value)


def test_each_form_is_recognised_by_its_fields():
    lines = [CHAT, {"prompt": "a", "completion": "b"}, {"text": "c"}]
    assert read("\n".join(map(json.dumps, lines))) == [
        Example("data.jsonl:1", messages=(USER, ASSISTANT)),
        Example("data.jsonl:2", prompt="a", completion="b"),
        Example("data.jsonl:3", text="c"),
    ]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"], ids=["unix", "windows", "blank lines"])
def test_lines_are_read_whatever_their_wrapping(name, bom, end):
    examples = read(f"{bom}{GOOD}{end}{json.dumps({'text': 'Grüße 😀'})}{end}", name)
    assert examples[0].messages == (USER, ASSISTANT)
    assert examples[1].text == "Grüße 😀"
    assert [example.source for example in examples] == [f"{name}:1", f"{name}:{1 + end.count(chr(10))}"]


@pytest.mark.parametrize("name", ["data.json", "data.json.gz"])
def test_a_json_array_is_read_and_its_examples_are_numbered(name):
    examples = read("\ufeff" + json.dumps([CHAT, {"text": "c"}], indent=2), name)
    assert [example.source for example in examples] == [f"{name}#1", f"{name}#2"]
    assert examples[1].text == "c"


def test_line_separators_inside_a_text_do_not_end_a_line():
    text = "one\u2028two\u0085three\x0bfour"
    assert read(json.dumps({"text": text}, ensure_ascii=False))[0].text == text


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=5))
def test_every_text_comes_back_as_it_was(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert [example.text for example in read_examples(str(path), DataConfig(), [])] == texts


def test_files_are_read_in_the_order_given():
    for name in ("b.jsonl", "a.jsonl"):
        Path(name).write_text(json.dumps({"text": name}))
    assert [example.text for example in read_examples(["b.jsonl", "a.jsonl"], DataConfig(), [])] == [
        "b.jsonl",
        "a.jsonl",
    ]


def test_columns_rename_fields():
    examples = read('{"q": "", "a": "b"}', columns={"prompt": "q", "completion": "a"})
    assert (examples[0].prompt, examples[0].completion) == ("", "b")
    assert read('{"turns": [{"role": "assistant", "content": "x"}]}', columns={"messages": "turns"})[0].messages


def test_format_decides_where_a_line_has_fields_of_several_forms():
    line = json.dumps({**CHAT, "text": "c"})
    assert read(line)[0].messages
    assert read(line, format="text")[0] == Example("data.jsonl:1", text="c")


def test_tools_are_kept_beside_the_messages():
    tools = [{"type": "function", "function": {"name": "clock"}}]
    assert read(json.dumps({**CHAT, "tools": tools}))[0].tools == tuple(tools)
    assert read(json.dumps({**CHAT, "tools": []}))[0].tools is None


def test_a_tool_call_is_an_answer_though_its_content_is_null():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    assert read(json.dumps({"messages": [USER, call]}))[0].messages == (USER, call)


BAD_LINES = {
    '{"messages": [': "no JSON: Expecting value at column 15; expected one JSON object a line",
    "role: user": "no JSON: Expecting value at column 1",
    '{"text": ' + "9" * 5000 + "}": "no JSON: Exceeds the limit",
    "[" * 100_000: "no JSON: maximum recursion depth",
    json.dumps([CHAT]): "found a list; expected an object",
    '"a text"': "found a text; expected an object",
    "12": "found a number; expected an object",
    "null": "found null; expected an object",
    "{}": "'prompt' and 'completion', 'instruction' and 'output', or 'text'; its keys are none",
    '{"question": "a", "answer": "b"}': "its keys are question, answer: name yours in data.columns",
    '{"prompt": "a"}': "has no 'completion'; its keys are prompt",
    '{"prompt": "a", "completion": "  \\n"}': "'completion' is empty; there is nothing to learn from it",
    '{"prompt": "a", "completion": 3}': "'completion' is a number; expected a text",
    '{"text": ""}': "'text' is empty",
    '{"text": true}': "'text' is true or false; expected a text",
    '{"messages": []}': "'messages' is an empty list",
    '{"messages": "hello"}': "'messages' is a text; expected a list",
    '{"messages": ["hello"]}': "message 1 is a text without role and content",
    '{"messages": [{"role": "user"}]}': "message 1 is an object without role and content",
    json.dumps({"messages": [USER]}): "has no answer: no message has the role 'assistant'",
    json.dumps({"messages": [USER, {**ASSISTANT, "content": " "}]}): "has an empty answer",
    json.dumps({"messages": [USER, {**ASSISTANT, "content": None}]}): "message 2 has null as content",
    json.dumps({"messages": [USER, {**ASSISTANT, "content": [{"text": "x"}]}]}): "message 2 has a list as content",
    json.dumps(
        {"messages": [{**USER, "role": "human"}, ASSISTANT]}
    ): "message 1 has the role 'human'; expected system,",
    json.dumps({"messages": [{**USER, "role": ["user"]}, ASSISTANT]}): "message 1 has the role ['user']",
    json.dumps({**CHAT, "tools": {"name": "clock"}}): "'tools' is an object; expected a list of JSON schemas",
    json.dumps({**CHAT, "tools": 5}): "'tools' is a number; expected a list",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=[message[:40] for message in BAD_LINES.values()])
def test_a_bad_line_is_named_by_file_and_line(line, message):
    text = refusal(f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert text.startswith("data.jsonl:3: ") and message in text
    assert "data.on_error: skip" in text


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=[message[:40] for message in BAD_LINES.values()])
def test_a_bad_line_can_be_skipped_and_is_accounted_for(line, message):
    Path("data.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    skipped: list[str] = []
    examples = read_examples("data.jsonl", DataConfig(on_error="skip"), skipped)
    assert [example.source for example in examples] == ["data.jsonl:1", "data.jsonl:3"]
    assert len(skipped) == 1 and skipped[0].startswith("data.jsonl:2: ") and message in skipped[0]


def test_all_bad_lines_of_all_files_are_told_at_once():
    Path("other.jsonl").write_text(f'{GOOD}\n{{"text": ""}}\n')
    Path("data.jsonl").write_text(f'{{"text": ""}}\n{GOOD}\n12\n')
    with pytest.raises(UserError) as caught:
        read_examples(["other.jsonl", "data.jsonl"], DataConfig(), [])
    places = [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert places[:3] == ["other.jsonl:2", "data.jsonl:1", "data.jsonl:3"]


def test_of_very_many_bad_lines_the_first_are_told_and_the_rest_counted():
    lines = refusal("oops\n" * (SHOWN_ERRORS + 7)).splitlines()
    assert lines[SHOWN_ERRORS - 1].startswith(f"data.jsonl:{SHOWN_ERRORS}: ")
    assert lines[SHOWN_ERRORS] == "... and 7 more"


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.jsonl.gz", "data.json.gz"])
@pytest.mark.parametrize("content", ["", "\n\n \n", "\ufeff"], ids=["empty", "blank", "bom alone"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_empty_file_is_refused(name, content, on_error):
    assert refusal(content, name, on_error=on_error).startswith(f"{name}: the file holds no examples")


def test_an_empty_file_beside_a_full_one_is_refused():
    Path("full.jsonl").write_text(GOOD)
    Path("empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"^empty\.jsonl: the file holds no examples"):
        read_examples(["full.jsonl", "empty.jsonl"], DataConfig(), [])


def test_skipping_every_line_is_refused():
    text = refusal("oops\n12\n", on_error="skip")
    assert "no usable example is left" in text and "data.jsonl:2: found a number" in text


def test_a_line_in_another_encoding_is_named():
    text = refusal(f"{GOOD}\n".encode() * 500 + '{"text": "Grüße"}\n'.encode("latin-1"))
    assert text.startswith("data.jsonl:501: not UTF-8 text (invalid start byte at byte 12)") or text.startswith(
        "data.jsonl:501: not UTF-8 text (invalid continuation byte at byte 12)"
    )
    assert "save it as UTF-8" in text


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_utf16_file_is_refused(name):
    assert "not UTF-8 text" in refusal(json.dumps([CHAT]).encode("utf-16"), name)


def test_a_json_file_of_lines_is_told_its_right_name():
    text = refusal(f"{GOOD}\n{GOOD}\n", "data.json")
    assert text.startswith("data.json: no JSON: Extra data") and ".jsonl" in text


def test_a_json_file_that_is_no_list_is_refused():
    assert refusal(GOOD, "data.json") == "data.json: found an object; expected a list of examples [{...}, ...]"


def test_a_bad_example_of_an_array_is_named_by_its_number():
    assert refusal(json.dumps([CHAT, {"text": ""}]), "data.json").startswith("data.json#2: 'text' is empty")


def damaged_gzip(change: str) -> bytes:
    packed = bytearray(gzip.compress(f"{GOOD}\n".encode() * 50))
    if change == "cut off":
        return bytes(packed[:-12])
    if change == "no gzip":
        return GOOD.encode()
    place = {"body": 40, "checksum": len(packed) - 6}[change]
    packed[place] ^= 0xFF
    return bytes(packed)


@pytest.mark.parametrize("change", ["cut off", "no gzip", "body", "checksum"])
def test_a_damaged_gzip_file_is_refused(change):
    Path("data.jsonl.gz").write_bytes(damaged_gzip(change))
    with pytest.raises(UserError, match=r"^data\.jsonl\.gz: (a damaged gzip file|.*not UTF-8|.*no JSON)"):
        read_examples("data.jsonl.gz", DataConfig(), [])


def test_a_fixed_format_refuses_each_line_of_another():
    text = refusal(f'{GOOD}\n{{"text": "c"}}\n', format="chat")
    assert text.startswith("data.jsonl:2: has no 'messages' (data.format is chat); its keys are text")
