"""From one record to an example: every dialect of a conversation, and what is refused in words."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import DataConfig
from common.data.records import Example, RecordError, to_example

USER = {"role": "user", "content": "What is the answer?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
CHAT = {"messages": [USER, ASSISTANT]}
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
