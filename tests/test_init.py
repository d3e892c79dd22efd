"""`twintune init`: five answers make a config that trains, asked only where they are missing."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

from common.config import load_config
from common.errors import UserError
from common.init import Answers, config_text, write_config

ALL = Answers("org/model", "a.jsonl", "0.1", True, "outputs/x")
SUGGESTIONS = {"data/train.jsonl", "0.05", "no", "outputs/model"}


def test_what_is_given_stands_in_the_config_and_nothing_is_asked(tmp_path):
    write_config(tmp_path / "mine.yaml", ALL, None)
    config = load_config(tmp_path / "mine.yaml")
    assert config.model_name_or_path == "org/model" and config.output_dir == "outputs/x"
    assert config.data.train == ("a.jsonl",) and config.data.validation_split == 0.1 and not config.data.validation
    assert config.quantization.load_in_4bit or config.quantization.bits == 4


def test_questions_suggest_answers_that_work(tmp_path):
    asked = []

    def ask(question: str, suggested: str) -> str:
        asked.append(suggested)
        return suggested or "org/model"

    write_config(tmp_path / "mine.yaml", Answers(), ask)
    config = load_config(tmp_path / "mine.yaml")
    assert len(asked) == 5 and set(asked) == SUGGESTIONS | {""}
    assert config.quantization.load_in_4bit is False and config.quantization.bits is None
    assert config.data.validation_split == 0.05 and config.output_dir == "outputs/model"


@pytest.mark.parametrize("name", ['C:\\data\\"my" set #1.jsonl', "no", "- a: b", "données.jsonl"])
def test_any_name_of_a_file_survives_yaml(tmp_path, name):
    write_config(tmp_path / "mine.yaml", Answers("m", name, name, False, name), None)
    config = load_config(tmp_path / "mine.yaml")
    assert config.data.train == config.data.validation == (name,) and config.output_dir == name


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match="is there already; name another file with --output"):
        write_config(tmp_path / "mine.yaml", ALL, None)
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_without_a_terminal_the_missing_option_is_named(tmp_path, cli):
    done = cli("init", "--model", "m", "--train", "a.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "error: --validation: " in done.stderr and "give it as an option" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "load_in_4bit: true" in config_text(ALL, lambda *_: "") or "bits: 4" in config_text(ALL, lambda *_: "")


def test_a_terminal_is_asked(tmp_path: Path, cli_environment: dict[str, str]):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "common.cli", "init", "--train", "a.jsonl"]
    ends = {"stdin": slave, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=tmp_path, env=cli_environment, text=True, **ends) as process:
        os.write(master, b"org/model\n\nyes\n\n")
        shown = process.communicate(timeout=PATIENCE)[0]
    os.close(slave), os.close(master)
    assert process.returncode == 0 and "train.yaml is ready" in shown
    config = load_config(tmp_path / "train.yaml")
    assert config.model_name_or_path == "org/model" and config.output_dir == "outputs/model"
    assert config.quantization.load_in_4bit or config.quantization.bits == 4
