"""Large data: tokenised by several processes into a store, which a second start opens; weights and held-out shares."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import CHATML, LLAMA3, write_tokenizer

from common.config import DataConfig, TrainConfig
from common.data import dataset
from common.data.chat import ChatTokenizer
from common.data.dataset import hold_out, load_dataset, load_training, weighted
from common.data.tokens import TokenDataset, build_dataset
from common.errors import UserError

RECORDS = 2500  # three chunks


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWINTUNE_CACHE", str(tmp_path / "cache"))
    write_tokenizer(Path("base"), CHATML)
    write_records("train.jsonl", RECORDS)


def write_records(path: str, number: int, bad: tuple[int, ...] = ()) -> None:
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i} it is"}]}
        )
        for i in range(1, number + 1)
    ]
    for line in bad:
        lines[line - 1] = "{nonsense"
    Path(path).write_text("\n".join(lines) + "\n")


def load(path: str = "train.jsonl", stored: bool = False, template: str | None = None, **settings):
    if template:
        write_tokenizer(Path("base"), template)
    config = TrainConfig(**settings)
    with pytest.MonkeyPatch.context() as patch:
        if stored:
            patch.setattr(dataset, "SMALL_BYTES", 0)
        return load_dataset(path, config, ChatTokenizer(Path("base")))


def stores() -> list[Path]:
    return sorted(Path("cache/data").glob("*")) if Path("cache/data").is_dir() else []


def test_a_store_holds_what_is_tokenised_in_memory():
    memory, memory_report = load()
    assert stores() == []
    stored, stored_report = load(stored=True)
    assert len(stores()) == 1
    assert stored_report == memory_report and stored_report.num_records == RECORDS
    assert stored.fingerprint() == memory.fingerprint()
    assert isinstance(stored.token_ids, np.memmap)
    for name in ("token_ids", "loss_mask", "starts", "lengths", "loss_lengths"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(memory, name))
    assert list(stored.places) == list(memory.places)
    assert stored.places[RECORDS - 1] == f"train.jsonl:{RECORDS}"
    assert stored.highest_token == memory.highest_token == memory.token_ids.max()


def test_a_second_start_opens_the_store_and_reads_no_record(monkeypatch):
    first, _ = load(stored=True)
    monkeypatch.setattr(dataset, "read_raw", None)  # whoever calls it now fails
    second, report = load(stored=True)
    assert second.fingerprint() == first.fingerprint() and report.num_records == RECORDS


def test_a_store_is_found_wherever_the_file_lies_and_names_its_new_place(monkeypatch):
    load(stored=True)
    Path("train.jsonl").rename("moved.jsonl")
    monkeypatch.setattr(dataset, "read_raw", None)
    data, _ = load("moved.jsonl", stored=True)
    assert data.places[0] == "moved.jsonl:1"


@pytest.mark.parametrize(
    "change",
    [{"max_seq_length": 40}, {"data": DataConfig(train_on="all")}, {"template": LLAMA3}],
    ids=["length", "mask", "template"],
)
def test_another_way_to_make_tokens_makes_another_store(change):
    load(stored=True)
    load(stored=True, **change)
    assert len(stores()) == 2


def test_other_bytes_make_another_store():
    load(stored=True)
    write_records("train.jsonl", RECORDS + 1)
    data, _ = load(stored=True)
    assert len(stores()) == 2 and len(data) == RECORDS + 1


def test_bad_records_are_all_counted_named_in_order_and_leave_no_store():
    write_records("train.jsonl", RECORDS, bad=(3, 1200, *range(2000, 2040)))
    with pytest.raises(UserError) as caught:
        load(stored=True)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[:3]] == ["3", "1200", "2000"]
    assert len(lines) == 22 and lines[20] == "... and 22 more"
    assert list(Path("cache/data").iterdir()) == []


def test_skipped_records_are_counted_in_the_store_too():
    write_records("train.jsonl", RECORDS, bad=(3, 1200))
    for _ in range(2):
        data, report = load(stored=True, data=DataConfig(on_error="skip"))
        assert (len(data), report.num_errors) == (RECORDS - 2, 2)
        assert report.errors[1].startswith("train.jsonl:1200: no JSON")


def test_progress_is_told_in_records():
    told = []
    load_dataset("train.jsonl", TrainConfig(), ChatTokenizer(Path("base")), advance=told.append)
    assert told == [1000, 2000, 2500]


def made(records: int, pieces: int = 1) -> TokenDataset:
    """Make a data set whose example i of record i // pieces is [i, 1]."""
    data = build_dataset([([i, 1], [False, True], "made") for i in range(records * pieces)])
    data.places.files[:] = 0
    data.places.lines[:] = np.arange(records * pieces) // pieces
    return data


def firsts(data: TokenDataset) -> list[int]:
    return [int(data.tokens(i)[0]) for i in range(len(data))]


@pytest.mark.parametrize(("share", "expected"), [(0.1, 4), (7, 7), (0.001, 1)])
def test_a_held_out_share_is_drawn_by_seed_and_leaves_the_rest(share, expected):
    train, held = hold_out(made(40), share, seed=1)
    assert len(held) == expected
    assert sorted(firsts(train) + firsts(held)) == list(range(40))
    assert firsts(hold_out(made(40), share, seed=1)[1]) == firsts(held)
    assert firsts(train) == sorted(firsts(train))
    if expected > 1:
        assert firsts(hold_out(made(40), share, seed=2)[1]) != firsts(held)


def test_pieces_of_one_record_are_held_out_together():
    train, held = hold_out(made(20, pieces=3), 0.25, seed=0)
    assert len(held) == 15
    assert not {i // 3 for i in firsts(train)} & {i // 3 for i in firsts(held)}


def test_holding_out_everything_is_refused():
    with pytest.raises(UserError, match=r"data\.validation_split: 40: there are 40 examples, so none would be left"):
        hold_out(made(40), 40, seed=0)


def test_weights_repeat_examples_and_take_a_seeded_part_of_them():
    data = made(10)
    data.places.files[:] = np.repeat([0, 1], 5)
    counts = np.bincount(firsts(weighted(data, np.array([2, 1.4]), seed=0)), minlength=10)
    assert counts[:5].tolist() == [2] * 5
    assert sorted(counts[5:]) == [1, 1, 1, 2, 2]
    assert sorted(np.bincount(firsts(weighted(data, np.array([0.4, 1]), seed=0)), minlength=10)[:5]) == [0, 0, 0, 1, 1]


def test_training_data_is_held_out_first_and_weighted_then():
    write_records("more.jsonl", 100)
    data = DataConfig(train=["train.jsonl", {"path": "more.jsonl", "weight": 2}], validation_split=26)
    train, held, report = load_training(TrainConfig(data=data), ChatTokenizer(Path("base")))
    assert report.num_records == RECORDS + 100 and len(held) == 26
    assert len(set(held.places)) == 26 and not set(held.places) & set(train.places)
    of_more = sum(place.startswith("more") for place in held.places)
    assert len(train) == RECORDS + 100 - 26 + (100 - of_more)
