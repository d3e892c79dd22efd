"""From a file and overrides to values: YAML, JSON, --set."""

from pathlib import Path

import pytest
from written_config import load, problems

from common.config import TrainConfig, load_config
from common.errors import UserError

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.mark.parametrize("written", ["1e-3", "0.001", "1.0e-3", "1E-3", "+1e-3"])
def test_yaml_numbers_with_an_exponent_are_numbers(written):
    assert load(f"learning_rate: {written}").learning_rate == 0.001


@pytest.mark.parametrize(("text", "name"), [("eval_strategy: no", "a.yaml"), ('{"eval_strategy": "no"}', "a.json")])
def test_no_is_the_word_no_in_yaml_too(text, name):
    assert load(text, name=name).eval_strategy == "no"


def test_overrides_win_over_the_file_and_the_last_one_wins():
    config = load("lora: {r: 4, lora_alpha: 8}", "lora.r=8", "lora.r=64", "learning_rate=1e-4", "data.train=[a, b]")
    assert (config.lora.r, config.lora.lora_alpha, config.learning_rate) == (64, 8, 1e-4)
    assert config.data.train == ("a", "b")


def test_an_empty_override_restores_the_default():
    assert load("run_name: x\nsave_total_limit: 3", "run_name=", "save_total_limit=null") == TrainConfig()


def test_a_mapping_can_be_set_key_by_key():
    assert load("seed: 1", "data.columns.prompt=question").data.columns == {"prompt": "question"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lora.r=sixteen", 'found "sixteen"; expected an integer of at least 1; write e.g. r: 16'),
        ("lora.rr=8", "unknown key; did you mean lora.r?"),
        ("zoo.bar=3", "unknown key; delete it, nothing here is like it"),
        ("lora.r", "expected key=value; write e.g. --set lora.r=16"),
        ("lora..r=3", "expected key=value"),
        ("lora={r: 8}", "lora is a group; set its keys one by one"),
        ("data.train=[a", "the value isn't valid YAML"),
        ("seed.x=1", "train.yaml has seed: 1, which holds no keys"),
        ("bf16=true", "found true, which contradicts fp16: true"),
    ],
)
def test_a_bad_override_is_blamed_and_not_the_file(override, line):
    (found,) = problems("seed: 1\nfp16: true", override)
    assert found.startswith(f"--set {override}: {line}")


def test_an_override_does_not_hide_what_is_wrong_in_the_file():
    found = problems("lora: {r: x}\nfoo: 1", "lora.lora_alpha=8", "nonsense")
    assert [line.split(":")[0] for line in found] == ["--set nonsense", "train.yaml", "train.yaml"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.yaml", b"", "is empty"),
        ("a.yaml", b"# only a comment\n", "is empty"),
        ("a.json", b" \n", "is empty"),
        ("a.yaml", b"- 1\n- 2\n", "found [1, 2]; expected keys and values"),
        ("a.json", b"3", "found 3; expected keys and values"),
        ("a.yaml", b"seed: 1\nlora: {r: 1\nbf16: true\n", "line 3, column 5: not valid YAML"),
        ("a.yaml", b"seed: 1\n\tlora: 1\n", "line 2, column 1: not valid YAML"),
        ("a.yaml", b"seed: !!python/name:os.system x\n", "line 1, column 7: not valid YAML"),
        ("a.yaml", b"seed: \x00\n", "not valid YAML"),
        ("a.json", b'{"seed": 1,\n "lora": }', 'line 2, column 10: not valid JSON: Unexpected "}"'),
        ("a.json", b'{"seed": 1', "line 1, column "),
        ("a.yaml", b"seed: 1\nlora: {r: 1, r: 2}\n", "line 2: r: written twice"),
        ("a.json", b'{"seed": 1, "seed": 2}', "seed: written twice"),
        ("a.json", b'{"lora": {"r": 1, "r": 2,}} // so', "r: written twice"),
        ("a.yaml", b"seed: 1\nrun_name: \xff\n", "line 2: not UTF-8"),
        ("a.yaml", b"a: " + b"[" * 1500, "nested too deeply"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.toml", b"seed = 1", "found a file named *.toml; expected .yaml, .yml or .json"),
    ],
)
def test_a_file_that_holds_no_config_is_refused_with_the_place(name, content, line):
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(Path(name))
    assert str(caught.value).startswith(f"{name}: {line}")


def test_a_missing_file_and_a_folder_are_told_apart():
    Path("folder.yaml").mkdir()
    with pytest.raises(UserError, match=r"^nowhere\.yaml: no such file"):
        load_config(Path("nowhere.yaml"))
    with pytest.raises(UserError, match=r"^folder\.yaml: is a folder"):
        load_config(Path("folder.yaml"))


def test_byte_order_mark_and_windows_line_ends_are_read():
    Path("a.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\r\nlora:\r\n  r: 4\r\n")
    assert load_config(Path("a.yaml")).seed == 7


def test_yaml_json_and_commented_json_give_the_same_config():
    plain = load('{"seed": 7, "lora": {"r": 4}}', name="a.json")
    commented = load('{"seed": 7, // the seed\n "lora": {"r": 4,},}', name="b.json")
    assert plain == commented == load("seed: 7\nlora: {r: 4}")
