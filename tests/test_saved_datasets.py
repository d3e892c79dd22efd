"""Parquet files, folders of save_to_disk and data sets of the Hub as raw records, and slices of them."""

import importlib
import sys
from pathlib import Path

import pytest
from raw_records import outcomes, read, refusal

pytestmark = pytest.mark.usefixtures("in_tmp_path")

CALLS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]},
    {"messages": [{"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f"}}]}]},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Write ten rows as `save_to_disk` does, alone in `one` and as two splits in `two`, and as Parquet."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_list([{"text": f"text {number}"} for number in range(10)])
    rows.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select(range(3))}).save_to_disk(folder / "two")
    rows.to_parquet(folder / "rows.parquet")
    datasets.Dataset.from_list(CALLS).to_parquet(folder / "calls.parquet")
    return folder


def numbers(path: str, split="train") -> list[int]:
    return [int(row["text"][5:]) for row in read(path, split)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one", range(10)),
        ("one?split=train[:3]", range(3)),
        ("two", range(10)),
        ("two?split=dev", range(3)),
        ("two?split=train[-2:]", range(8, 10)),
        ("two?split=train[20%:50%]", range(2, 5)),
        ("two?split=train[5:100]", range(5, 10)),
        ("rows.parquet", range(10)),
    ],
)
def test_saved_data_sets_and_their_slices_are_read(saved, name, expected):
    assert numbers(f"{saved}/{name}") == list(expected)


def test_a_saved_data_set_gives_each_key_of_the_config_its_split(saved):
    assert numbers(f"{saved}/two", "validation") == [0, 1, 2]
    assert "has no test split; its splits are train, dev: add ?split=train" in refusal(f"{saved}/two", "test")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("split=nope", "has no split 'nope'; expected one of train, dev"),
        ("split=train[::2]", "found split=train[::2]; expected a name, or a slice as train[:1000]"),
        ("splitt=train", "found 'splitt=train'; expected split=..., each once"),
        ("split=train[5:2]", "the file holds no examples; expected at least one row"),
    ],
)
def test_a_wrong_slice_of_a_saved_data_set_is_refused(saved, query, message):
    assert message in refusal(f"{saved}/two?{query}")


def test_rows_are_numbered_from_one(saved):
    assert list(outcomes(f"{saved}/rows.parquet"))[:2] == [f"{saved}/rows.parquet#1", f"{saved}/rows.parquet#2"]


def test_nulls_that_arrow_adds_within_an_object_are_left_out(saved):
    assert read(f"{saved}/calls.parquet") == [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        CALLS[1],
    ]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_parquet_file_is_refused(saved, damage):
    content = bytearray((saved / "rows.parquet").read_bytes())
    content[30:60] = b"\xff" * 30
    Path("data.parquet").write_bytes(content[:-20] if damage == "cut" else content)
    assert refusal("data.parquet").startswith("data.parquet: can't be read as Parquet (")


def test_a_damaged_saved_data_set_is_refused(saved):
    folder = Path("broken")
    folder.mkdir()
    (folder / "state.json").write_text("{")
    assert refusal("broken").startswith("broken: can't be read (")


def test_a_missing_package_is_named_with_what_installs_it(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    text = refusal(f"{saved}/rows.parquet")
    assert "needs the package pyarrow" in text and "pip install 'twintune[data]'" in text


@pytest.fixture
def hub(saved, monkeypatch):
    """Answer `load_dataset` from the saved rows, and note what was asked: there is no network in tests."""
    datasets = importlib.import_module("datasets")
    asked: list[tuple] = []

    def load_dataset(path, name, *, split, revision, streaming):
        asked.append((path, name, split, revision, streaming))
        if path == "nobody/gated":
            raise datasets.exceptions.DatasetNotFoundError(
                "Dataset 'nobody/gated' is a gated dataset on the Hub.\nMore"
            )
        rows = datasets.load_from_disk(str(saved / "one"))
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("path", "asked", "length"),
    [
        ("hf://datasets/a/b", ("a/b", None, "validation", None, False), 10),
        ("hf://datasets/a/b@v1?split=train[:10%]&name=en", ("a/b", "en", "train[:10%]", "v1", False), 10),
        ("hf://datasets/b?streaming=true", ("b", None, "validation", None, True), 10),
        ("hf://datasets/a/b?streaming=true&split=train[2:6]", ("a/b", None, "train", None, True), 4),
        ("hf://datasets/a/b?streaming=true&split=train[7:]", ("a/b", None, "train", None, True), 3),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for_by_its_path(hub, path, asked, length):
    assert len(read(path, "validation")) == length
    assert hub == [asked]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://nobody/name", "no data set; expected hf://datasets/OWNER/NAME[@revision]"),
        ("hf://datasets/a/b/c.jsonl", "no data set; expected"),
        ("hf://datasets/a/b?streaming=yes", "found streaming=yes; expected true or false"),
        ("hf://datasets/a/b?config=en", "found 'config=en'; expected split=... and name=... and streaming=..."),
        ("hf://datasets/a/b?streaming=true&split=train[:10%]", "a streamed split has no known length; expected"),
        ("hf://datasets/nobody/gated", "can't be loaded (DatasetNotFoundError: Dataset 'nobody/gated' is a gated"),
    ],
)
def test_a_data_set_of_the_hub_that_can_not_be_had_is_refused_in_one_line(hub, path, message):
    text = refusal(path)
    assert text.startswith(f"{path}: {message}") and "\n" not in text
