"""A folder in which a person runs commands, and one with a run that has come to its end; a plugin of conftest.py."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ENGINES = ("mlx", "torch")
STEPS = 120  # long enough to be interrupted in the middle
CONFIG = {
    "data": {"train": "train.jsonl", "validation": "test.jsonl", "test": "test.jsonl"},
    "lora": {"r": 4, "lora_dropout": 0.1},  # dropout, so that a resume has to find the same masks again
    "device": "cpu",
    "learning_rate": 0.01,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 40,
    "save_steps": 50,
    "save_total_limit": 2,
    "evaluation": {"samples": 1, "max_new_tokens": 4, "metrics": ["exact_match"]},
}


@dataclass(frozen=True)
class Workplace:
    """A folder with data and a config, in which a person runs commands."""

    path: Path
    run_cli: Callable[..., subprocess.CompletedProcess[str]]
    environment: dict[str, str]

    def run(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return self.run_cli(*arguments, cwd=self.path, **options)

    def train(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return self.run("train", "--config", "config.json", *arguments, **options)

    def write_config(self, **changes: object) -> None:
        config = json.loads((self.path / "config.json").read_text()) | changes
        (self.path / "config.json").write_text(json.dumps(config))

    def refused(self, *arguments: object, code: int = 2, **options: object) -> str:
        """Run a command that must fail in good order; returns its message."""
        before = sorted(self.path.rglob("*"))
        done = self.run(*arguments, **options)
        noise, found, message = f"\n{done.stderr}".partition("\nerror: ")
        assert done.returncode == code and found, done.stderr
        assert "Traceback" not in done.stderr + done.stdout and "\nerror: " not in message
        assert not noise or "with the torch engine" in done.stdout  # whose libraries have a lot to say
        assert sorted(self.path.rglob("*")) == before
        return message


def make_workplace(path: Path, model: Path, cli: Callable, environment: dict[str, str]) -> Workplace:
    for name, count in (("train.jsonl", 9), ("test.jsonl", 3)):
        lines = [
            {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}{i}"}]}
            for i in range(count)
        ]
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(json.dumps(CONFIG | {"model_name_or_path": str(model), "output_dir": "out"}))
    return Workplace(path, cli, environment)


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, cli: Callable, cli_environment: dict[str, str]) -> Workplace:
    return make_workplace(tmp_path, tiny_model, cli, cli_environment)


@dataclass(frozen=True)
class FinishedRun:
    """A workplace in which an engine has trained to the end, and what it printed."""

    engine: str
    workplace: Workplace
    done: subprocess.CompletedProcess[str]

    @property
    def output(self) -> Path:
        return self.workplace.path / "out"


@pytest.fixture(scope="session", params=ENGINES)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    cli: Callable,
    cli_environment: dict[str, str],
) -> FinishedRun:
    path = tmp_path_factory.mktemp(f"finished-{request.param}")
    workplace = make_workplace(path, tiny_model, cli, cli_environment)
    done = workplace.train("--engine", request.param)
    assert done.returncode == 0, done.stderr
    return FinishedRun(request.param, workplace, done)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
