"""What a run survives as a process: a second run, Ctrl-C twice, a closed terminal, a reader that goes away."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from patience import PATIENCE

from common.runs.checkpoint import checkpoints, damage
from common.view.metrics import read_metrics

PROGRAM = Path(__file__).parent / "fake_run.py"
STEPS = 6
ANSWERS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
    for i in range(8)
]


@dataclass(frozen=True)
class Workplace:
    """A folder with a config of a short run on the engine in NumPy."""

    path: Path
    environment: dict[str, str]

    @property
    def output(self) -> Path:
        return self.path / "out"

    def start(self, *arguments: str, step: float = 0.0, sync: float = 0.0, **streams: object) -> subprocess.Popen:
        slow = {"TEST_STEP_SECONDS": str(step), "TEST_SYNC_SECONDS": str(sync)}
        command = [sys.executable, str(PROGRAM), "train", "-c", "config.json", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        return subprocess.Popen(command, cwd=self.path, env=self.environment | slow, text=True, **streams)

    def finish(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def steps_logged(self) -> list[int]:
        return [row["step"] for row in read_metrics(self.output / "metrics.jsonl")]

    def hidden(self) -> list[str]:
        return [path.name for path in self.output.glob(".*") if path.name != ".lock"]


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, cli_environment: dict[str, str]) -> Workplace:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in ANSWERS))
    config = {
        "model_name_or_path": str(tiny_model),
        "output_dir": "out",
        "data": {"train": "train.jsonl"},
        "lora": {"r": 2, "target_modules": ["proj"]},
        "max_steps": STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Workplace(tmp_path, cli_environment)


def wait_for(happened: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone_even_if_killed(workplace: Workplace):
    first = workplace.start(step=0.2)
    wait_for(lambda: checkpoints(workplace.output), first)
    first.send_signal(signal.SIGSTOP)  # with four steps to go: it is there however long the refusals take
    for arguments in ((), ("--resume",)):
        second = workplace.finish(*arguments)
        assert second.returncode == 2 and "Traceback" not in second.stderr
        assert second.stderr.startswith(f"error: output_dir: out: another run writes there: process {first.pid} on ")
        assert f"wait for it, stop it (kill {first.pid}), or use another output_dir" in second.stderr
    first.kill()
    first.communicate()
    assert (workplace.output / ".lock").is_file()  # its text alone holds nobody up
    third = workplace.finish("--resume")
    assert third.returncode == 0, third.stderr
    assert (workplace.output / "final").is_dir() and not list(workplace.output.glob(".*"))


def test_a_second_ctrl_c_in_the_middle_of_a_save_stops_at_once_and_leaves_the_last_checkpoint_good(
    workplace: Workplace,
):
    process = workplace.start(sync=0.2)
    wait_for(lambda: checkpoints(workplace.output), process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: any(name.startswith(".checkpoint-") for name in workplace.hidden()), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in message, message
    assert message.startswith("stopped at once; every checkpoint saved before is whole. Continue with:\n  twintune ")
    # The save, ten files that take two seconds, did not come to its end.
    assert [path.name for path in checkpoints(workplace.output)] == ["checkpoint-2"]
    assert damage(workplace.output / "checkpoint-2") is None and workplace.hidden() == []
    resumed = workplace.finish("--resume")
    assert resumed.returncode == 0 and "Resuming out/checkpoint-2 after step 2" in resumed.stdout


def test_a_closed_terminal_does_not_end_a_run(workplace: Workplace):
    ours, theirs = pty.openpty()
    process = workplace.start(step=0.1, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    wait_for(lambda: workplace.steps_logged(), process)
    process.send_signal(signal.SIGHUP)
    os.close(ours)  # from now on, writing there is an input/output error
    assert process.wait(timeout=PATIENCE) == 0
    assert workplace.steps_logged() == list(range(1, STEPS + 1))
    assert f"Trained {STEPS} steps" in (workplace.output / "training.log").read_text()
    assert (workplace.output / "final").is_dir()


def test_a_reader_that_goes_away_does_not_end_a_run(workplace: Workplace):
    process = workplace.start(step=0.1)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=PATIENCE) == 0
    assert f"step {STEPS} " in (workplace.output / "training.log").read_text()
    assert (workplace.output / "final").is_dir()


def test_a_run_whose_reader_went_away_still_stops_in_good_order(workplace: Workplace):
    process = workplace.start(step=0.1)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    wait_for(lambda: workplace.steps_logged(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 130
    assert len(checkpoints(workplace.output)) >= 1 and not any(map(damage, checkpoints(workplace.output)))


def test_a_refused_run_leaves_no_folder_behind(workplace: Workplace):
    (workplace.path / "train.jsonl").write_text("{}\n")
    done = workplace.finish("--set", "output_dir=deep/er/out")
    assert done.returncode == 2 and not (workplace.path / "deep").exists()


def test_a_run_clears_what_a_killed_one_left_and_puts_back_its_final_folder(workplace: Workplace):
    assert workplace.finish().returncode == 0
    output = workplace.output
    weights = (output / "final" / "adapter_model.safetensors").read_bytes()
    (output / "final").rename(output / ".final.old-12345")  # killed between the two renames of an exchange
    for name in (".final.tmp-12345", ".checkpoint-8.tmp-12345"):
        (output / name).mkdir()
        (output / name / "half.bin").write_text("half")
    (output / ".metrics.jsonl.tmp-12345").write_text("half")
    done = workplace.finish("--resume")
    assert done.returncode == 0 and "This run is finished" in done.stdout
    assert not list(output.glob(".*"))
    assert (output / "final" / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_made_longer_is_not_finished_by_the_final_folder_of_the_shorter_one(workplace: Workplace):
    assert workplace.finish().returncode == 0
    short = (workplace.output / "final" / "adapter_model.safetensors").read_bytes()
    process = workplace.start("--resume", "--set", f"max_steps={STEPS + 2}", sync=0.1)
    wait_for(lambda: any(name.startswith(".final.tmp") for name in workplace.hidden()), process)
    process.kill()
    process.communicate()
    assert (workplace.output / "final" / "adapter_model.safetensors").read_bytes() == short
    done = workplace.finish("--resume", "--set", f"max_steps={STEPS + 2}")
    assert done.returncode == 0 and "This run is finished" not in done.stdout
    assert (workplace.output / "final" / "adapter_model.safetensors").read_bytes() != short


def test_a_resume_with_another_chat_template_is_refused_and_says_tokenizer(workplace: Workplace, tiny_model: Path):
    model = Path(shutil.copytree(tiny_model, workplace.path / "model"))
    named = ("--set", "model_name_or_path=model")
    assert workplace.finish(*named).returncode == 0
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# harmless #}")
    longer = ("--resume", "--set", f"max_steps={STEPS + 2}")
    done = workplace.finish(*named, *longer)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\n  tokenizer: chat_template.jinja is not that of the checkpoint\n" in done.stderr
    assert workplace.finish(*named, *longer, "--allow-changed").returncode == 0


def test_a_checkpoint_too_many_of_a_killed_save_goes_when_the_run_ends(workplace: Workplace):
    limit = ("--set", "save_total_limit=2")
    assert workplace.finish("--set", "save_total_limit=3").returncode == 0
    shutil.rmtree(workplace.output / "final")  # as if killed after the last save, before anything else
    assert len(checkpoints(workplace.output)) == 3
    assert workplace.finish(*limit, "--resume").returncode == 0
    assert [path.name for path in checkpoints(workplace.output)] == ["checkpoint-6", "checkpoint-4"]
