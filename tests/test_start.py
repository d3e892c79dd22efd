"""A run that begins from an adapter made by somebody else: its weights, and nothing else of it."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import DEVICE, ENGINES
from rich.console import Console

from common import launch
from common.adapters.adapter import read_adapter
from common.config import TrainConfig
from common.errors import Interrupted, UserError
from common.runs.checkpoint import load_checkpoint
from common.runs.start import is_plain_adapter, read_start
from common.view.metrics import read_metrics

MODULES = ["q_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 12, "target_modules": MODULES}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model that PEFT drew at random, B too, and wrote."""
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapter"), seed=5)


def write_adapter(model: Path, directory: Path, seed: int) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    lora = LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(directory)
    return directory


def examples() -> list[list[int]]:
    return [[int(token) for token in np.random.default_rng(seed).integers(1, 360, 12)] for seed in range(8)]


@pytest.fixture
def train(tmp_path: Path, tiny_model: Path) -> Callable[..., str]:
    """Run a training in this process, in out/; returns what it printed."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in examples()))

    def run(resume: str | None = None, **settings: object) -> str:
        base = {
            "model_name_or_path": str(tiny_model),
            "output_dir": str(tmp_path / "out"),
            "data": {"train": str(data)},
            "lora": LORA,
            "device": DEVICE,
            "dtype": "float32",
            "max_steps": 2,
            "save_steps": 1,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 8,
        }
        printed = io.StringIO()
        request = launch.Request("config.json", resume, resume_command="twintune train --resume")
        launch.train(TrainConfig.from_dict(base | settings), request, Console(file=printed, width=300))
        return printed.getvalue()

    return run


def loss_by_peft(model: Path, adapter: Path) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    ids = torch.tensor(examples())
    with torch.no_grad():
        return float(tuned(input_ids=ids, labels=ids).loss)


def refused(train: Callable[..., str], *arguments: object, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        train(*arguments, **settings)
    return str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_begins_with_the_weights_that_peft_wrote_and_zero_moments(train, tmp_path, tiny_model, adapter, engine):
    printed = train(engine=engine, adapter_name_or_path=str(adapter), learning_rate=1e-12)
    assert f"Starting from the weights of {adapter}; its optimizer state and position are not known" in printed
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    # Two float32 implementations of one small model.
    assert rows[0]["loss"] == pytest.approx(loss_by_peft(tiny_model, adapter), rel=1e-4)
    state, _ = load_checkpoint(tmp_path / "out" / "checkpoint-1")
    given, _ = read_adapter(adapter)
    assert state.update_count == 1 and state.weights.keys() == given.keys()
    # A step of 1e-12 is lost in the rounding of weights of about 0.1; near zero it is not.
    assert all(np.allclose(state.weights[key], given[key], rtol=0, atol=2e-12) for key in given)
    assert any(state.moment1[key].any() for key in given)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_adapter_to_resume_is_the_same_as_one_named_in_the_config(train, tmp_path, adapter, engine):
    train(engine=engine, adapter_name_or_path=str(adapter), output_dir=str(tmp_path / "named"))
    printed = train(str(adapter), engine=engine)
    assert f"Starting from the weights of {adapter}" in printed
    one, other = ((tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("named", "out"))
    assert one == other
    config = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert config["adapter_name_or_path"] == str(adapter)


def test_a_run_that_began_from_an_adapter_goes_on_as_if_nothing_had_been(train, tmp_path, adapter):
    named = {"adapter_name_or_path": str(adapter), "engine": "torch"}
    train(**named, max_steps=4, output_dir=str(tmp_path / "whole"))
    train(**named, max_steps=2)
    assert "Resuming" in train("auto", **named, max_steps=4)
    one, other = ((tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other


def test_a_resume_with_other_first_weights_is_refused_wherever_they_lie(train, tmp_path, tiny_model, adapter):
    train(engine="torch", adapter_name_or_path=str(adapter))
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    train("auto", engine="torch", adapter_name_or_path=str(moved), max_steps=3)
    other = write_adapter(tiny_model, tmp_path / "other", seed=6)
    for name in (str(other), None):
        message = refused(train, "auto", engine="torch", adapter_name_or_path=name, max_steps=4)
        assert f"\n  adapter_name_or_path: its weights are not those the run began from, of {moved}\n" in message


def test_the_command_that_continues_such_a_run_names_the_adapter(adapter):
    request = launch.Request("c", str(adapter), resume_command="twintune train -c c --resume")
    changed = request.without_adapter()
    expected = f"twintune train -c c --resume --set adapter_name_or_path={adapter}"
    assert changed == replace(request, resume=None, resume_command=expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_modules_than_the_configs_are_refused_with_what_to_write(train, adapter, engine):
    named = {"adapter_name_or_path": str(adapter), "engine": engine}
    message = refused(train, **named, lora={"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"]})
    assert message == (
        f"{adapter}: also has weights for model.layers.0.mlp.down_proj (1 more), unlike the config; "
        'write lora.target_modules: ["down_proj", "q_proj"]'
    )
    message = refused(train, **named, lora={"r": 4, "lora_alpha": 12})
    assert message.startswith(f"{adapter}: has no weights for model.layers.0.mlp.gate_proj (9 more), unlike the config")


def test_rank_and_scale_must_be_the_configs(train, adapter, tmp_path):
    lora = {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": MODULES}
    assert refused(train, adapter_name_or_path=str(adapter), lora=lora).splitlines() == [
        f"{adapter}: is not the adapter that the config describes:",
        "  lora.r: 8; the adapter has 4: write that",
        "  lora.lora_alpha: 16; the adapter has 12: write that",
        "  lora.use_rslora: true; the adapter has false: write that",
    ]
    assert not (tmp_path / "out").exists()


def test_dropout_and_the_order_of_modules_are_free(train, adapter):
    lora = LORA | {"lora_dropout": 0.1, "target_modules": MODULES[::-1]}
    assert "Starting from the weights" in train(adapter_name_or_path=str(adapter), lora=lora, engine="torch")


def test_an_adapter_of_another_base_is_refused(train, adapter, tmp_path):
    from tiny_models import write_llama

    wide = write_llama(tmp_path / "wide", hidden_size=64)
    message = refused(train, adapter_name_or_path=str(adapter), model_name_or_path=str(wide), engine="torch")
    assert "has shape (48, 4); expected (64, 4)" in message or "has shape (4, 48); expected (4, 64)" in message


@pytest.mark.parametrize(
    ("name", "advice"),
    [("nosuch", "adapter"), ("someone/adapter", "hf download someone/adapter --local-dir adapters/adapter")],
)
def test_an_adapter_that_is_not_here_is_named(name, advice):
    with pytest.raises(UserError) as error:
        read_start(TrainConfig(adapter_name_or_path=name))
    message = str(error.value)
    assert message.startswith(f"adapter_name_or_path: {name}: no such folder; expected that of an adapter")
    assert message.endswith(advice)


def test_a_folder_that_is_no_adapter_is_named(train, tmp_path):
    assert "has no adapter_config.json" in refused(train, adapter_name_or_path=str(tmp_path))


def test_two_adapters_to_begin_from_are_one_too_many(train, adapter, tmp_path):
    message = refused(train, str(adapter), adapter_name_or_path=str(tmp_path / "other"))
    assert message.startswith(f"--resume {adapter}: an adapter without optimizer state, to begin from; but the config")


def test_a_folder_with_a_run_is_not_begun_anew_from_an_adapter(train, adapter):
    train(engine="torch", adapter_name_or_path=str(adapter))
    assert "already holds this run; continue it with --resume" in refused(train, str(adapter), engine="torch")


@pytest.mark.parametrize("name", ["trainer_state.json", "manifest.json"])
def test_a_checkpoint_is_no_plain_adapter_even_if_damaged_or_of_another_trainer(train, adapter, tmp_path, name):
    folder = Path(shutil.copytree(adapter, tmp_path / "checkpoint-4"))
    assert is_plain_adapter(str(folder))
    (folder / name).write_text("{}")
    assert not is_plain_adapter(str(folder)) and not is_plain_adapter("auto") and not is_plain_adapter(None)
    message = refused(train, str(folder), engine="torch")
    if name == "trainer_state.json":
        assert message.endswith(f"; to begin with its weights alone, write adapter_name_or_path: {folder}")
    else:
        assert "checkpoint-4: damaged: manifest.json does not name" in message


def test_an_interrupted_run_tells_how_to_go_on_from_its_adapter(train, adapter, monkeypatch):
    from common.trainer import Trainer

    def stopped(trainer: Trainer, progress: object) -> bool:
        return False

    monkeypatch.setattr(Trainer, "run", stopped)
    with pytest.raises(Interrupted, match=f"--resume --set adapter_name_or_path={adapter}$"):
        train(str(adapter), engine="torch")
