"""Chat templates and masks: rendered as transformers renders, trained exactly where the assistant speaks."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import (
    CHATML,
    CHATML_TOOLS,
    GENERATION,
    LLAMA3,
    NO_SYSTEM,
    REWRITES_HISTORY,
    write_tokenizer,
)

from common.data.chat import ChatTokenizer, Encoded
from common.data.records import Example, RecordError
from common.errors import UserError

TEMPLATES = {
    "chatml": CHATML,
    "chatml_tools": CHATML_TOOLS,
    "llama3": LLAMA3,
    "generation": GENERATION,
    "rewrites_history": REWRITES_HISTORY,
    "no_system": NO_SYSTEM,
}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
USER = {"role": "user", "content": "What is the answer?"}
ASSISTANT = {"role": "assistant", "content": "The answer is yes."}
LONG = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Grüße 😀"}, {"role": "assistant", "content": "Hällo 😀!"}]

# Whatever can be typed, special tokens excepted: those in a text are read as the tokens themselves.
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
# Byte-level tokens may join a line end of the header and white space that begins an answer; tested by itself.
ANSWER = TEXT.filter(lambda text: text.strip() and not text[0].isspace())


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, template in TEMPLATES.items():
        llama = template == LLAMA3
        write_tokenizer(folder / name, template, eos="<|eot_id|>" if llama else "<|im_end|>", adds_bos=llama)
    return {name: ChatTokenizer(folder / name) for name in TEMPLATES}


def chat(*messages: dict, tools: list | None = None) -> Example:
    return Example("data.jsonl:1", messages=messages, tools=tuple(tools) if tools else None)


def supervised_ids(encoded: Encoded) -> list[int]:
    return [token for token, trained in zip(encoded.token_ids, encoded.loss_mask, strict=True) if trained]


def supervised(tokenizer: ChatTokenizer, example: Example, train_on: str = "assistant") -> str:
    return tokenizer.decode(supervised_ids(tokenizer.encode(example, train_on)), skip_special=False)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "no_system"])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_rendering_and_tokens_are_those_of_transformers(tokenizers, name, generation_prompt):
    from transformers import AutoTokenizer

    ours, theirs = tokenizers[name], AutoTokenizer.from_pretrained(tokenizers[name].directory)
    text = theirs.apply_chat_template(LONG, tokenize=False, add_generation_prompt=generation_prompt)
    assert ours.render(LONG, None, generation_prompt) == text
    ids = theirs.apply_chat_template(LONG, add_generation_prompt=generation_prompt)["input_ids"]
    if generation_prompt:
        assert ours.prompt_ids(LONG) == ids
    else:
        assert ours.encode(chat(*LONG), "all").token_ids == ids


def test_tools_and_tool_calls_are_rendered_as_transformers_does(tokenizers):
    from transformers import AutoTokenizer

    tools = [{"type": "function", "function": {"name": "clock", "description": "<b>Zeit & größer</b>"}}]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "clock", "arguments": {"a": 1}}}],
    }
    messages = [USER, call, {"role": "tool", "content": "07:30"}, ASSISTANT]
    ours = tokenizers["chatml_tools"]
    theirs = AutoTokenizer.from_pretrained(ours.directory)
    text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    assert "<b>Zeit & größer</b>" in text
    assert ours.render(messages, tools, add_generation_prompt=False) == text
    call_text = '<tool_call>{"name": "clock", "arguments": {"a": 1}}</tool_call>'
    assert supervised(ours, chat(*messages, tools=tools)) == f"{call_text}<|im_end|>The answer is yes.<|im_end|>"


@pytest.mark.parametrize(
    "expression",
    [
        "messages | tojson(indent=2)",
        "messages | tojson(false, 4)",
        "messages | tojson(separators=(',', ':'), sort_keys=true)",
        "messages | tojson(ensure_ascii=true)",
        "documents is none",
        "tools is none",
        "tools is defined",
        "bos_token + eos_token + pad_token",
    ],
)
def test_templates_find_what_transformers_gives_them(tmp_path, expression):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, "{{ " + expression + " }}")
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(LONG, tokenize=False)
    assert ChatTokenizer(tmp_path).render(LONG, None, add_generation_prompt=False) == text


def test_a_date_in_a_template_is_the_same_every_day(tmp_path):
    write_tokenizer(tmp_path, "{{ strftime_now('%d %b %Y') }}")
    assert ChatTokenizer(tmp_path).render([USER], None, add_generation_prompt=False) == "26 Jul 2024"


@pytest.mark.parametrize("name", ["chatml", "generation"])
def test_mask_is_that_of_transformers_where_the_template_marks_answers(tokenizers, name):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizers["generation"].directory)
    expected = theirs.apply_chat_template(LONG, return_assistant_tokens_mask=True, return_dict=True)
    encoded = tokenizers[name].encode(chat(*LONG), "assistant")
    assert encoded.token_ids == expected["input_ids"]
    assert [int(trained) for trained in encoded.loss_mask] == expected["assistant_masks"]
    assert sum(encoded.loss_mask) > 0


CONVERSATIONS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXT, ANSWER), min_size=1, max_size=6
).map(lambda turns: [{"role": r, "content": answer if r == "assistant" else text} for r, text, answer in turns])
END = {"chatml": "<|im_end|>", "generation": "<|im_end|>", "chatml_tools": "<|im_end|>", "llama3": "<|eot_id|>"}


@pytest.mark.parametrize("name", END)
@settings(max_examples=100, deadline=None)
@given(messages=CONVERSATIONS)
def test_supervised_tokens_are_exactly_the_answers_and_their_end_tokens(tokenizers, name, messages):
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assume(answers)
    if name == "llama3":
        answers = [answer.strip() for answer in answers]  # the template trims
    expected = [answer + END[name] for answer in answers]
    assert supervised(tokenizers[name], chat(*messages)) == "".join(expected)
    assert supervised(tokenizers[name], chat(*messages), "last_assistant") == expected[-1]


@pytest.mark.parametrize("name", END)
@settings(max_examples=50, deadline=None)
@given(messages=CONVERSATIONS)
def test_mask_changes_no_token(tokenizers, name, messages):
    assume(any(message["role"] == "assistant" for message in messages))
    encoded = [
        tokenizers[name].encode(chat(*messages), train_on) for train_on in ("assistant", "last_assistant", "all")
    ]
    assert encoded[0].token_ids == encoded[1].token_ids == encoded[2].token_ids
    assert all(len(each.loss_mask) == len(each.token_ids) for each in encoded)
    assert all(encoded[2].loss_mask)


def test_end_token_is_trained_and_the_line_end_after_it_is_not(tokenizers):
    encoded = tokenizers["chatml"].encode(chat(USER, ASSISTANT), "assistant")
    assert tokenizers["chatml"].decode(encoded.token_ids[-2:], skip_special=False) == "<|im_end|>\n"
    assert encoded.loss_mask[-2:] == [True, False]


def test_a_short_conversation_is_masked_token_by_token(tokenizers):
    ours = tokenizers["chatml"]
    encoded = ours.encode(chat({"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}), "assistant")
    shown = [ours.decode([token], skip_special=False) for token in encoded.token_ids]
    start = shown.index("B")
    assert "".join(shown) == "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    assert encoded.loss_mask == [False] * start + [True, True, False]


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize("answer", ["\n\n\nyes", "  yes", "\n", "yes \n\n", "\tyes"])
def test_white_space_around_an_answer_loses_no_supervised_token(tokenizers, name, answer):
    # A token may begin in the header's line end and reach into the answer; it is trained, as the model writes it.
    example = chat(USER, {**ASSISTANT, "content": answer}, USER)
    text = supervised(tokenizers[name], example)
    wanted = (answer.strip() if name == "llama3" else answer) + END[name]
    assert text.endswith(wanted) and text.removesuffix(wanted) in ("", "\n", "\n\n")


def test_special_tokens_of_the_template_are_not_doubled(tokenizers):
    ours = tokenizers["llama3"]
    bos = ours.text_ids("")[0]
    assert ours.decode([bos], skip_special=False) == "<|begin_of_text|>"
    assert ours.text_ids("yes").count(bos) == 1
    assert ours.prompt_ids([USER]).count(bos) == 1
    for train_on in ("assistant", "all"):
        ids = ours.encode(chat(USER, ASSISTANT), train_on).token_ids
        assert ids[0] == bos and ids.count(bos) == 1


def test_prompt_ends_where_the_answer_begins(tokenizers):
    for name in END:
        ours = tokenizers[name]
        prompt, encoded = ours.prompt_ids([SYSTEM, USER]), ours.encode(chat(SYSTEM, USER, ASSISTANT), "assistant")
        assert encoded.token_ids[: len(prompt)] == prompt
        assert encoded.loss_mask.index(True) == len(prompt)


def test_a_template_that_rewrites_its_history_is_refused_rather_than_masked_wrongly(tokenizers):
    thinking = {"role": "assistant", "content": "<think>so</think>The answer is yes."}
    ours = tokenizers["rewrites_history"]
    with pytest.raises(RecordError, match="leaves out the reasoning of message 2") as caught:
        ours.encode(chat(USER, thinking, USER, thinking), "assistant")
    assert "one example an answer, or use train_on: last_assistant" in str(caught.value)
    assert all(ours.encode(chat(USER, thinking, USER, thinking), "all").loss_mask)


def test_a_template_that_rewrites_its_history_is_fine_where_the_place_of_the_answer_is_certain(tokenizers):
    thinking = {"role": "assistant", "content": "<think>so</think>Yes."}
    ours = tokenizers["rewrites_history"]
    assert supervised(ours, chat(USER, thinking)) == "<think>so</think>Yes.<|im_end|>"
    assert supervised(ours, chat(USER, thinking, USER, thinking), "last_assistant") == "<think>so</think>Yes.<|im_end|>"


def test_a_template_that_refuses_a_role_says_so(tokenizers):
    ours = tokenizers["no_system"]
    with pytest.raises(RecordError, match="the chat template refuses this conversation: System role not supported"):
        ours.encode(chat(SYSTEM, USER, ASSISTANT), "assistant")
    assert supervised(ours, chat(USER, ASSISTANT)) == "The answer is yes.<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[9].content.text }}",
        "{{ 1 / 0 }}",
        "{{ 'a'.index('b') }}",
        "{{ range(10000000) | list }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages | tojson(nonsense=1) }}",
    ],
)
def test_a_template_that_fails_is_an_error_of_the_example(tmp_path, template):
    write_tokenizer(tmp_path, template)
    with pytest.raises(RecordError, match="the chat template refuses this conversation"):
        ChatTokenizer(tmp_path).encode(chat(USER, ASSISTANT), "assistant")


def test_a_template_that_writes_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.limits.MAX_RENDERED_CHARACTERS", 1000)
    write_tokenizer(tmp_path, "{{ 'x' * 1001 }}")
    with pytest.raises(RecordError, match="makes 1,001 characters of this conversation; at most 1,000"):
        ChatTokenizer(tmp_path).encode(chat(USER, ASSISTANT), "all")


@pytest.mark.parametrize(
    "example",
    [
        chat(USER, {**ASSISTANT, "content": "a\ud800b"}),
        chat({**USER, "content": "\udfff"}, ASSISTANT),
        Example("", prompt="\ud800", completion="b"),
        Example("", prompt="a", completion="\ud800"),
        Example("", text="\ud800"),
    ],
    ids=["answer", "question", "prompt", "completion", "text"],
)
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_lone_surrogate_is_refused(tokenizers, example, train_on):
    with pytest.raises(RecordError, match=r"no valid Unicode .* lone surrogate"):
        tokenizers["chatml"].encode(example, train_on)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=TEXT.filter(str.strip))
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_completion_is_trained_with_the_end_token_and_its_prompt_is_not(tokenizers, name, prompt, completion):
    ours = tokenizers[name]
    encoded = ours.encode(Example("", prompt=prompt, completion=completion), "assistant")
    count = len(ours.text_ids(prompt))
    assert encoded.token_ids[:count] == ours.text_ids(prompt)
    assert encoded.loss_mask == [False] * count + [True] * (len(encoded.loss_mask) - count)
    assert ours.decode(encoded.token_ids[count:], skip_special=False) == completion + END[name]
    assert all(ours.encode(Example("", prompt=prompt, completion=completion), "all").loss_mask)


def test_plain_text_is_trained_whole_and_gets_one_end_token(tokenizers):
    ours = tokenizers["chatml"]
    for text in ("The sun is out.", "The sun is out.<|im_end|>"):
        encoded = ours.encode(Example("", text=text), "assistant")
        assert ours.decode(encoded.token_ids, skip_special=False) == "The sun is out.<|im_end|>"
        assert all(encoded.loss_mask)


@given(text=TEXT)
def test_text_survives_encoding_and_decoding(tokenizers, text):
    assert tokenizers["chatml"].decode(tokenizers["chatml"].text_ids(text)) == text


def test_special_tokens_are_found_by_name(tokenizers):
    ours = tokenizers["chatml"]
    assert ours.decode([ours.eos_id], skip_special=False) == "<|im_end|>"
    assert ours.decode([ours.pad_id], skip_special=False) == "<|endoftext|>"
    assert ours.decode([ours.eos_id]) == ""
    assert max(ours.eos_id, ours.pad_id) < ours.vocabulary_size <= 400


@pytest.mark.parametrize(("declared", "extra"), [(None, set()), (0, {0}), ([0, 6], {0, 6})])
def test_generation_stops_at_the_end_token_and_those_the_model_declares(tmp_path, declared, extra):
    write_tokenizer(tmp_path)
    if declared is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    ours = ChatTokenizer(tmp_path)
    assert ours.stop_ids == {ours.eos_id} | extra


def test_a_template_in_the_tokenizer_config_is_used_where_there_is_no_file_of_it(tmp_path):
    for template in (CHATML, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]):
        write_tokenizer(tmp_path, None)
        settings_path = tmp_path / "tokenizer_config.json"
        settings_path.write_text(json.dumps({**json.loads(settings_path.read_text()), "chat_template": template}))
        assert supervised(ChatTokenizer(tmp_path), chat(USER, ASSISTANT)) == "The answer is yes.<|im_end|>"


def test_special_tokens_may_be_objects(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    token = {"content": "<|im_end|>", "special": True, "__type": "AddedToken"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": token}))
    assert ChatTokenizer(tmp_path).eos_id == ChatTokenizer(tmp_path)._tokenizer.token_to_id("<|im_end|>")


def test_files_to_copy_are_those_there_are(tokenizers):
    names = [path.name for path in tokenizers["chatml"].files]
    assert names == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert all(path.is_file() for path in tokenizers["chatml"].files)


def test_a_base_without_a_template_can_not_chat_but_reads_plain_text(tmp_path):
    write_tokenizer(tmp_path, None)
    ours = ChatTokenizer(tmp_path)
    assert not ours.has_template
    with pytest.raises(UserError, match=r"has no chat template.*use its Instruct version"):
        ours.encode(chat(USER, ASSISTANT), "assistant")
    assert ours.encode(Example("", text="yes"), "assistant").token_ids


def break_file(directory: Path, name: str, content: str | None) -> None:
    write_tokenizer(directory)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json; expected a fast tokenizer beside the weights"),
        ("tokenizer.json", "{}", "can't be read as a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: no JSON"),
        ("generation_config.json", "[1", "generation_config.json: no JSON"),
        ("chat_template.jinja", "{% if %}", "the chat template can't be read: .*, line 1"),
    ],
)
def test_a_broken_tokenizer_folder_is_named(tmp_path, name, content, message):
    break_file(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        ChatTokenizer(tmp_path).encode(chat(USER, ASSISTANT), "assistant")


MACRO = """\
{%- macro said(message) %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% endmacro %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{{ said(message) }}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def test_marks_of_answers_that_do_not_reach_the_output_are_not_relied_on(tmp_path):
    write_tokenizer(tmp_path, MACRO)
    assert supervised(ChatTokenizer(tmp_path), chat(*LONG)) == "The answer is yes.<|im_end|>Hällo 😀!<|im_end|>"


def test_marks_are_followed_where_they_are_not_one_an_answer(tmp_path):
    marked = "{% generation %}{{ message.content[:3] }}{% endgeneration %}{{ message.content[3:] }}"
    write_tokenizer(tmp_path, "{% for message in messages %}{% if loop.last %}" + marked + "{% endif %}\n{% endfor %}")
    assert supervised(ChatTokenizer(tmp_path), chat(USER, ASSISTANT, USER, ASSISTANT)).strip() in ("The", "The answer")


# The end token stands after the last answer alone, or nowhere.
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
PROMPTED = NO_END + "{% if add_generation_prompt %}assistant:{% endif %}"


def test_a_template_without_an_end_token_gets_the_tokenizers_after_the_last_answer(tmp_path):
    write_tokenizer(tmp_path, PROMPTED)
    ours = ChatTokenizer(tmp_path)
    encoded = ours.encode(chat(*LONG), "assistant")
    assert encoded.token_ids[-1] == ours.eos_id and encoded.loss_mask[-1]
    assert supervised(ours, chat(*LONG)) == " The answer is yes. Hällo 😀!<|im_end|>"
    assert ours.eos_id not in ours.encode(chat(*LONG, USER), "assistant").token_ids


def test_an_end_token_that_only_closes_the_conversation_is_not_doubled(tmp_path):
    write_tokenizer(tmp_path, PROMPTED + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    ours = ChatTokenizer(tmp_path)
    assert ours.encode(chat(USER, ASSISTANT), "assistant").token_ids.count(ours.eos_id) == 1
    assert supervised(ours, chat(USER, ASSISTANT)).endswith("yes.\n<|im_end|>")


def test_only_answers_from_train_from_on_are_trained(tokenizers):
    for name in ("chatml", "generation", "llama3"):
        example = Example("", messages=tuple(LONG), train_from=3)
        assert supervised(tokenizers[name], example) == "Hällo 😀!" + END[name]


def test_ids_that_come_with_the_data_are_passed_through(tokenizers):
    ours = tokenizers["chatml"]
    example = Example("", token_ids=(5, 6, 7), loss_mask=(False, True, True))
    assert ours.encode(example, "assistant") == Encoded([5, 6, 7], [False, True, True])
    assert ours.encode(example, "all") == Encoded([5, 6, 7], [True, True, True])


def test_ids_of_another_tokenizer_are_refused(tokenizers):
    ours = tokenizers["chatml"]
    size = ours.vocabulary_size
    with pytest.raises(RecordError, match=rf"token id {size}; the model's tokenizer has {size}"):
        ours.encode(Example("", token_ids=(0, size), loss_mask=(True, True)), "assistant")
    assert ours.encode(Example("", token_ids=(size - 1,), loss_mask=(True,)), "assistant").token_ids == [size - 1]


def test_tokens_that_a_text_already_holds_are_not_doubled(tokenizers):
    ours = tokenizers["llama3"]
    bos, eos = ours.text_ids("")[0], ours.eos_id
    ids = ours.encode(Example("", text="<|begin_of_text|>yes<|eot_id|>"), "assistant").token_ids
    assert (ids.count(bos), ids.count(eos)) == (1, 1)
    ids = ours.encode(Example("", prompt="<|begin_of_text|>a", completion="b<|eot_id|>"), "assistant").token_ids
    assert (ids.count(bos), ids.count(eos)) == (1, 1)


def test_a_surrogate_in_a_batch_is_an_error_in_its_place(tokenizers):
    bad, good = chat(USER, {**ASSISTANT, "content": "a\ud800b"}), chat(USER, ASSISTANT)
    results = tokenizers["chatml"].encode_batch([bad, good], "assistant")
    assert isinstance(results[0], RecordError) and results[1] == tokenizers["chatml"].encode(good, "assistant")
    assert tokenizers["chatml"].encode_batch([], "assistant") == []


# Rewrites contents, so that answers are placed turn by turn, and closes every conversation.
TIDIES = CHATML.replace("message['content']", "message['content'] | replace('  ', ' ')") + (
    "{%- if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
)
# Leaves out the end token of the answers between the first and the last.
FORGETS = CHATML.replace("'<|im_end|>\\n'", "('<|im_end|>' if loop.index0 < 3 or loop.last else '') + '\\n'")
# Shows what an answer looks like before the conversation begins.
SHOWS = "{{ '<|im_start|>assistant\nThe answer is yes.<|im_end|>\n' }}" + CHATML


def test_what_closes_a_conversation_is_no_part_of_its_answers(tmp_path):
    write_tokenizer(tmp_path, TIDIES)
    spaced = {**ASSISTANT, "content": "It  is."}
    expected = "It is.<|im_end|>" * 2
    assert supervised(ChatTokenizer(tmp_path), chat(USER, spaced, USER, spaced)) == expected


def test_an_answer_that_lost_its_end_token_is_refused(tmp_path):
    write_tokenizer(tmp_path, FORGETS)
    ours = ChatTokenizer(tmp_path)
    with pytest.raises(RecordError, match="rewrites what stands before or in message 4"):
        ours.encode(chat(USER, ASSISTANT, USER, ASSISTANT, USER, ASSISTANT), "assistant")
    assert supervised(ours, chat(USER, ASSISTANT)) == "The answer is yes.<|im_end|>"


def test_an_answer_that_the_template_itself_shows_is_not_taken_for_one(tmp_path):
    write_tokenizer(tmp_path, SHOWS)
    ours = ChatTokenizer(tmp_path)
    encoded = ours.encode(chat(USER, ASSISTANT), "assistant")
    assert encoded.loss_mask.index(True) == len(ours.prompt_ids([USER]))


def test_an_answer_that_ends_in_a_character_of_several_tokens_is_trained_to_its_end(tmp_path):
    write_tokenizer(tmp_path, PROMPTED)
    smiling = {**ASSISTANT, "content": "Yes 😀"}
    trained = supervised(ChatTokenizer(tmp_path), chat(USER, smiling, USER, smiling, USER))
    assert trained == " Yes 😀 Yes 😀"


@pytest.mark.parametrize("answer", ["  yes", "\t\tyes", "   \n yes"])
def test_white_space_that_a_tokenizer_cuts_from_its_offsets_is_trained_too(tmp_path, answer):
    write_tokenizer(tmp_path, LLAMA3.replace(" | trim", ""), eos="<|eot_id|>", adds_bos=True)
    ours = ChatTokenizer(tmp_path)
    trained = supervised(ours, chat(USER, {**ASSISTANT, "content": answer}))
    assert trained.lstrip("\n").endswith(answer + "<|eot_id|>")
