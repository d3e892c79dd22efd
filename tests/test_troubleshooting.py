"""What README.md's table of the notes' troubles says of this program, where no other test holds it to that."""

import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE
from published_models import MODELS, published_shape

from common.batches import BatchPlan
from common.config import TrainConfig, load_config
from common.data.chat import ChatTokenizer
from common.data.dataset import load_training
from common.engine import DeviceMemory, choose_engine, is_out_of_memory
from common.estimate.guard import total_bytes
from common.estimate.workload import Workload
from common.runs.checkpoint import checkpoints, damage
from common.view.status import look, status_of

ROOT = Path(__file__).parent.parent


def line(words: int) -> str:
    messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it is " * words}]
    return json.dumps({"messages": messages}) + "\n"


def seed_for_the_longest_row_at(step: int, config: TrainConfig, model: Path) -> int:
    """Find a seed that puts the longest example into this step, the last one."""
    data = load_training(config, ChatTokenizer(model))[0]
    for seed in range(99):
        plan = BatchPlan.of(data, config.model_copy(update={"seed": seed}))
        lengths = [plan.step_batch(each).micro_batches[0].token_ids.shape[1] for each in range(1, step + 1)]
        if max(lengths) == lengths[-1]:
            return seed
    raise AssertionError("no such seed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")
def test_a_run_that_runs_out_of_memory_says_where_and_how_to_go_on(tmp_path, llama, cli_environment, monkeypatch):
    """The limit comes from outside, while the run goes on, as when another program takes the memory."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(line(1) * 39 + line(700))
    settings = {"model_name_or_path": str(llama), "output_dir": "out", "engine": "torch", "device": "cpu"}
    settings |= {"data": {"train": "train.jsonl"}, "max_seq_length": 4096, "max_steps": 5, "save_steps": 1}
    seed = seed_for_the_longest_row_at(5, TrainConfig.from_dict(settings), llama)
    Path("c.json").write_text(json.dumps(settings | {"seed": seed}))
    command = [sys.executable, "-m", "common.cli", "train", "--config", "c.json"]
    run = subprocess.Popen(command, env=cli_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not checkpoints(Path("out")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)
    process = psutil.Process(run.pid)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 20_000_000, psutil.RLIM_INFINITY))
    _, message = run.communicate(timeout=PATIENCE)
    assert run.returncode == 3 and "Traceback" not in message, message
    assert "step 5: memory ran out with 8 x " in message and "GB are free now" in message
    assert "out/checkpoint-4 is good, continue from it with --resume" in message
    assert message.partition("What avoids it:\n")[2].count("\n  ") == 2, "three settings, then where to read more"
    assert damage(Path("out/checkpoint-4")) is None
    status = status_of(look(Path("out")))
    assert status.state == "failed" and status.message is not None and status.message in message


def test_out_of_memory_on_mps_is_recognised_by_its_text():
    text = "MPS backend out of memory (MPS allocated: 17.97 GB, other allocations: 128 KB, max allowed: 18.13 GB)."
    assert is_out_of_memory("torch", RuntimeError(text))
    assert not is_out_of_memory("torch", RuntimeError("The operator 'aten::x' is not implemented for the MPS device"))


def test_auto_takes_mlx_on_a_mac_whatever_else_is_installed(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert all(map(importlib.util.find_spec, ("mlx", "torch"))) and choose_engine("auto") == "mlx"


def test_of_the_notes_remedies_for_memory_only_those_that_help_are_proposed():
    """Accumulating fewer micro-batches saves nothing; checkpointing switched off costs more."""
    config = load_config(ROOT / "configs/apple_silicon_config.json")
    shape = published_shape(next(model for model in MODELS if model.name == config.model_name_or_path))
    mac = DeviceMemory("metal", "a Mac", 10**10)

    def size(**changes: object) -> int:
        return total_bytes(shape, Workload(), "mlx", mac, config.model_copy(update=changes))

    assert size(gradient_accumulation_steps=4) == size()
    assert size(gradient_checkpointing=False) > size()
    assert size(max_seq_length=1024) < size()
    assert size(lora=config.lora.model_copy(update={"r": 8})) < size()
    assert size(fp16=True) < 0.6 * size()
