"""Every verb takes an adapter that mlx-lm wrote: it is trained on, scored and talked with, on both engines."""

import io
import json
import types
from pathlib import Path

import mlx_lm.lora
import numpy as np
import pytest
from engines import DEVICE, ENGINES
from made_adapters import TOKENS, assert_same, imported_logits, mlx_logits, mlx_model, save_mlx
from mlx_lm.tuner.utils import load_adapters
from rich.console import Console
from tiny_tokenizer import CORPUS

from common import launch
from common.config import TrainConfig
from common.errors import UserError
from common.evaluate.beside_base import evaluate_adapter
from common.export.export import Request, export
from common.talk import speaker as talk
from mlx_backend.model import choose_device

ON_BOTH = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(autouse=True)
def on_the_same_device() -> None:
    choose_device(DEVICE)


def texts(directory: Path) -> Path:
    directory.mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": text}) for text in CORPUS]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def run_config(model: Path, folder: Path, **settings: object) -> TrainConfig:
    ids = [np.random.default_rng(seed).integers(1, 360, 12).tolist() for seed in range(4)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": each, "labels": each}) + "\n" for each in ids))
    values = {
        "model_name_or_path": str(model),
        "output_dir": str(folder / "out"),
        "data": {"train": str(data), "test": str(data)},
        "device": DEVICE,
        "dtype": "float32",
        "max_steps": 2,
        "learning_rate": 1e-2,
    }
    return TrainConfig.from_dict(values | settings)


def train(config: TrainConfig, resume: str | None = None) -> str:
    printed = io.StringIO()
    launch.train(config, launch.Request("config.json", resume), Console(file=printed, width=300))
    return printed.getvalue()


def trained_by_mlx_lm(model: Path, folder: Path) -> Path:
    """Let mlx-lm's own trainer make an adapter of the last layer; returns its folder."""
    wanted = {
        "model": str(model),
        "data": str(texts(folder / "texts")),
        "train": True,
        "num_layers": 1,
        "batch_size": 2,
        "iters": 4,
        "val_batches": 1,
        "learning_rate": 1e-2,
        "adapter_path": str(folder / "adapters"),
        "lora_parameters": {"rank": 6, "dropout": 0.0, "scale": 2.5},
    }
    mlx_lm.lora.run(types.SimpleNamespace(**(mlx_lm.lora.CONFIG_DEFAULTS | wanted)))
    return folder / "adapters"


def test_an_adapter_trained_by_mlx_lm_goes_on_here_on_torch_and_back_in_mlx_lm(tiny_model, tmp_path):
    given = trained_by_mlx_lm(tiny_model, tmp_path)
    base, theirs = mlx_model(tiny_model), load_adapters(mlx_model(tiny_model), str(given))
    assert_same(imported_logits("torch", tiny_model, given), mlx_logits(theirs), mlx_logits(base))

    lora = {"r": 6, "lora_alpha": 15, "layers_to_transform": [1]}
    config = run_config(tiny_model, tmp_path, engine="torch", lora=lora, adapter_name_or_path=str(given))
    assert f"Starting from the weights of {given}" in train(config)
    final = tmp_path / "out" / "final"
    export(Request(final, tmp_path / "back", "mlx", engine="torch"), Console(quiet=True))
    back = mlx_logits(load_adapters(mlx_model(tiny_model), str(tmp_path / "back" / "mlx")))
    assert np.abs(back - mlx_logits(theirs)).max() > 0.1, "it was not trained any further"
    assert_same(imported_logits("torch", tiny_model, final), back, mlx_logits(base))


@ON_BOTH
def test_an_adapter_of_mlx_lm_is_resumed_and_one_of_its_last_layers_offers_what_to_write(engine, tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path / "given", num_layers=1)
    lora = {"r": 4, "lora_alpha": 12}
    with pytest.raises(UserError) as error:
        train(run_config(tiny_model, tmp_path, engine=engine, lora=lora), resume=str(tmp_path / "given"))
    assert str(error.value) == (
        f"{tmp_path / 'given'}: has no weights for model.layers.0.mlp.down_proj (6 more), unlike the config; "
        "write lora.layers_to_transform: [1]"
    )
    lora |= {"layers_to_transform": [1]}
    printed = train(run_config(tiny_model, tmp_path, engine=engine, lora=lora), resume=str(tmp_path / "given"))
    assert f"Starting from the weights of {tmp_path / 'given'}" in printed


def test_other_modules_of_an_mlx_adapter_are_said_as_the_config_wants_them(tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path / "given", num_layers=1, keys=["self_attn.q_proj"])
    config = run_config(
        tiny_model, tmp_path, engine="torch", lora={"r": 4, "lora_alpha": 12, "target_modules": "k_proj"}
    )
    with pytest.raises(UserError, match="matches no linear module"):
        train(config, resume=str(tmp_path / "given"))
    lora = {"r": 4, "lora_alpha": 12, "target_modules": ["k_proj"]}
    with pytest.raises(UserError) as error:
        train(run_config(tiny_model, tmp_path, engine="torch", lora=lora), resume=str(tmp_path / "given"))
    assert str(error.value).endswith('write lora.target_modules: ["self_attn.q_proj"], lora.layers_to_transform: [1]')


def test_a_start_from_a_part_of_the_base_and_one_from_an_adapter_are_one_too_many(tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path / "given")
    lora = {"r": 4, "lora_alpha": 12, "init_lora_weights": "pissa"}
    with pytest.raises(UserError, match=r"lora\.init_lora_weights: pissa: the run begins from an adapter"):
        train(run_config(tiny_model, tmp_path, engine="torch", lora=lora), resume=str(tmp_path / "given"))


@ON_BOTH
def test_evaluate_scores_an_adapter_of_mlx_lm_and_chat_finds_its_base(engine, tiny_model, tmp_path):
    expected = save_mlx(tiny_model, tmp_path / "given", num_layers=1)
    config = run_config(tiny_model, tmp_path, engine=engine)
    console = Console(file=io.StringIO())
    scores = evaluate_adapter(config, tmp_path / "given", [], console)
    assert abs(scores["adapter"]["loss"] - scores["base"]["loss"]) > 0.01
    speaker = talk.open_model(None, tmp_path / "given", engine, DEVICE)
    assert_same(speaker.engine.logits(TOKENS), expected, mlx_logits(mlx_model(tiny_model)))
