"""Every wrong turn of the command line, as a first user takes it.

It ends in one message on stderr, an exit code, no traceback, and a disk as it was. Each command is a process of its
own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workplace import ENGINES, STEPS, FinishedRun, Workplace, rows

from common.adapters.adapter import read_adapter
from common.base.hub import resolve_model
from common.errors import UserError
from common.runs.checkpoint import checkpoints, damage


@pytest.fixture
def model(tiny_model: Path, workplace: Workplace) -> Path:
    """A copy of the tiny model that a test may break, in the place the config names."""
    workplace.write_config(model_name_or_path="model")
    return Path(shutil.copytree(tiny_model, workplace.path / "model"))


# Wrong options and configs


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train", "--confg", "x"], ["train"], ["chat", "--temperature", "-1"]]
)
def test_wrong_options_show_the_usage(workplace: Workplace, arguments: list[str]):
    done = workplace.run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Usage: twintune") and "\nError: " in done.stderr


def test_a_missing_config_is_named(workplace: Workplace):
    message = workplace.refused("train", "--config", "nosuch.yaml")
    assert message.startswith(f"nosuch.yaml: no such file (looked from {workplace.path})")


def test_everything_wrong_with_a_config_is_said_at_once(workplace: Workplace):
    workplace.write_config(warmup_stepz=4, fp16=True, bf16=True, lora={"r": "8", "alpha": 3}, max_steps=2.5)
    lines = workplace.refused("train", "-c", "config.json", "--set", "learning_rat=1").splitlines()
    assert sorted(lines) == [
        "--set learning_rat=1: unknown key; did you mean learning_rate?",
        "config.json: bf16: found true, which contradicts fp16: true; keep one of them",
        "config.json: lora.alpha: unknown key; did you mean lora.lora_alpha?",
        'config.json: lora.r: found "8"; expected an integer of at least 1; write e.g. r: 16',
        "config.json: max_steps: found 2.5; expected an integer of at least -1; write e.g. max_steps: -1",
        "config.json: warmup_stepz: unknown key; did you mean warmup_steps?",
    ]


@pytest.mark.parametrize("option", ["learning_rate", "=1", "lora=8", "lora.r=[", "lora..r=1"])
def test_a_bad_override_is_shown_with_a_good_one(workplace: Workplace, option: str):
    assert workplace.refused("train", "-c", "config.json", "--set", option).startswith(f"--set {option}: ")


def test_a_config_without_model_and_data_lists_both(workplace: Workplace):
    (workplace.path / "empty.yaml").write_text("seed: 1\n")
    for verb in ("train", "preview"):
        message = workplace.refused(verb, "--config", "empty.yaml")
        assert "model_name_or_path: missing" in message and "data.train: missing" in message


# Wrong data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl: the file holds no examples"),
        ("\n\n", "train.jsonl: the file holds no examples"),
        ('{"text": "a b"}\n{"text": \n', "train.jsonl:2: no JSON: "),
        ('{"messages": [{"role": "user", "content": "a"}]}', "train.jsonl:1: has no answer"),
        ('{"prompt": "a", "completion": " "}', "train.jsonl:1: 'completion' is empty"),
        ('{"question": "a"}', "train.jsonl:1: has none of 'input_ids', 'messages', "),
    ],
    ids=["empty", "blank", "no-json", "no-answer", "empty-answer", "other-keys"],
)
def test_bad_data_is_named_by_file_and_line(workplace: Workplace, content: str, message: str):
    (workplace.path / "train.jsonl").write_text(content)
    assert workplace.refused("train", "-c", "config.json").startswith(message)


def test_a_missing_data_file_is_named(workplace: Workplace):
    assert workplace.refused("train", "-c", "config.json", "--set", "data.test=x.jsonl").startswith("x.jsonl: no such")


# Wrong models


def test_a_model_folder_without_weights_is_refused(workplace: Workplace, model: Path):
    (model / "model.safetensors").unlink()
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model: the folder has no weights; expected model.safetensors")


def test_a_truncated_weight_file_is_refused(workplace: Workplace, model: Path):
    os.truncate(model / "model.safetensors", 100_000)
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model/model.safetensors: truncated: 100,000 bytes, its header promises ")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_broken_file_of_the_model_is_named(workplace: Workplace, model: Path, name: str):
    (model / name).write_text("{% if %}" if name.endswith("jinja") else '{"model_type": ')
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model: the chat template" if name.endswith("jinja") else f"model/{name}: ")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unknown_architecture_is_refused(workplace: Workplace, model: Path, engine: str):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nosuch", "architectures": ["Nosuch"]}))
    message = workplace.refused("train", "-c", "config.json", "--engine", engine)
    assert message.startswith(f"model: the {'MLX' if engine == 'mlx' else engine} engine can't load this model")
    assert "model_type nosuch" in message


def test_a_tokenizer_of_another_model_is_refused(workplace: Workplace, model: Path):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][0] | {"id": 416, "content": "<|new|>"}
    tokenizer["added_tokens"].append(added)
    tokenizer["model"]["vocab"] |= {f"<|{i}|>": i for i in range(len(tokenizer["model"]["vocab"]), 416)}
    tokenizer["model"]["vocab"]["<|new|>"] = 416
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (workplace.path / "train.jsonl").write_text('{"text": "hello <|new|>"}\n')
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model: its tokenizer makes token 416, its model knows only 0 to 415")


def test_a_model_name_that_is_nothing_is_refused(workplace: Workplace):
    message = workplace.refused("train", "-c", "config.json", "--set", "model_name_or_path=nosuch")
    assert message.startswith("model_name_or_path: nosuch: no such folder; expected a local model folder or a Hub name")
    with pytest.raises(UserError, match="no such folder"):
        resolve_model("nosuch")


# Wrong places


def test_another_config_in_the_same_folder_is_refused_with_the_differences(finished: FinishedRun):
    message = finished.workplace.refused("train", "-c", "config.json", "--resume", "--set", "lora.r=8")
    assert message.startswith("output_dir: out already holds a run of another config:\n  lora.r: 4 -> 8\n")


def test_training_again_without_resume_is_refused(finished: FinishedRun):
    message = finished.workplace.refused("train", "-c", "config.json", "--engine", finished.engine)
    assert message.startswith("output_dir: out already holds this run; continue it with --resume")


@pytest.mark.parametrize("output", ["train.jsonl", "train.jsonl/run"])
def test_an_output_that_is_a_file_is_refused(workplace: Workplace, output: str):
    message = workplace.refused("train", "-c", "config.json", "--set", f"output_dir={output}")
    assert f"{workplace.path / 'train.jsonl'} is a file; expected a folder" in message


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory with the given options; skips where that isn't allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"can't mount a small disk here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_a_read_only_output_is_refused(workplace: Workplace, mounted: Callable[[str], Path]):
    disk = mounted("ro")
    message = workplace.refused("train", "-c", "config.json", "--set", "output_dir=disk/run")
    assert message.startswith(f"output_dir: disk/run: {disk} can't be written")


def test_a_full_disk_leaves_the_earlier_checkpoints_good(workplace: Workplace, mounted: Callable[[str], Path]):
    disk = mounted("size=1m")
    many = ["--engine", "mlx", "--set", "save_steps=1", "--set", "save_total_limit=100", "--set", "data.test=[]"]
    done = workplace.train(*many, "--set", "output_dir=disk/run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    saved = checkpoints(disk / "run")
    first = disk / "run" / f"checkpoint-{len(saved) + 1}"
    assert f"step {len(saved) + 1} is not saved: {first}: the disk is full: " in done.stdout
    assert [row["step"] for row in rows(disk / "run")] == list(range(1, STEPS + 1))  # training went on
    assert done.stderr.startswith(f"error: {disk / 'run' / 'final'}: the disk is full: ")
    assert f"checkpoint-{len(saved)} is good: nothing is lost but the {STEPS - len(saved)} steps after" in done.stderr
    assert "Once there is room, continue with:\n  twintune train --config config.json --engine mlx" in done.stderr
    assert len(saved) > 1 and not any(map(damage, saved))
    assert not [path for path in disk.rglob("*") if path.name.startswith(".") or path.name == "final"]

    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    resumed = workplace.train(*many, "--set", "output_dir=disk/run", "--set", f"max_steps={len(saved) + 2}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resuming disk/run/checkpoint-{len(saved)} after step {len(saved)}" in resumed.stdout


def test_resume_from_what_is_no_checkpoint_is_refused(workplace: Workplace):
    for where in ("nosuch", "."):
        message = workplace.refused("train", "-c", "config.json", "--resume", where)
        assert message.startswith(f"--resume {where}: no checkpoint; expected a folder such as out/checkpoint-40")


# Wrong adapters


@pytest.fixture
def adapter(finished: FinishedRun, tmp_path: Path) -> Path:
    """A copy of a finished adapter that a test may break."""
    return Path(shutil.copytree(finished.output / "final", tmp_path / "adapter"))


@pytest.mark.parametrize("finished", ["mlx"], indirect=True)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", None, "adapter: has no adapter_config.json"),
        ("adapter_config.json", "{", "adapter/adapter_config.json: no JSON"),
        (
            "adapter_config.json",
            '{"peft_type": "IA3"}',
            "adapter/adapter_config.json: has peft_type 'IA3', which is no LoRA adapter",
        ),
        ("adapter_model.safetensors", None, "adapter: has no adapter_model.safetensors"),
        ("adapter_model.safetensors", "short", "adapter/adapter_model.safetensors: no safetensors file"),
    ],
)
def test_a_broken_adapter_is_named(workplace: Workplace, adapter: Path, name: str, content: str | None, message: str):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_text(content)
    assert workplace.refused("generate", "--adapter", "adapter", "--prompt", "x").startswith(message)
    if name == "adapter_config.json":
        assert workplace.refused("evaluate", "-c", "config.json", "--adapter", "adapter").startswith(message)


@pytest.mark.parametrize("finished", ["mlx"], indirect=True)
def test_a_missing_tensor_is_named(workplace: Workplace, adapter: Path):
    from safetensors.numpy import save_file

    weights, _ = read_adapter(adapter)
    missing = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != missing}, adapter / "adapter_model.safetensors")
    message = workplace.refused("generate", "--adapter", "adapter", "--prompt", "x", "--engine", "mlx")
    assert message.startswith(f"adapter: lacks {missing}")


def test_generate_without_a_model_says_what_to_name(workplace: Workplace):
    assert workplace.refused("generate", "--prompt", "x").startswith("--model: missing; name a model folder")


# Machines that can't


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_that_is_not_there_is_refused_as_the_machines_fault(workplace: Workplace, engine: str):
    if has_cuda(engine):
        pytest.skip("there is a CUDA device here")
    message = workplace.refused("train", "-c", "config.json", "--engine", engine, "--device", "cuda", code=3)
    assert message.startswith("device: cuda: ")


def has_cuda(engine: str) -> bool:
    if engine == "torch":
        import torch

        return torch.cuda.is_available()
    import mlx.core as mx

    return mx.cuda.is_available()


@pytest.mark.parametrize(("engine", "extra"), [("mlx", "mlx"), ("torch", "cuda")])
def test_an_engine_that_is_not_installed_is_refused_with_what_installs_it(
    workplace: Workplace, engine: str, extra: str
):
    """A None in sys.modules is Python's own way to say that a module can't be found."""
    command = ["twintune", "train", "-c", "config.json", "--engine", engine]
    code = f"import sys; sys.modules['{engine}'] = None; sys.argv = {command}; from common.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace.path, env=workplace.environment, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: engine {engine}: {engine} is not installed in this environment")
    assert f"pip install 'twintune[{extra}]'" in done.stderr and done.stderr.count("\n") == 1
