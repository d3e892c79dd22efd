"""`evaluate` as a person calls it: runs side by side, metrics of their own, and what doesn't go together."""

import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_files import write_base, write_tuned
from rich.console import Console
from tiny_tokenizer import LLAMA3, write_tokenizer

from common.config import TrainConfig
from common.errors import MachineError, UserError
from common.evaluate import verb
from common.evaluate.verb import Request

# What the engine in NumPy says next depends on the last token alone.
QUESTIONS = ["Hello", "the answer", "you?", "weather", "sun", "alarm", "timer", "fine", "thank you."]
OWN = """
def letters(answer, expected, record):
    print("a word on stdout")
    return {"letters": len(answer), "level": record["level"]}

def broken(answer, expected, record):
    return 1 / 0
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


def write_run(folder: Path, base: Path, scale: float, test: str = "test.jsonl") -> None:
    """Write what a finished run leaves, as far as it is looked at here."""
    write_tuned(folder / "final", base, scale)
    settings = {"data": {"test": test}, "evaluation": {"max_new_tokens": 4, "samples": 1}}
    config = TrainConfig.from_dict({"model_name_or_path": str(base), "engine": "torch", "device": "cpu", **settings})
    (folder / "training_config.json").write_text(json.dumps(config.to_dict()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for name in ("base", "other_base"):
        (folder / name).mkdir()
        write_base(folder / name)
    write_tokenizer(folder / "other_base", LLAMA3, eos="<|eot_id|>")
    (folder / "test.jsonl").write_text(
        "".join(f'{{"prompt": "{text}", "completion": "yes", "level": 2}}\n' for text in QUESTIONS)
    )
    (folder / "mine.py").write_text(OWN)
    (folder / "one").mkdir()
    (folder / "one" / "unfinished" / "checkpoint-4").mkdir(parents=True)
    (folder / "one" / "unfinished" / "training_config.json").write_text("{}")
    write_run(folder / "a", folder / "base", 1.0)
    write_run(folder / "b", folder / "base", -1.0)
    write_run(folder / "c", folder / "other_base", 1.0)
    write_run(folder / "d", folder / "base", 1.0, test="mine.py")
    return folder


@pytest.fixture
def run(place: Path, cli_environment: dict[str, str]) -> Run:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(__file__).parent / "fake_run.py"), "evaluate", *arguments]
        options = {"cwd": place, "env": cli_environment, "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run(command, check=False, **options)

    return start


def test_runs_stand_side_by_side_with_how_sure_the_difference_is(run):
    options = ["--compare", "a", "b", "--metric", "regex:a", "--metric", "exact_match"]
    done = run(*options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"scores", "differences", "examples"} and found["scores"].keys() == {"a", "b"}
    first, second = (found["scores"][name] for name in "ab")
    assert first.keys() == {"loss", "perplexity", "num_loss_tokens", "num_examples", "regex:a", "exact_match"}
    pattern, _ = found["differences"]
    assert (pattern["metric"], pattern["first"], pattern["second"]) == ("regex:a", "a", "b")
    assert pattern["difference"] == pytest.approx(second["regex:a"] - first["regex:a"])
    assert pattern["better"] - pattern["worse"] == pytest.approx(9 * pattern["difference"])
    assert pattern["interval"][0] <= pattern["difference"] <= pattern["interval"][1]
    assert len(found["examples"]) == pattern["better"] + pattern["worse"] > 0
    for example in found["examples"]:
        given = example["answers"]
        assert ("a" in given["a"]) != ("a" in given["b"]) and example["source"].startswith("test.jsonl:")
    shown = run(*options).stdout
    assert "Judged differently" in shown and f"{len(found['examples']) - 1} more were judged differently" in shown
    assert "regex:a: b against a: +33.3 points (95% between " in shown
    assert f"better in {pattern['better']}, worse in {pattern['worse']} of 9 (p = " in shown


def test_an_adapter_by_itself_is_compared_on_the_configs_base_with_exact_match_by_default(run, place):
    (place / "config.json").write_text((place / "a" / "training_config.json").read_text())
    alone = place / "alone"
    copy_files(place / "b" / "final", alone)
    assert "has no training_config.json that names its base; add --config" in run("--compare", "a", "alone").stderr
    found = json.loads(run("--compare", "b", "alone", "a/final", "-c", "config.json", "--json").stdout)
    assert found["scores"]["b"] == found["scores"]["alone"] != found["scores"]["final"]
    assert [each["second"] for each in found["differences"]] == ["alone", "final"]
    assert {each["metric"] for each in found["differences"]} == {"exact_match"}


def copy_files(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_each_run_is_measured_on_its_own_base_and_losses_are_left_out_where_tokens_differ(run):
    done = run("--compare", "a", "c", "--json")
    assert done.returncode == 0, done.stderr
    assert "The bases have other tokenizers" in done.stderr
    assert json.loads(done.stdout)["scores"]["c"].keys() == {"num_examples", "exact_match"}


def test_the_users_own_scores_are_there_and_what_they_print_is_not_in_the_way(run):
    done = run("-c", "a/training_config.json", "--adapter", "a/final", "--metric", "python:mine.py:letters", "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["adapter"]["python:mine.py:letters:level"] == 2.0
    assert scores["adapter"]["python:mine.py:letters:letters"] > 0 and "a word on stdout" in done.stderr


def test_what_the_users_function_raises_ends_in_one_message(run):
    done = run("-c", "a/training_config.json", "--metric", "python:mine.py:broken")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "mine.py:7: ZeroDivisionError: division by zero, on the answer to test.jsonl:" in done.stderr


def request(**asked: object) -> Request:
    paths = {name: [Path(each) for each in asked.pop(name, ())] for name in ("runs", "data")}
    return Request(**paths, **asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "--config: missing; name the config of the run"),
        ({"runs": ["a"]}, "a: to score an adapter, say --adapter; to compare several, add --compare"),
        ({"compare": True, "runs": ["a"]}, "--compare: expected two runs or adapters or more"),
        ({"compare": True, "runs": ["a", "a"]}, "--compare: a is named twice"),
        ({"compare": True, "runs": ["a", "b"], "adapter": Path("a")}, "--compare takes runs or adapters after it"),
        ({"compare": True, "runs": ["a", "d"]}, "--compare: a has data.test: test.jsonl, d mine.py; add --data FILE"),
        ({"compare": True, "runs": ["a", "one/unfinished"]}, "isn't finished; name a checkpoint, e.g. one/unfinished/"),
        ({"compare": True, "runs": ["a", "nosuch"]}, "nosuch: no such folder"),
        ({"lm_eval": "arc_easy", "config": Path("x"), "data": ["y"]}, "--lm-eval: its tasks bring their own data"),
        ({"limit": 3, "config": Path("x")}, "--limit and --apply-chat-template are for --lm-eval"),
    ],
)
def test_what_does_not_go_together_is_refused(place, monkeypatch, asked, message):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=re.escape(message)):
        verb.run(request(**asked), [], True, Console(file=io.StringIO()))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed here")
def test_the_harness_that_is_not_installed_is_named_with_what_installs_it(place, monkeypatch):
    monkeypatch.chdir(place)
    asked = request(config=Path("a/training_config.json"), lm_eval="arc_easy")
    with pytest.raises(MachineError, match=r"pip install 'twintune\[lm-eval\]'"):
        verb.run(asked, [], True, Console(file=io.StringIO()))
