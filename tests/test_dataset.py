"""From files to token arrays: what is cut, split or left out, and that every loss is counted."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, LLAMA3, NO_SYSTEM, REWRITES_HISTORY, write_tokenizer

from common.batches import BatchPlan
from common.config import DataConfig, TrainConfig
from common.data.chat import ChatTokenizer, Encoded
from common.data.dataset import load_dataset, report_lines
from common.data.tokenise import DataReport, fit
from common.data.tokens import TokenDataset
from common.errors import UserError

QUESTION = {"role": "user", "content": "What is the answer?"}
ANSWER = {"role": "assistant", "content": "The answer is yes."}
CHAT = {"messages": [QUESTION, ANSWER]}


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def load(
    *values: dict, template: str = CHATML, max_seq_length: int = 2048, **data
) -> tuple[TokenDataset, DataReport, ChatTokenizer]:
    write_tokenizer(Path("base"), template)
    Path("data.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    config = TrainConfig(max_seq_length=max_seq_length, data=DataConfig(**data))
    tokenizer = ChatTokenizer(Path("base"))
    return *load_dataset("data.jsonl", config, tokenizer), tokenizer


def refusal(*values: dict, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(*values, **settings)
    return str(caught.value)


def supervised(data: TokenDataset, tokenizer: ChatTokenizer, row: int) -> str:
    return tokenizer.decode(data.tokens(row)[data.mask(row)].tolist(), skip_special=False)


def test_examples_become_rows_that_name_their_lines():
    data, report, tokenizer = load(CHAT, {"text": "yes"}, {"prompt": "a", "completion": "b"})
    assert len(data) == report.num_records == 3
    assert list(data.places) == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:3"]
    assert supervised(data, tokenizer, 0) == "The answer is yes.<|im_end|>"
    assert supervised(data, tokenizer, 2) == "b<|im_end|>"
    assert report_lines(report, TrainConfig()) == []


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_counted_tokens_are_those_that_steps_train(train_on):
    chats = [CHAT, {"text": "The sun is out."}, {"prompt": "", "completion": "fine"}, {"messages": [ANSWER, QUESTION]}]
    data = load(*chats, train_on=train_on)[0]
    assert not any(data.mask(row)[0] for row in range(len(data))), "nothing predicts a first token"
    assert BatchPlan(data, 4, 1, 0, 1).step_batch(1).num_loss_tokens == data.loss_mask.sum()


def test_train_on_chooses_the_answers():
    messages = {"messages": [QUESTION, {**ANSWER, "content": "One."}, QUESTION, {**ANSWER, "content": "Two."}]}
    data, _, tokenizer = load(messages)
    assert supervised(data, tokenizer, 0) == "One.<|im_end|>Two.<|im_end|>"
    data, _, tokenizer = load(messages, train_on="last_assistant")
    assert supervised(data, tokenizer, 0) == "Two.<|im_end|>"
    data, *_ = load(messages, train_on="all")
    assert data.loss_mask.sum() == len(data.token_ids) - 1


def lengths() -> tuple[int, int]:
    """Give the tokens of CHAT and where its answer begins."""
    data = load(CHAT)[0]
    return len(data.token_ids), int(data.mask(0).argmax())


def test_an_example_as_long_as_the_limit_is_whole():
    total, _ = lengths()
    for truncation in ("truncate", "error", "drop", "split"):
        data, report, _ = load(CHAT, max_seq_length=total, truncation=truncation)
        assert len(data.token_ids) == total and report.truncated == 0


def test_truncate_keeps_the_beginning_and_counts_what_is_lost():
    _, start = lengths()
    whole = load(CHAT)[0]
    data, report, _ = load(CHAT, max_seq_length=start + 2, truncation="truncate")
    assert data.token_ids.tolist() == whole.token_ids[: start + 2].tolist()
    assert (report.truncated, report.dropped) == (1, 0)
    assert report.lost_loss_tokens == whole.loss_mask.sum() - 2
    assert report_lines(report, TrainConfig(max_seq_length=start + 2)) == [
        f"1 examples longer than max_seq_length {start + 2} were cut, {report.lost_loss_tokens} supervised tokens lost"
    ]


def test_an_example_whose_answer_is_cut_off_is_left_out_and_counted():
    _, start = lengths()
    text = {"text": "yes"}
    data, report, _ = load(CHAT, text, max_seq_length=start, truncation="truncate")
    assert list(data.places) == ["data.jsonl:2"]
    assert (report.truncated, report.dropped, len(data)) == (1, 1, 1)
    assert "1 examples without a supervised token were left out" in report_lines(report, TrainConfig())


def test_drop_leaves_long_examples_out_and_counts_them():
    total, _ = lengths()
    whole = load(CHAT)[0]
    data, report, _ = load(CHAT, {"text": "yes"}, max_seq_length=total - 1, truncation="drop")
    assert list(data.places) == ["data.jsonl:2"]
    assert (report.truncated, report.lost_loss_tokens) == (1, whole.loss_mask.sum())


def test_error_names_the_example_its_length_and_the_limit():
    total, _ = lengths()
    text = refusal({"text": "yes"}, CHAT, max_seq_length=total - 1, truncation="error")
    assert text.startswith(f"data.jsonl:2: {total} tokens; max_seq_length is {total - 1}; raise it, or set")


def test_split_makes_rows_of_one_source():
    data, report, _ = load(
        {"text": "Hello there, how are you? I am fine, thank you."}, max_seq_length=5, truncation="split"
    )
    assert len(data) > 2 and set(data.places) == {"data.jsonl:1"}
    assert max(len(data.tokens(row)) for row in range(len(data))) == 5
    assert (report.truncated, report.lost_loss_tokens) == (1, 0)


@settings(max_examples=200)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(2, 20))
def test_split_trains_every_supervised_token_exactly_once_and_from_the_one_before(mask, limit):
    pieces = list(fit(Encoded(list(range(len(mask))), mask), limit, "split", DataReport()))
    assert all(len(piece.token_ids) == len(piece.loss_mask) <= limit for piece in pieces)
    trained = [
        (piece.token_ids[i - 1], piece.token_ids[i])
        for piece in pieces
        for i in range(1, len(piece.token_ids))
        if piece.loss_mask[i]
    ]
    assert trained == [(i - 1, i) for i in range(1, len(mask)) if mask[i]]
    assert sum(sum(piece.loss_mask) for piece in pieces) == len(trained)


@settings(max_examples=200)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 40), st.sampled_from(["truncate", "drop"]))
def test_supervised_tokens_kept_and_lost_are_all_there_were(mask, limit, truncation):
    report = DataReport()
    pieces = list(fit(Encoded(list(range(len(mask))), mask), limit, truncation, report))
    assert sum(sum(piece.loss_mask) for piece in pieces) + report.lost_loss_tokens == sum(mask[1:])
    assert report.truncated == (len(mask) > limit)


def test_nothing_left_to_train_is_refused():
    _, start = lengths()
    assert "no example with a supervised token is left" in refusal(CHAT, max_seq_length=start, truncation="truncate")
    assert "no example with a supervised token is left" in refusal(CHAT, max_seq_length=1, truncation="split")


def test_conversations_that_the_template_refuses_are_told_all_at_once():
    bad = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]}
    lines = refusal(bad, CHAT, bad, template=NO_SYSTEM).splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == ["data.jsonl:1", "data.jsonl:3"]
    assert "System role not supported" in lines[0]
    assert lines[2] == "mend them, or leave them out with data.on_error: skip"


def test_conversations_that_the_template_refuses_can_be_skipped():
    thinking = {"messages": [QUESTION, {**ANSWER, "content": "<think>so</think>Yes."}, QUESTION, ANSWER]}
    data, report, _ = load(thinking, CHAT, {"text": "\ud800"}, template=REWRITES_HISTORY, on_error="skip")
    assert list(data.places) == ["data.jsonl:2"]
    assert [line.split(": ")[0] for line in report.errors] == ["data.jsonl:1", "data.jsonl:3"]
    assert report_lines(report, TrainConfig())[0].startswith(
        "2 unusable records were left out, the first: data.jsonl:1: "
    )


def test_skipped_lines_of_the_reader_and_of_the_template_are_counted_together():
    bad = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]}
    _, report, _ = load({"nonsense": 1}, bad, CHAT, template=NO_SYSTEM, on_error="skip")
    assert [line.split(": ")[0] for line in report.errors] == ["data.jsonl:1", "data.jsonl:2"]


def test_same_files_give_the_same_fingerprint_and_another_template_another():
    fingerprints = [load(CHAT, template=template)[0].fingerprint() for template in (CHATML, CHATML, LLAMA3)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
