"""From paths to raw records: every kind of file, what is named for each that can't be read, and bounded memory."""

import csv
import gzip
import io
import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from raw_records import outcomes, read, refusal

from common.config import TrainConfig, WeightedPath
from common.config.errors import ConfigInput, validated
from common.data import readers
from common.data.readers import DataFile, RecordError, decode, list_files, place, read_raw
from common.errors import UserError

ROWS = [
    {"prompt": "Hi", "completion": "Ho"},
    {"prompt": 'a "b", c\nd', "completion": "Grüße 😀"},
    {"prompt": "", "completion": "x"},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def as_csv(delimiter: str = ",", end: str = "\r\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS[0], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


CONTENTS = {
    "data.jsonl": LINES,
    "data.ndjson": LINES,
    "data.json": json.dumps(ROWS).encode(),
    "data.csv": as_csv(),
    "data.tsv": as_csv("\t", "\n"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
def test_each_kind_of_text_file_gives_the_same_records(name, bom, packed):
    content = bom + CONTENTS[name]
    Path(name + ".gz" * packed).write_bytes(gzip.compress(content) if packed else content)
    assert read(name + ".gz" * packed) == ROWS


def test_the_place_of_a_row_is_its_first_line():
    Path("data.csv").write_bytes(b'prompt,completion\n"a\nb",c\n\nd,e\n')
    assert outcomes("data.csv") == {
        "data.csv:2": {"prompt": "a\nb", "completion": "c"},
        "data.csv:5": {"prompt": "d", "completion": "e"},
    }


def test_records_pass_to_another_process_unread_and_with_their_place():
    Path("data.jsonl").write_bytes(b"\n" + LINES + b"oops\n")
    files = list_files("data.jsonl")
    raws = pickle.loads(pickle.dumps(list(read_raw(files))))
    assert raws[0].payload == LINES.splitlines()[0]
    assert [place(files, raw) for raw in raws] == ["data.jsonl:2", "data.jsonl:3", "data.jsonl:4", "data.jsonl:5"]


def test_a_refused_row_keeps_its_reason_in_another_process():
    Path("data.csv").write_bytes(b"text\na,b\n")
    (raw,) = pickle.loads(pickle.dumps(list(read_raw(list_files("data.csv")))))
    with pytest.raises(RecordError, match="has 2 cells"):
        decode(raw)


def test_a_file_is_not_read_before_its_records_are_wanted():
    Path("good.jsonl").write_bytes(LINES)
    Path("empty.jsonl").write_bytes(b"\n")
    records = read_raw(list_files(["good.jsonl", "empty.jsonl"]))
    assert [next(records).file for _ in ROWS] == [0, 0, 0]
    with pytest.raises(UserError, match=r"^empty\.jsonl: the file holds no examples; expected one JSON object a line"):
        next(records)


BAD_CSV = {
    b"a": "has 1 cells; the header names 2 columns; put quotes around",
    b"a,b,c": "has 3 cells; the header names 2 columns",
    b'"a"b,c': "no row: ',' expected after '\"'; a quote within quotes is doubled",
    b"Gr\xfc\xdfe,b": "not UTF-8 text (found the byte 0xfc); save it as UTF-8",
    b"a\0,b": "holds NUL bytes",
}


@pytest.mark.parametrize(("row", "message"), BAD_CSV.items(), ids=BAD_CSV.values())
def test_a_bad_row_is_named_and_the_next_is_read(row, message):
    Path("data.csv").write_bytes(b"prompt,completion\n" + row + b"\nd,e\n")
    found = outcomes("data.csv")
    assert list(found) == ["data.csv:2", "data.csv:3"]
    assert message in found["data.csv:2"]
    assert found["data.csv:3"] == {"prompt": "d", "completion": "e"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"prompt;completion\na;b\n", "data.csv:1: the header 'prompt;completion' is one column; expected"),
        ("data.csv", b"prompt\tcompletion\na\tb\n", "name the file .tsv"),
        ("data.csv", b"text,text\na,b\n", "data.csv:1: the header names text twice"),
        ("data.csv", b'"text\na,b\n', "data.csv:1: no row: unexpected end of data"),
        ("data.csv", b"text\n", "data.csv: the file holds no examples; expected a header line, then rows"),
        ("data.csv", "text\na\n".encode("utf-16"), "data.csv: not UTF-8 text (it begins like UTF-16)"),
        ("data.jsonl", gzip.compress(LINES), "data.jsonl: compressed with gzip; add .gz to its name"),
        ("data.csv", b"PK\x03\x04...", "data.csv: a zip archive or spreadsheet"),
        ("data.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "data.jsonl: a Git LFS pointer"),
        ("data.json", LINES, "one object a line belongs in a file named .jsonl"),
        ("data.json", b'[{"a": 1, "a": 2}]', "data.json: no JSON: an object has the key 'a' twice"),
        ("data.parquet", b"PAR1 and no more", "data.parquet: can't be read as Parquet ("),
        ("data.jsonl", b"", "data.jsonl: the file holds no examples; expected one JSON object a line"),
        ("data.txt", b"abc", "data.txt: unknown kind of file; expected one of .jsonl, .ndjson, .json, .csv, .tsv,"),
    ],
)
def test_a_file_that_can_not_be_read_says_why(name, content, message):
    Path(name).write_bytes(content)
    assert message in refusal(name)


BAD_LINES = {
    '{"a": 1, "b": {"c": 1, "c": 2}}': "an object has the key 'c' twice",
    '{"a": Infinity}': "Infinity is no JSON number",
    '{"a\0": 1}': "holds NUL bytes, as UTF-16 or a damaged file does",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=BAD_LINES.values())
def test_a_line_that_json_readers_take_differently_is_refused(line, message):
    Path("data.jsonl").write_text(f"{line}\n{{}}\n")
    found = outcomes("data.jsonl")
    assert message in found["data.jsonl:1"] and found["data.jsonl:2"] == {}


def test_nan_means_a_missing_value_as_pandas_writes_it():
    Path("data.jsonl").write_text('{"a": NaN}\n')
    assert read("data.jsonl") == [{"a": None}]


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_a_line_that_is_too_long_is_named_and_the_next_is_read(name, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 50)
    good = b'{"text": "b"}' if name == "data.jsonl" else b"b"
    head = b"" if name == "data.jsonl" else b"text\n"
    Path(name).write_bytes(head + b"a" * 51 + b"\n" + good + b"\n" + b"c" * 200)
    found = outcomes(name)
    first = 1 + head.count(b"\n")
    assert list(found) == [f"{name}:{first}", f"{name}:{first + 1}", f"{name}:{first + 2}"]
    assert "a line of more than 0 MiB; expected one example" in found[f"{name}:{first}"]
    assert found[f"{name}:{first + 1}"] == {"text": "b"}


def test_memory_stays_bounded_with_a_line_of_any_length():
    with gzip.open("data.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b"a" * 2**20)
    tracemalloc.start()
    found = outcomes("data.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a line of more than 32 MiB" in found["data.jsonl.gz:1"]
    assert peak < 100 * 2**20  # the limit, once in pieces and once joined, is 64 MiB


def test_a_list_that_is_too_long_to_hold_is_refused(monkeypatch):
    monkeypatch.setattr(readers, "MAX_LIST_BYTES", 10)
    Path("data.json").write_bytes(json.dumps(ROWS).encode())
    assert "a list has to be read whole; write one object a line" in refusal("data.json")


@given(
    st.binary(max_size=200) | st.text(alphabet='{}[]":,\n\r\t a1é\0;').map(str.encode),
    st.sampled_from([*CONTENTS, "data.parquet"]),
)
@example(b'"a', "data.csv")
@example(b"a\r\rb", "data.csv")
@example(b"[" * 100_000, "data.json")
@example(b"PAR1" + b"\0" * 20 + b"PAR1", "data.parquet")
@example(b"\xff\xfea\0", "data.tsv")
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        found = outcomes(str(path))
    except UserError as error:
        assert str(error).startswith(f"{path}")
    else:
        assert found and all(value != "" for value in found.values())


@given(st.binary(max_size=300))
def test_any_bytes_called_gzip_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl.gz"
    packed = bytearray(gzip.compress(LINES * 20))
    packed[10 : 10 + len(content)] = content
    path.write_bytes(packed)
    try:
        assert outcomes(str(path))
    except UserError as error:
        assert str(error).startswith(f"{path}: a damaged gzip file")


@pytest.mark.parametrize(
    ("split", "name"),
    [("train", "train.jsonl"), ("validation", "valid.csv"), ("validation", "dev.json.gz"), ("test", "test.parquet")],
)
def test_a_folder_holds_a_file_for_each_split(split, name):
    Path("data").mkdir()
    for other in ("train.jsonl", "README.md", "trainer.jsonl", name):
        Path("data", other).touch()
    assert [file.path for file in list_files("data", split)] == [f"data/{name}"]


def test_the_shards_of_a_split_are_read_in_order():
    Path("data").mkdir()
    for number in (1, 0, 2):
        Path("data", f"train-{number:05}-of-00003.parquet").touch()
    assert [file.path[-16:-8] for file in list_files("data")] == ["of-00003"] * 3
    assert [file.path[11:16] for file in list_files("data")] == ["00000", "00001", "00002"]


def test_a_folder_without_the_split_or_with_two_of_it_is_refused():
    Path("data").mkdir()
    assert refusal("data").startswith("data: the folder holds no train file; expected train.jsonl (or")
    for name in ("train.jsonl", "train.csv"):
        Path("data", name).touch()
    assert "which is the train file: train.csv, train.jsonl? expected one" in refusal("data")
    assert "data: the folder holds no validation file; expected validation.jsonl" in refusal("data", "validation")
    assert "?split= needs a folder that datasets' save_to_disk wrote" in refusal("data?split=train")


def test_a_whole_file_beside_shards_of_its_kind_is_refused():
    Path("data").mkdir()
    for name in ("train.jsonl", "train-00000-of-00001.jsonl"):
        Path("data", name).touch()
    assert "which is the train file: train-00000-of-00001.jsonl, train.jsonl?" in refusal("data")


def test_a_missing_file_is_refused():
    assert refusal("missing.jsonl").startswith("missing.jsonl: no such file; expected a file or folder")


def test_a_file_with_a_question_mark_in_its_name_is_that_file():
    Path("why?.jsonl").write_bytes(LINES)
    assert read("why?.jsonl") == ROWS


def test_weights_go_with_their_files():
    Path("a.jsonl").write_bytes(LINES)
    assert list_files(["a.jsonl", WeightedPath(path="a.jsonl", weight=0.5)]) == [
        DataFile("a.jsonl", "jsonl", 1.0),
        DataFile("a.jsonl", "jsonl", 0.5),
    ]


def config(**data) -> TrainConfig:
    return validated(TrainConfig, ConfigInput({"data": data}, "train.yaml", {}))


def test_a_config_takes_weighted_paths_and_gives_them_back():
    given_data = config(train=["a.jsonl", {"path": "b.jsonl", "weight": 2}, {"path": "c.jsonl"}])
    assert given_data.data.train == ("a.jsonl", WeightedPath(path="b.jsonl", weight=2.0), "c.jsonl")
    assert TrainConfig.from_dict(json.loads(json.dumps(given_data.to_dict()))) == given_data
    assert str(given_data.data.train[1]) == "b.jsonl (weight 2)"


BAD_CONFIGS = {
    "data.train: found a list of 1; expected text or a list of texts, or of groups": {"train": [{"file": "a"}]},
    "data.train: found {path, weight}, a group of keys; expected": {"train": {"path": "a", "weight": 0}},
    "data.train: found {path}, a group": {"train": {"path": ""}},
    "data.validation_split: found 1.5; expected a share below 1, e.g. 0.05": {"validation_split": 1.5},
    "data.validation_split: found -1; expected a number of at least 0": {"validation_split": -1},
    "data.validation_split: found 0.1, but data.validation is set too": {"validation_split": 0.1, "validation": "a"},
    'data.format: found "alpacca"; expected one of auto, chat, sharegpt': {"format": "alpacca"},
    "expected names for messages, conversations, system, tools, prompt": {"columns": {"answer": "a"}},
}


@pytest.mark.parametrize(("message", "data"), BAD_CONFIGS.items(), ids=[message[:50] for message in BAD_CONFIGS])
def test_a_config_that_says_data_wrongly_is_refused(message, data):
    with pytest.raises(UserError) as caught:
        config(**data)
    assert message in str(caught.value)


def test_evaluation_during_training_may_use_the_validation_split():
    held_out = ConfigInput({"eval_strategy": "epoch", "data": {"validation_split": 200}}, "train.yaml", {})
    assert validated(TrainConfig, held_out).data.validation_split == 200
