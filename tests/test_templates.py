"""The chat templates people train on: rendered as transformers renders, trained exactly where the assistant speaks.

The files in templates/ follow the documented formats of the models; each gets a tokenizer with that model's special
tokens, of the kind (bytes or pieces) that the model has.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import write_tokenizer

from common.data.chat import ChatTokenizer
from common.data.records import Example, RecordError

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
DEEPSEEK_TOOLS = [
    f"<｜tool▁{name}｜>"
    for names in ("calls▁begin calls▁end call▁begin call▁end sep", "outputs▁begin outputs▁end output▁begin output▁end")
    for name in names.split()
]
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", *DEEPSEEK_TOOLS)


@dataclass(frozen=True)
class Family:
    """Say what a model's tokenizer has and what its template makes of an answer."""

    special: tuple[str, ...]
    bos: str
    eos: str
    end: str  # after each answer
    pad: str
    added: tuple[str, ...] = ()  # whole tokens that are not special
    adds_bos: bool = False  # the tokenizer adds the BOS by itself
    writes_bos: bool = True  # the template writes it
    pieces: bool = False
    system: bool = True
    trims: bool = False
    lead: str = ""  # what the model writes before each answer's text
    last_lead: str = ""  # and before that of the last answer alone


def chatml(**changes) -> Family:
    return Family(CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>", writes_bos=False, **changes)


def gemma(**changes) -> Family:
    return Family(GEMMA, "<bos>", "<eos>", "<end_of_turn>", "<pad>", adds_bos=True, pieces=True, trims=True, **changes)


FAMILIES = {
    "smollm2": chatml(),
    "generation": chatml(added=QWEN),
    "llama3": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "<|eot_id|>"),  # padding is the end token
        adds_bos=True,
        trims=True,
    ),
    "qwen2.5": chatml(added=QWEN[:4]),
    "qwen3": chatml(added=QWEN, last_lead="<think>\n\n</think>\n\n"),
    "gemma2": gemma(system=False),
    "gemma3": gemma(),
    "mistral-v3": Family(
        (*MISTRAL, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        *("<s>", "</s>", "</s>", "</s>"),
        adds_bos=True,
        pieces=True,
        lead=" ",
    ),
    "mistral-v7": Family(
        (*MISTRAL, "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "<s>", "</s>", "</s>", "<pad>", adds_bos=True
    ),
    "phi3": Family(
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        *("<s>", "<|endoftext|>", "<|end|>", "<|endoftext|>"),
        writes_bos=False,
        pieces=True,
    ),
    "phi4": Family(
        (*CHATML, "<|im_sep|>"), "<|endoftext|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>", writes_bos=False
    ),
    "deepseek-v3": Family(DEEPSEEK, *DEEPSEEK[:2], DEEPSEEK[1], DEEPSEEK[1], adds_bos=True),
    "deepseek-r1": Family(DEEPSEEK, *DEEPSEEK[:2], DEEPSEEK[1], DEEPSEEK[1], added=("<think>", "</think>")),
}
NAMES = list(FAMILIES)
WITH_TOOLS = ["generation", "llama3", "qwen2.5", "qwen3", "mistral-v3", "deepseek-v3", "deepseek-r1"]

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
USER = {"role": "user", "content": "What is the answer?"}
ANSWER = {"role": "assistant", "content": "The answer is yes."}
MORE = {"role": "user", "content": "Grüße 😀, and the time?"}
LATER = {"role": "assistant", "content": "Hällo 😀! It is 07:30."}
CONVERSATIONS = {
    "single": [USER, ANSWER],
    "multi": [USER, ANSWER, MORE, LATER, USER, ANSWER],
    "same question twice": [USER, ANSWER, USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "system and multi": [SYSTEM, USER, ANSWER, MORE, LATER],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time, größer & <b>",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call12345", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    ],
}
RESULT = {"role": "tool", "name": "clock", "tool_call_id": "call12345", "content": "07:30"}
CALL_TEXTS = {
    "generation": '<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call>',
    "llama3": '{"name": "clock", "parameters": {"zone": "CET"}}',
    "qwen2.5": '<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call>',
    "mistral-v3": '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "CET"}, "id": "call12345"}]',
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n"
    '```json\n{"zone": "CET"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}
CALL_TEXTS["deepseek-r1"] = CALL_TEXTS["deepseek-v3"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("templates")
    for name, each in FAMILIES.items():
        template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        write_tokenizer(
            folder / name,
            template,
            each.eos,
            each.adds_bos,
            each.special,
            each.bos,
            each.pad,
            each.added,
            each.pieces,
        )
    return {name: ChatTokenizer(folder / name) for name in FAMILIES}


def chat(messages: list[dict], tools: list | None = None, train_from: int = 0) -> Example:
    return Example("", messages=tuple(messages), tools=tuple(tools) if tools else None, train_from=train_from)


def supervised(tokenizer: ChatTokenizer, example: Example, train_on: str = "assistant") -> str:
    encoded = tokenizer.encode(example, train_on)
    trained = [token for token, each in zip(encoded.token_ids, encoded.loss_mask, strict=True) if each]
    return tokenizer.decode(trained, skip_special=False)


def answers(name: str, messages: list[dict]) -> list[str]:
    """What is to be trained of plain answers, one text each."""
    family = FAMILIES[name]
    texts = [message["content"] for message in messages if message["role"] == "assistant"]
    texts = [family.lead + (text.strip() if family.trims else text) + family.end for text in texts]
    if messages[-1]["role"] == "assistant":
        texts[-1] = family.last_lead + texts[-1]
    return texts


def transformers_render(tokenizer: ChatTokenizer, messages: list[dict], **options) -> str:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
    return theirs.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", **options)


PLAIN = [
    (name, case)
    for name in NAMES
    for case, messages in CONVERSATIONS.items()
    if FAMILIES[name].system or messages[0] is not SYSTEM
]


@pytest.mark.parametrize(("name", "case"), PLAIN)
def test_supervised_tokens_are_the_answers_and_their_end_tokens_in_order(tokenizers, name, case):
    messages = CONVERSATIONS[case]
    expected = answers(name, messages)
    assert supervised(tokenizers[name], chat(messages)) == "".join(expected)
    assert supervised(tokenizers[name], chat(messages), "last_assistant") == expected[-1]
    assert supervised(tokenizers[name], chat(messages, train_from=len(messages) - 1)) == expected[-1]
    assert supervised(tokenizers[name], chat(messages, train_from=len(messages))) == ""


@pytest.mark.parametrize(("name", "case"), PLAIN)
def test_rendering_and_tokens_are_those_of_transformers(tokenizers, name, case):
    from transformers import AutoTokenizer

    ours, messages = tokenizers[name], CONVERSATIONS[case]
    theirs = AutoTokenizer.from_pretrained(ours.directory)
    options = {"date_string": "26 Jul 2024"}
    assert ours.render(messages, None, False) == transformers_render(ours, messages)
    assert (
        ours.encode(chat(messages), "assistant").token_ids
        == theirs.apply_chat_template(messages, **options)["input_ids"]
    )
    asked = messages[:-1]
    expected = theirs.apply_chat_template(asked, add_generation_prompt=True, **options)["input_ids"]
    assert ours.prompt_ids(asked) == expected


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_tool_call_is_an_answer_and_is_trained_like_one(tokenizers, name):
    messages, ours, family = [USER, CALL, RESULT, ANSWER], tokenizers[name], FAMILIES[name]
    assert ours.render(messages, [TOOL], False) == transformers_render(ours, messages, tools=[TOOL])
    call = CALL_TEXTS[name] + family.end
    answer = answers(name, [ANSWER])[0]
    assert supervised(ours, chat(messages, [TOOL])) == call + answer
    assert supervised(ours, chat(messages, [TOOL]), "last_assistant") == answer
    assert supervised(ours, chat(messages[:2], [TOOL])) == (family.last_lead + call)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_change_nothing_of_plain_answers(tokenizers, name):
    messages = [USER, ANSWER, MORE, LATER]
    assert supervised(tokenizers[name], chat(messages, [TOOL])) == "".join(answers(name, messages))


@pytest.mark.parametrize("name", [name for name in WITH_TOOLS if name != "mistral-v3"])
def test_answers_before_and_after_several_rounds_of_tools_are_all_trained(tokenizers, name):
    messages = [USER, ANSWER, MORE, CALL, RESULT, LATER, USER, CALL, RESULT, ANSWER]
    trained = supervised(tokenizers[name], chat(messages, [TOOL]))
    plain = answers(name, [message for message in messages if message is not CALL])
    call = CALL_TEXTS[name] + FAMILIES[name].end
    assert trained == plain[0] + call + plain[1] + call + plain[2]


def test_an_earlier_tool_call_whose_place_is_not_certain_is_refused(tokenizers):
    messages = [USER, CALL, RESULT, LATER, MORE, ANSWER]  # Mistral moves the tools to the last question
    with pytest.raises(RecordError, match=r"rewrites what stands before or in message 2.*last_assistant"):
        tokenizers["mistral-v3"].encode(chat(messages, [TOOL]), "assistant")
    expected = answers("mistral-v3", [ANSWER])[0]
    assert supervised(tokenizers["mistral-v3"], chat(messages, [TOOL]), "last_assistant") == expected


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["no system", "system"])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "mistral-v3", "mistral-v7", "phi3", "deepseek-v3", "deepseek-r1"])
def test_the_bos_stands_once_whoever_writes_it(tokenizers, name, system):
    ours, family = tokenizers[name], FAMILIES[name]
    ids = ours.encode(chat([*([system] if system else []), USER, ANSWER]), "assistant").token_ids
    bos = ours.text_ids("")[0] if family.adds_bos else ours._tokenizer.token_to_id(family.bos)
    assert ids.count(bos) == int(family.writes_bos)
    assert not family.writes_bos or ids[0] == bos
    assert ours.text_ids(family.bos + "yes").count(bos) == 1
    assert ours.text_ids("yes").count(bos) == int(family.adds_bos)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_token_trained_is_the_end_of_the_turn_even_where_it_also_pads(tokenizers, name):
    ours = tokenizers[name]
    encoded = ours.encode(chat([USER, ANSWER]), "assistant")
    last = max(i for i, trained in enumerate(encoded.loss_mask) if trained)
    assert ours.decode([encoded.token_ids[last]], skip_special=False) == FAMILIES[name].end


def test_mask_is_that_of_transformers_where_the_template_marks_answers(tokenizers):
    from transformers import AutoTokenizer

    ours = tokenizers["generation"]
    theirs = AutoTokenizer.from_pretrained(ours.directory)
    for messages in (*CONVERSATIONS.values(), [USER, CALL, RESULT, ANSWER]):
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        encoded = ours.encode(chat(messages), "assistant")
        assert encoded.token_ids == expected["input_ids"]
        assert [int(trained) for trained in encoded.loss_mask] == expected["assistant_masks"]


THOUGHTFUL = {**ANSWER, "reasoning_content": "The user asks. So yes."}
THOUGHT = "<think>\nThe user asks. So yes.\n</think>\n\nThe answer is yes.<|im_end|>"


@pytest.mark.parametrize("answer", [THOUGHTFUL, {**ANSWER, "content": THOUGHT.removesuffix("<|im_end|>")}])
def test_reasoning_that_the_template_writes_is_trained(tokenizers, answer):
    ours = tokenizers["qwen3"]
    assert supervised(ours, chat([USER, answer])) == THOUGHT
    assert supervised(ours, chat([USER, ANSWER, USER, answer])) == "The answer is yes.<|im_end|>" + THOUGHT
    call = {**CALL, "reasoning_content": "I look."}
    expected = "<think>\nI look.\n</think>\n\n" + CALL_TEXTS["qwen3"] + "<|im_end|>" + THOUGHT
    assert supervised(ours, chat([USER, call, RESULT, answer], [TOOL])) == expected


def test_an_answer_whose_reasoning_the_template_drops_is_refused_and_can_be_left_untrained(tokenizers):
    ours = tokenizers["qwen3"]
    messages = [USER, THOUGHTFUL, USER, THOUGHTFUL]
    with pytest.raises(RecordError, match=r"leaves out the reasoning of message 2.*or use train_on: last_assistant"):
        ours.encode(chat(messages), "assistant")
    assert supervised(ours, chat(messages), "last_assistant") == THOUGHT
    assert supervised(ours, chat(messages, train_from=2)) == THOUGHT


@pytest.mark.parametrize("name", ["deepseek-r1", "smollm2", "llama3"])
def test_reasoning_that_no_template_writes_is_refused(tokenizers, name):
    answer = {**ANSWER, "content": "<think>so</think>Yes."} if name == "deepseek-r1" else THOUGHTFUL
    with pytest.raises(RecordError, match=r"leaves out the reasoning of message 2.*'prompt' and 'completion'"):
        tokenizers[name].encode(chat([USER, answer]), "assistant")


@pytest.mark.parametrize("name", NAMES)
def test_a_content_with_a_token_of_the_template_is_refused_by_name(tokenizers, name):
    end = FAMILIES[name].end
    for messages in ([{**USER, "content": f"so {end} is it"}, ANSWER], [USER, {**ANSWER, "content": f"yes{end}no"}]):
        with pytest.raises(
            RecordError, match=r"message [12] holds .*reads as a special token and not as text"
        ) as caught:
            tokenizers[name].encode(chat(messages), "assistant")
        assert repr(end) in str(caught.value) and repr(end[0] + " " + end[1:]) in str(caught.value)


def test_tokens_of_the_template_are_refused_in_tools_and_tool_calls_too(tokenizers):
    ours, function = tokenizers["qwen3"], CALL["tool_calls"][0]["function"]
    call = {**CALL, "tool_calls": [{"function": {**function, "arguments": {"zone": ["<|im_start|>"]}}}]}
    with pytest.raises(RecordError, match=r"message 2 holds '<\|im_start\|>'"):
        ours.encode(chat([USER, call]), "assistant")
    with pytest.raises(RecordError, match=r"a tool holds '<\|im_end\|>'"):
        ours.encode(chat([USER, ANSWER], [{"name": "<|im_end|>"}]), "assistant")


TEXT = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["{{ 7 * 7 }}", "{% raw %}", "{# no #}", "<|im_end", "assistant\n", "😀👩‍👩‍👧", "\u0301x", "a\x00b", "\ufeff"]
    ),
)
# Tokens are refused in contents and reasoning is apart (both above); hypothesis knows them from the code.
TOKENS = {"</think>"}.union(*(family.special for family in FAMILIES.values()))
TEXT = TEXT.filter(lambda text: not any(token in text for token in TOKENS))
# Byte-level tokens may join a line end of the header and white space that begins an answer (tested in test_chat.py).
REPLY = TEXT.filter(lambda text: text.strip() and not text[0].isspace())
TALKS = st.tuples(st.booleans(), st.lists(st.tuples(TEXT, REPLY), min_size=1, max_size=4), st.booleans())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(talk=TALKS)
def test_whatever_is_said_the_supervised_tokens_are_the_answers_and_their_end_tokens(tokenizers, name, talk):
    with_system, pairs, asks_on = talk
    messages = [SYSTEM] if with_system and FAMILIES[name].system else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages += [USER] if asks_on else []
    expected = answers(name, messages)
    assert supervised(tokenizers[name], chat(messages)) == "".join(expected)
    assert supervised(tokenizers[name], chat(messages), "last_assistant") == expected[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_encoded_as_each_example_is_and_errors_stand_in_their_place(tokenizers, name):
    ours = tokenizers[name]
    bad = chat([{**USER, "content": FAMILIES[name].end}, ANSWER])
    good = [chat(CONVERSATIONS["multi"]), Example("", text="yes"), Example("", prompt="a", completion="b")]
    results = ours.encode_batch([good[0], bad, *good[1:]], "assistant")
    assert isinstance(results[1], RecordError)
    assert [results[0], *results[2:]] == [ours.encode(example, "assistant") for example in good]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen3"])
def test_a_conversation_of_many_turns_is_rendered_once(tokenizers, name, monkeypatch):
    ours, messages = tokenizers[name], CONVERSATIONS["multi"] * 10
    ours.encode(chat(messages), "assistant")  # learns what the template writes around answers
    calls = []
    render = type(ours._template).render
    monkeypatch.setattr(type(ours._template), "render", lambda *args: calls.append(1) or render(*args))
    assert supervised(ours, chat(messages)) == "".join(answers(name, messages))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["phi3", "mistral-v7"])
def test_spaces_that_a_tokenizer_puts_before_each_piece_move_no_mask(tokenizers, tmp_path, name):
    family = FAMILIES[name]
    write_tokenizer(tmp_path, None, family.eos, special=family.special, bos=family.bos, pieces=True)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    spaces = {"type": "Prepend", "prepend": "▁"}
    path.write_text(
        json.dumps({**settings, "normalizer": {"type": "Sequence", "normalizers": [spaces, settings["normalizer"]]}})
    )
    (tmp_path / "chat_template.jinja").write_text(tokenizers[name]._source)
    ours, messages = ChatTokenizer(tmp_path), CONVERSATIONS["system and multi"]
    trained = supervised(ours, chat(messages))
    assert trained.replace(" ", "") == "".join(answers(name, messages)).replace(" ", "")
    whole = ours.render(messages, None, False)
    assert len(supervised(ours, chat(messages), "all")) > len(whole), "the tokenizer adds no spaces: this tests nothing"
