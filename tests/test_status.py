"""`twintune status` beside real runs of the engine in NumPy: going on, finished, interrupted, killed, never begun."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import PATIENCE

from common.errors import UserError
from common.view import status
from common.view.metrics import read_metrics
from common.view.status import look, plain, status_of

FAKE_RUN = Path(__file__).parent / "fake_run.py"
STEPS = 400


@pytest.fixture
def start(
    tmp_path: Path, tiny_model: Path, cli_environment: dict[str, str]
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a run in out/ that takes 20 seconds, unless a test ends it; all are gone after the test."""
    said = [{"role": "user", "content": "say 3"}, {"role": "assistant", "content": "it is 3"}]
    (tmp_path / "train.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 8)
    config = {
        "model_name_or_path": str(tiny_model),
        "output_dir": "out",
        "data": {"train": "train.jsonl", "validation": "train.jsonl"},
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    started = []

    def run(*arguments: str, step_seconds: float = 0.05) -> subprocess.Popen[str]:
        command = [sys.executable, str(FAKE_RUN), "train", "-c", "config.json", "--engine", "torch", *arguments]
        environment = cli_environment | {"TEST_STEP_SECONDS": str(step_seconds)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(row["step"] >= step for row in read_metrics(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_is_seen_going_on_then_interrupted_then_finished(tmp_path, start, cli):
    process, out = start(), tmp_path / "out"
    wait_for_step(out, 12)
    done = cli("status", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["state"] == "running" and seen["pid"] == process.pid and seen["final"] is None
    assert 12 <= seen["step"] < STEPS == seen["total_steps"] and seen["epoch"] == seen["step"] / 4
    assert seen["next_save_step"] == seen["step"] // 10 * 10 + 10
    assert seen["newest_checkpoint"].startswith("out/checkpoint-") and seen["resume_command"] is None
    rest = STEPS - seen["step"]
    # A step sleeps 0.05 s, a save syncs some files: a busy machine takes longer, never less.
    assert 0.9 * 0.05 * rest - 2 <= seen["seconds_left"] < 60
    assert seen["loss"] > 0 and seen["smoothed_loss"] > 0 and seen["eval_loss"] > 0

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    done = cli("status", "out", cwd=tmp_path)
    first, *rest = done.stdout.splitlines()
    assert first.startswith("out: interrupted  step ") and "newest checkpoint: out/checkpoint-" in first
    assert "stopped by SIGINT after step" in rest[0] and rest[-1].strip().endswith("--engine torch --resume")
    step = status_of(look(out)).step

    process = start("--resume", "--set", f"max_steps={step + 2}", step_seconds=0)
    process.communicate(timeout=PATIENCE)
    finished = status_of(look(out))
    assert (finished.state, finished.step, finished.final) == ("finished", step + 2, str(out / "final"))
    assert finished.resume_command is None and finished.seconds_left is None
    assert plain(look(out)).endswith(f"The adapter is in {out / 'final'}")


def test_a_killed_run_is_told_as_stopped_with_the_command_that_continues(tmp_path, start):
    process, out = start(), tmp_path / "out"
    wait_for_step(out, 1)
    process.kill()
    process.communicate()
    seen = status_of(look(out))
    assert seen.state == "stopped" and seen.pid is None and seen.message == status.KILLED
    assert str(seen.resume_command).endswith("train -c config.json --engine torch --resume")
    assert status.KILLED in plain(look(out)) and "Continue with:" in plain(look(out))


def test_a_failed_run_says_why(tmp_path, start):
    process, out = start(), tmp_path / "out"
    wait_for_step(out, 1)
    (out / "run.json").write_text(
        json.dumps(json.loads((out / "run.json").read_text()) | {"ended": {"how": "failed", "message": "broken"}})
    )
    process.kill()
    process.communicate()
    assert (status_of(look(out)).state, status_of(look(out)).message) == ("failed", "broken")


def test_looking_disturbs_no_run_and_a_folder_without_a_run_is_refused(tmp_path, cli):
    for folder, message in ((tmp_path / "gone", "no such folder"), (tmp_path, "holds no run")):
        with pytest.raises(UserError, match=message):
            look(folder)
    done = cli("status", "gone", cwd=tmp_path)
    assert done.returncode == 2 and "expected the output_dir of a `twintune train`" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_terminal_follows_the_run_until_it_ends(tmp_path, start, cli_environment):
    out = tmp_path / "out"
    process = start("--set", "max_steps=30")
    wait_for_step(out, 1)
    process.send_signal(signal.SIGSTOP)  # until it is seen: on a busy machine the follower starts slowly
    master, slave = os.openpty()
    command = [sys.executable, "-m", "common.cli", "status", "out"]
    follower = subprocess.Popen(command, cwd=tmp_path, env=cli_environment, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the last one who wrote there is gone
            break
        if not part:
            break
        shown += part
        if b"running, process" in shown:
            process.send_signal(signal.SIGCONT)
    os.close(master)
    assert follower.wait(timeout=PATIENCE) == 0
    text = shown.decode()
    assert "out: running, process" in text and "next save: step" in text
    assert "out: finished" in text.splitlines()[-5] + text[-2000:] and "The adapter is in out/final" in text


def test_quiet_prints_nothing_and_json_prints_only_json(tmp_path, start):
    quiet = start("--quiet", "--set", "max_steps=3", step_seconds=0)
    assert quiet.communicate(timeout=PATIENCE)[0] == "" and quiet.returncode == 0
    told = start("--json", "--set", "max_steps=3", "--set", "output_dir=other", step_seconds=0)
    shown, errors = told.communicate(timeout=PATIENCE)
    events = [json.loads(line) for line in shown.splitlines()]
    assert events[0]["event"] == "message" or events[0]["event"] == "begin"
    rows = [
        {key: value for key, value in event.items() if key != "event"}
        for event in events
        if event["event"] == "metrics"
    ]
    assert rows == read_metrics(tmp_path / "other" / "metrics.jsonl") and len(rows) == 3
    assert events[-1] == {"event": "end", "final": "other/final", "scores": None}
    assert "The adapter is in other/final" in errors
