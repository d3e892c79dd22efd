"""Adapters made by PEFT and by mlx-lm themselves, with random weights, B too; the logits they compute, and ours."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import peft
import torch
from engines import open_fresh
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM

from common.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, fitted_weights, lora_of, read_adapter
from common.adapters.files import MLX_WEIGHTS_NAME
from common.engine import Array, TrainState

TOKENS = np.random.default_rng(7).integers(1, 400, (2, 11)).astype(np.int32)
NAMES = ["q_proj", "down_proj"]
ROUNDING = 2e-5  # float32 sums in another order, relative to the largest logit


def base_model(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def peft_logits(model: torch.nn.Module) -> Array:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()


def peft_model(model: Path, name: str = "default", **settings: object) -> peft.PeftModel:
    """Wrap a model in an adapter that PEFT draws at random, B too."""
    torch.manual_seed(3)
    lora = {"r": 4, "lora_alpha": 12, "target_modules": NAMES, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    tuned = peft.get_peft_model(base_model(model), peft.LoraConfig(**(lora | settings)), adapter_name=name)
    for key, value in tuned.named_parameters():
        if "magnitude" in key or "modules_to_save" in key:
            value.data *= 1.25
    return tuned.eval()


def edit(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((directory / CONFIG_NAME).read_text())
    change(config)
    (directory / CONFIG_NAME).write_text(json.dumps(config))


def save_raw(model: torch.nn.Module, directory: Path, words: tuple[str, ...] = ("lora_",)) -> None:
    """Put a plain state dict in the place of the weights that PEFT saved, as hand-written loops do."""
    state = {key: value for key, value in model.state_dict().items() if any(word in key for word in words)}
    save_torch({key: value.clone() for key, value in state.items()}, directory / WEIGHTS_NAME)


def rename(directory: Path, change: Callable[[str], str]) -> None:
    save_file(
        {change(key): value for key, value in load_file(directory / WEIGHTS_NAME).items()}, directory / WEIGHTS_NAME
    )


def mlx_model(model: Path) -> object:
    return load_model(model, lazy=False)[0]


def mlx_logits(model: object) -> Array:
    return np.array(model(mx.array(TOKENS)))


def save_mlx(
    model: Path, directory: Path, num_layers: int = -1, fine_tune_type: str = "lora", **parameters: object
) -> Array:
    """Let mlx-lm adapt a model and write its files, B random too; returns its logits."""
    tuned = mlx_model(model)
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0} | parameters
    mx.random.seed(5)
    tuned.freeze()
    linear_to_lora_layers(tuned, num_layers, parameters, use_dora=fine_tune_type == "dora")

    def drawn(path: str, value: mx.array) -> mx.array:
        return value * 1.25 if path.endswith(".m") else mx.random.normal(value.shape) * 0.2

    tuned.update(tree_map_with_path(drawn, tuned.trainable_parameters()))
    config = {"model": str(model), "num_layers": num_layers, "fine_tune_type": fine_tune_type, "train": True}
    directory.mkdir(exist_ok=True)
    save_config(config | {"lora_parameters": parameters}, directory / CONFIG_NAME)
    mx.save_safetensors(str(directory / MLX_WEIGHTS_NAME), dict(tree_flatten(tuned.trainable_parameters())))
    return mlx_logits(tuned)


def imported_logits(engine: str, model: Path, adapter: Path) -> Array:
    """Compute with an adapter as every verb does."""
    weights, config = read_adapter(adapter)
    opened = open_fresh(engine, model, lora_of(config, adapter))
    opened.load_state(TrainState.fresh(fitted_weights(weights, opened, adapter)))
    return opened.logits(TOKENS)


def assert_same(found: Array, expected: Array, base: Array) -> None:
    assert np.abs(expected - base).max() > 0.1, "the adapter does nothing, so this test can't fail"
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())
