"""From data files to examples: what is read, and what a person reads for every bad line."""

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import DataConfig
from common.data.records import SHOWN_ERRORS, Example, RecordError, read_examples, to_example
from common.errors import UserError

USER = {"role": "user", "content": "What is the answer?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
CHAT = {"messages": [USER, ASSISTANT]}
GOOD = json.dumps(CHAT)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Run where the files are written, so that messages hold bare file names."""
    monkeypatch.chdir(tmp_path)


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


CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
SCHEMA = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def example(value, **data) -> Example:
    return to_example(value, "data.jsonl:1", DataConfig(**data))


def reason(value, **data) -> str:
    with pytest.raises(RecordError) as caught:
        example(value, **data)
    return str(caught.value)


def chat(*turns: str) -> tuple[dict[str, str], ...]:
    """Write `user: text` as a message."""
    return tuple(dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns)


def answered(**fields) -> dict:
    return {"messages": [USER, {"role": "assistant", **fields}]}


SAME_CONVERSATION = {
    "chat": {"messages": [*chat("system: Be brief.", "user: Hi", "assistant: Ho")]},
    "json text": {"messages": json.dumps(chat("system: Be brief.", "user: Hi", "assistant: Ho"))},
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [dict(zip(("from", "value"), t, strict=True)) for t in (("human", "Hi"), ("gpt", "Ho"))],
    },
    "sharegpt with its own system": {
        "conversations": [
            {"from": who, "value": said} for who, said in (("system", "Be brief."), ("Human", "Hi"), ("ChatGPT", "Ho"))
        ]
    },
    "conversations of messages": {"conversations": [*chat("system: Be brief.", "user: Hi", "assistant: Ho")]},
    "alpaca": {"system": "Be brief.", "instruction": "Hi", "input": "", "output": "Ho"},
    "alpaca with the input alone": {"system": "Be brief.", "instruction": "", "input": "Hi", "output": "Ho"},
}


@pytest.mark.parametrize("value", SAME_CONVERSATION.values(), ids=SAME_CONVERSATION)
def test_each_dialect_of_a_conversation_becomes_the_same_messages(value):
    assert example(value) == Example("data.jsonl:1", messages=chat("system: Be brief.", "user: Hi", "assistant: Ho"))


def test_alpaca_puts_the_input_below_the_instruction_and_history_before():
    value = {"instruction": "Add", "input": "1, 2", "output": "3", "history": [["Hi", "Ho"]], "text": "### all of it"}
    assert example(value).messages == chat("user: Hi", "assistant: Ho", "user: Add\n\n1, 2", "assistant: 3")
    assert "'history' is a text; expected a list of pairs" in reason({**value, "history": "Hi"})
    assert "'instruction' is a number; expected a text" in reason({**value, "instruction": 3})


@pytest.mark.parametrize("speaker", ["alien", "", None, ["human"]])
def test_an_unknown_speaker_is_refused_with_those_that_are_known(speaker):
    text = reason({"conversations": [{"from": speaker, "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    assert text.startswith("message 1 is from ") and "expected system, developer, user, assistant, tool, human" in text


def test_turns_of_sharegpt_under_the_name_messages_are_read_as_the_error_says():
    value = {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    assert "set data.format: sharegpt and data.columns: {conversations: messages}" in reason(value)
    found = example(value, format="sharegpt", columns={"conversations": "messages"})
    assert found.messages == chat("user: Hi", "assistant: Ho")


def test_two_different_system_texts_are_refused():
    turns = [*chat("system: Be brief.", "user: Hi", "assistant: Ho")]
    assert "'system' is not the first system message" in reason({"conversations": turns, "system": "Be long."})
    assert len(example({"conversations": turns, "system": "Be brief."}).messages) == 3


def test_two_user_turns_in_a_row_are_left_to_the_template():
    turns = chat("user: Hi", "user: Ho", "assistant: Yes")
    assert example({"messages": [*turns]}).messages == turns


def test_of_two_message_lists_only_the_completion_is_trained():
    prompt, completion = chat("user: Hi", "assistant: Ho", "user: And?"), chat("assistant: Yes")
    found = example({"prompt": [*prompt], "completion": [*completion], "tools": [SCHEMA]})
    assert (found.messages, found.train_from, found.tools) == (prompt + completion, 3, (SCHEMA,))
    assert "no answer" in reason({"prompt": [*prompt], "completion": [*chat("user: Hm")]})
    assert "expected two texts, or two lists" in reason({"prompt": "Hi", "completion": [*completion]})


def test_a_prompt_that_looks_like_a_list_is_still_a_text():
    assert example({"prompt": "[1, 2]", "completion": '{"sum": 3}'}).completion == '{"sum": 3}'


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)]], ids=type)
def test_tools_may_be_json_text(tools):
    assert example({**CHAT, "tools": tools}).tools == (SCHEMA,)


def test_tools_that_are_no_schemas_are_refused():
    assert "tool 1 of 'tools' is a text; expected a JSON schema" in reason({**CHAT, "tools": ["clock"]})
    assert "'tools' is a text; expected a list" in reason({**CHAT, "tools": "[clock"})


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [{**CALL, "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
        [{"name": "clock", "arguments": {"zone": "UTC"}}],
    ],
    ids=["objects", "json text", "arguments as json text", "without function"],
)
def test_tool_calls_take_one_form(calls):
    assert example(answered(tool_calls=calls)).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_a_function_call_of_sharegpt_is_a_tool_call():
    turns = [("human", "Time?"), ("function_call", json.dumps(CALL["function"])), ("observation", "12"), ("gpt", "12")]
    found = example({"conversations": [{"from": who, "value": said} for who, said in turns]}).messages
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1]["tool_calls"] == [CALL]


def test_a_tool_call_that_says_too_little_is_refused():
    assert "message 2 has a tool call without a name" in reason(answered(tool_calls=[{"function": {}}]))
    call = {"function": {"name": "clock", "arguments": "now"}}
    assert "message 2 calls 'clock' with a text; expected" in reason(answered(tool_calls=[call]))
    assert "message 2 has a number as tool_calls" in reason(answered(content="", tool_calls=3))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(name):
    message = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert example(answered(content="Yes.", **{name: "Hm."})).messages[1] == message


def test_two_different_reasonings_are_refused():
    text = reason(answered(content="Yes.", reasoning="Hm.", thinking="Ha."))
    assert "message 2 has different texts as reasoning and thinking" in text


def test_text_parts_are_joined_and_others_are_refused():
    part = {"type": "text", "text": "Ye"}
    assert example(answered(content=[part, {"type": "text", "text": "s."}])).messages[1]["content"] == "Yes."
    assert "message 2 has a part of type 'image_url'; expected text" in reason(
        answered(content=[part, {"type": "image_url", "image_url": {}}])
    )


def test_nulls_beside_a_message_are_as_if_not_there():
    message = {**ASSISTANT, "tool_calls": None, "name": None, "reasoning": None}
    assert example({"messages": [USER, message], "tools": None}).messages == (USER, ASSISTANT)


def test_an_answer_with_a_weight_of_its_own_is_refused_rather_than_trained():
    assert example(answered(content="Yes.", weight=1)).messages
    assert "has an answer of weight 0, but all answers count the same" in reason(answered(content="Yes.", weight=0))


def test_null_fields_of_another_form_do_not_hide_the_one_that_is_there():
    assert example({"messages": None, "prompt": None, "text": "c"}).text == "c"
    assert reason({"messages": None}).startswith("'messages' is null; expected a list")


def test_a_fixed_format_refuses_each_line_of_another():
    text = refusal(f'{GOOD}\n{{"text": "c"}}\n', format="chat")
    assert text.startswith("data.jsonl:2: has no 'messages' (data.format is chat); its keys are text")


def test_ids_are_taken_as_they_are_and_labels_say_what_is_trained():
    plain = example({"input_ids": [5, 0, 7], "text": "abc"})
    assert (plain.token_ids, plain.loss_mask) == ((5, 0, 7), (True, True, True))
    labelled = {"input_ids": [9, 5, 0, 7], "labels": [-100, -100, 0, 7], "attention_mask": [0, 1, 1, 1]}
    found = example(labelled)
    assert (found.token_ids, found.loss_mask) == ((5, 0, 7), (False, True, True))


BAD_IDS = {
    "is an empty list": {"input_ids": []},
    "'input_ids' holds a text": {"input_ids": [1, "2"]},
    "'input_ids' holds true or false": {"input_ids": [1, True]},
    "one example, not a batch": {"input_ids": [[1, 2]]},
    "'input_ids' holds -1; expected token ids": {"input_ids": [1, -1]},
    "'input_ids' holds 4294967296": {"input_ids": [1, 2**32]},
    "'labels' has 1 numbers and 'input_ids' 2": {"input_ids": [1, 2], "labels": [1]},
    "a label is 3 where the token is 2": {"input_ids": [1, 2], "labels": [1, 3]},
    "all labels are -100": {"input_ids": [1, 2], "labels": [-100, -100]},
    "'attention_mask' is 0 between ones": {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
    "'attention_mask' holds other numbers": {"input_ids": [1, 2, 3], "attention_mask": [0, 0, 0]},
}


@pytest.mark.parametrize(("message", "value"), BAD_IDS.items(), ids=BAD_IDS)
def test_ids_that_can_not_be_trained_are_refused(message, value):
    assert message in reason(value)


@pytest.mark.parametrize(
    "value",
    [
        {"text": "a\ud83d"},
        {"prompt": "\udc80", "completion": "b"},
        answered(content="\ud83d"),
        answered(content="Yes.", name="\ud83d"),
        {**CHAT, "tools": [{"\ud83d": 1}]},
        {"instruction": "a", "output": "\ud83d"},
    ],
    ids=["text", "prompt", "content", "name", "tools", "output"],
)
def test_half_a_character_is_refused_in_words_that_can_be_printed(value):
    text = reason(value)
    assert "half a character" in text and text.encode()


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_too_deeply_to_be_written_again_is_refused():
    assert "nested more than 64 levels" in reason({**CHAT, "tools": [{"a": nested(500)}]})
    assert "nested more than 64 levels" in reason(answered(content="Yes.", extra=nested(500)))
    assert "role" in reason({"messages": [{"role": nested(5000), "content": ""}]})


def test_a_message_about_a_huge_field_stays_short():
    assert len(reason({"messages": [{"role": "x" * 10**6, "content": ""}]})) < 300
    assert len(reason({f"key {i}" * 1000: i for i in range(1000)})) < 1200


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
LIKE_CALLS = st.lists(st.fixed_dictionaries({}, optional={"name": JSON, "arguments": JSON, "function": JSON}))
LIKE_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": JSON | st.sampled_from(["user", "assistant"]),
            "content": JSON,
            "tool_calls": JSON | LIKE_CALLS,
            "thinking": JSON,
            "weight": JSON,
        },
    )
)
LIKE_TURNS = st.lists(st.fixed_dictionaries({}, optional={"from": JSON | st.just("gpt"), "value": JSON}))
LIKE_IDS = st.lists(st.integers() | JSON, max_size=4)
LIKE_EXAMPLES = st.fixed_dictionaries(
    {},
    optional={
        **{name: JSON | LIKE_MESSAGES for name in ("messages", "prompt", "completion")},
        **{name: JSON for name in ("text", "tools", "system", "instruction", "input", "output", "history")},
        **{name: JSON | LIKE_IDS for name in ("input_ids", "labels", "attention_mask")},
        "conversations": JSON | LIKE_TURNS,
    },
)
FORMATS = ("auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized")


@given(JSON | LIKE_EXAMPLES, st.sampled_from(FORMATS))
def test_any_json_is_an_example_or_a_record_error(value, form):
    try:
        found = to_example(value, "data.jsonl:1", DataConfig(format=form))
    except RecordError as error:
        assert str(error).encode()
    else:
        assert found.messages or found.completion.strip() or found.text.strip() or any(found.loss_mask)
        assert pickle.loads(pickle.dumps(found)).source == "data.jsonl:1"
