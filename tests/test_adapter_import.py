"""Adapters that PEFT and mlx-lm wrote, read here: the logits are theirs on both engines, whatever the files' quirks."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from engines import DEVICE, ENGINES
from made_adapters import (
    NAMES,
    assert_same,
    base_model,
    edit,
    imported_logits,
    mlx_logits,
    mlx_model,
    peft_logits,
    peft_model,
    rename,
    save_mlx,
    save_raw,
)
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_models import write_llama

from common.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, lora_of, read_adapter
from common.adapters.files import MLX_WEIGHTS_NAME
from common.base.weights import rope_in_both_forms
from common.engine import Array
from common.errors import UserError
from common.lora import lora_a_key, magnitude_key
from common.runs.start import is_plain_adapter
from mlx_backend.model import choose_device

ON_BOTH = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(autouse=True)
def on_the_same_device() -> None:
    choose_device(DEVICE)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose q_proj is 16 x 16, as an adapter of rank 16 is too: no shape tells which way round it lies."""
    shape = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    directory = write_llama(tmp_path_factory.mktemp("square"), head_dim=16, **shape)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | rope_in_both_forms(config)))
    return directory


# --- PEFT


MEMBERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 30}},
    "a head, with the base's own weights beside it": {"target_modules": ["q_proj", "lm_head"]},
    "modules trained whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "an expression": {
        "target_modules": r"(?:.*?(?:language|text).*?q_proj)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up_proj)"
    },
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj"]},
    "another name": {"name": "mine"},
}


@ON_BOTH
@pytest.mark.parametrize("settings", MEMBERS.values(), ids=MEMBERS)
def test_what_peft_saves_computes_the_same_here(engine, settings, tiny_model, tmp_path):
    tuned = peft_model(tiny_model, **settings)
    tuned.save_pretrained(tmp_path)
    saved = tmp_path / settings["name"] if "name" in settings else tmp_path
    assert_same(imported_logits(engine, tiny_model, saved), peft_logits(tuned), peft_logits(base_model(tiny_model)))


@ON_BOTH
def test_a_square_adapter_of_peft_is_not_transposed(engine, square, tmp_path):
    tuned = peft_model(square, r=16, target_modules=["q_proj"])
    tuned.save_pretrained(tmp_path)
    assert {value.shape for value in load_file(tmp_path / WEIGHTS_NAME).values()} == {(16, 16)}
    assert_same(imported_logits(engine, square, tmp_path), peft_logits(tuned), peft_logits(base_model(square)))


@ON_BOTH
def test_a_trained_matrix_that_is_embedding_and_head_is_read_once(engine, tied_llama, tmp_path):
    tuned = peft_model(tied_llama, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    tuned.save_pretrained(tmp_path)
    found = imported_logits(engine, tied_llama, tmp_path)
    assert_same(found, peft_logits(tuned), peft_logits(base_model(tied_llama)))


def wrap_layers(model: peft.PeftModel) -> torch.nn.Module:
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)  # names it anew, and compiles nothing before it is called
    return model


RAW = {
    "a state dict": lambda model, path: save_raw(model, path),
    "of torch.compile": lambda model, path: save_raw(torch.compile(model), path),
    "of compiled layers": lambda model, path: save_raw(wrap_layers(model), path),
    "of DataParallel": lambda model, path: save_raw(torch.nn.DataParallel(model), path),
    "wrapped twice": lambda model, path: rename(path, lambda key: "base_model.model." + key),
    "of FSDP": lambda model, path: rename(
        path, lambda key: "_fsdp_wrapped_module." + key.replace(".mlp.", ".mlp._checkpoint_wrapped_module.")
    ),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("write", RAW.values(), ids=RAW)
def test_names_that_wrappers_left_are_understood(write, use_dora, tiny_model, tmp_path):
    tuned = peft_model(tiny_model, use_dora=use_dora)
    tuned.save_pretrained(tmp_path)
    expected, config = read_adapter(tmp_path)
    names = set(load_file(tmp_path / WEIGHTS_NAME))
    write(tuned, tmp_path)
    assert names.isdisjoint(load_file(tmp_path / WEIGHTS_NAME))
    found, same = read_adapter(tmp_path)
    assert found.keys() == expected.keys() == names and same == config
    assert all((found[key] == expected[key]).all() for key in names)


@ON_BOTH
def test_a_raw_state_dict_with_modules_trained_whole_is_understood(engine, tiny_model, tmp_path):
    tuned = peft_model(tiny_model, modules_to_save=["lm_head", "input_layernorm"])
    tuned.save_pretrained(tmp_path)
    save_raw(tuned, tmp_path, ("lora_", "modules_to_save", "original_module"))
    assert "base_model.model.lm_head.original_module.weight" in load_file(tmp_path / WEIGHTS_NAME)
    assert_same(imported_logits(engine, tiny_model, tmp_path), peft_logits(tuned), peft_logits(base_model(tiny_model)))


def test_an_adapter_injected_without_peft_model_has_no_prefix_and_is_understood(tiny_model, tmp_path):
    tuned = peft_model(tiny_model)
    tuned.save_pretrained(tmp_path)
    expected, _ = read_adapter(tmp_path)
    torch.manual_seed(3)
    injected = peft.inject_adapter_in_model(
        peft.LoraConfig(**tuned.peft_config["default"].to_dict()), base_model(tiny_model)
    )
    plain = peft.get_peft_model_state_dict(injected)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in plain
    save_torch({key: value.clone() for key, value in plain.items()}, tmp_path / WEIGHTS_NAME)
    assert read_adapter(tmp_path)[0].keys() == expected.keys()


def test_the_base_copies_must_be_the_bases(tiny_model, tmp_path):
    """PEFT would quietly put them in the place of the base's weights."""
    peft_model(tiny_model, target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS_NAME)
    copy = "base_model.model.lm_head.base_layer.weight"
    save_torch({key: torch.from_numpy(value).bfloat16() for key, value in weights.items()}, tmp_path / WEIGHTS_NAME)
    imported_logits("torch", tiny_model, tmp_path)
    save_file(weights | {copy: weights[copy] * 1.1}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(UserError, match=r"lm_head\.base_layer\.weight is not the weight \(416, 48\) of this base"):
        imported_logits("torch", tiny_model, tmp_path)
    resized = np.concatenate([weights[copy], weights[copy][:3]])
    save_file(weights | {copy: resized}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(UserError, match="or on one with more tokens"):
        imported_logits("torch", tiny_model, tmp_path)


def test_a_config_of_peft_from_2023_is_read(tiny_model, tmp_path):
    tuned = peft_model(tiny_model)
    tuned.save_pretrained(tmp_path)
    kept = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout")
    old = {"enable_lora": None, "merge_weights": False, "peft_type": "LORA", "r": 4, "target_modules": NAMES}
    config = {key: json.loads((tmp_path / CONFIG_NAME).read_text())[key] for key in kept}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | old))
    base = peft_logits(base_model(tiny_model))
    assert_same(imported_logits("torch", tiny_model, tmp_path), peft_logits(tuned), base)


def test_a_missing_rank_is_that_of_every_matrix_and_a_float_alpha_is_a_number(tiny_model, tmp_path):
    peft_model(tiny_model).save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.pop("r"))
    edit(tmp_path, lambda config: config.update(lora_alpha=12.0))
    lora = lora_of(read_adapter(tmp_path)[1], tmp_path)
    assert (lora.r, lora.lora_alpha, type(lora.lora_alpha)) == (4, 12, int)
    edit(tmp_path, lambda config: config.update(lora_alpha=12.5))
    assert lora_of(read_adapter(tmp_path)[1], tmp_path).lora_alpha == 12.5


@pytest.mark.parametrize("key", ["peft_version", "qalora_group_size", "layers_pattern", "lora_dtype", "lorap_lr_ratio"])
def test_keys_that_change_nothing_may_be_anything(tiny_model, tmp_path, key):
    peft_model(tiny_model).save_pretrained(tmp_path)
    expected = lora_of(read_adapter(tmp_path)[1], tmp_path)
    edit(tmp_path, lambda config: config.update({key: "99"}))
    assert lora_of(read_adapter(tmp_path)[1], tmp_path) == expected


def test_every_key_of_this_peft_is_honoured_harmless_or_refused_and_new_ones_may_be_off(tiny_model, tmp_path):
    peft_model(tiny_model).save_pretrained(tmp_path)
    read_adapter(tmp_path)
    edit(tmp_path, lambda config: config.update(use_tomorrow=False, tomorrow_config={}))
    read_adapter(tmp_path)
    edit(tmp_path, lambda config: config.update(use_tomorrow=True, alora_invocation_tokens=[3]))
    with pytest.raises(UserError, match="uses alora_invocation_tokens, use_tomorrow, whose meaning is not known here"):
        read_adapter(tmp_path)


# --- mlx-lm


MLX_MEMBERS = {
    "all linear layers": {},
    "dora": {"fine_tune_type": "dora"},
    "the last layer": {"num_layers": 1},
    "its keys": {"keys": ["self_attn.q_proj", "mlp.down_proj"]},
    "a head as well": {"keys": ["self_attn.v_proj", "lm_head"], "num_layers": 1},
    "a scale that gives no whole alpha": {"rank": 3, "scale": 0.7},
}


@ON_BOTH
@pytest.mark.parametrize("settings", MLX_MEMBERS.values(), ids=MLX_MEMBERS)
def test_what_mlx_lm_saves_computes_the_same_here(engine, settings, tiny_model, tmp_path):
    expected = save_mlx(tiny_model, tmp_path, **settings)
    assert_same(imported_logits(engine, tiny_model, tmp_path), expected, mlx_logits(mlx_model(tiny_model)))


@ON_BOTH
def test_a_square_adapter_of_mlx_lm_is_transposed(engine, square, tmp_path):
    expected = save_mlx(square, tmp_path, rank=16, keys=["self_attn.q_proj"])
    assert {value.shape for value in load_file(tmp_path / MLX_WEIGHTS_NAME).values()} == {(16, 16)}
    assert_same(imported_logits(engine, square, tmp_path), expected, mlx_logits(mlx_model(square)))


def test_the_twin_for_mlx_beside_is_found_and_peft_files_come_first(tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path / "mlx", rank=2)
    assert is_plain_adapter(str(tmp_path))
    weights, config = read_adapter(tmp_path)
    assert weights[lora_a_key("model.layers.1.mlp.down_proj")].shape == (2, 80)
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, str(tiny_model))
    peft_model(tiny_model).save_pretrained(tmp_path)
    assert read_adapter(tmp_path)[1]["r"] == 4


def test_places_are_said_as_shortly_as_they_can_be(tiny_model, tmp_path):
    def places(**settings: object) -> tuple[object, object]:
        save_mlx(tiny_model, tmp_path, **settings)
        config = read_adapter(tmp_path)[1]
        return config["target_modules"], config["layers_to_transform"]

    keys = ["self_attn.q_proj", "mlp.up_proj"]
    assert places(keys=keys, num_layers=-1) == (sorted(keys), None)
    assert places(keys=keys, num_layers=2) == (sorted(keys), None), "the last 2 of 2: all"
    assert places(keys=keys, num_layers=1) == (sorted(keys), [1])
    uneven = ["model.layers.0.self_attn.q_proj", "mlp.up_proj"]
    assert places(keys=uneven, num_layers=1) == (
        ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
        None,
    )


def test_a_config_of_an_early_mlx_lm_is_read(tiny_model, tmp_path):
    expected = save_mlx(tiny_model, tmp_path, fine_tune_type="dora", num_layers=1)

    def as_it_was(config: dict[str, object]) -> None:
        del config["fine_tune_type"]
        config.update(use_dora=True, lora_layers=config.pop("num_layers"))

    edit(tmp_path, as_it_was)
    assert magnitude_key("model.layers.1.mlp.up_proj") in read_adapter(tmp_path)[0]
    found = imported_logits("torch", tiny_model, tmp_path)
    assert_same(found, expected, mlx_logits(mlx_model(tiny_model)))


@pytest.mark.parametrize(("alpha", "rank"), [(32, 6), (16, 12), (0.3, 3), (2.1, 3), (7, 49)])
def test_a_scale_that_is_alpha_by_rank_gives_alpha_back(alpha, rank, tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path, rank=rank, scale=alpha / rank, keys=["self_attn.q_proj"])
    assert read_adapter(tmp_path)[1]["lora_alpha"] == alpha


def test_a_missing_rank_of_mlx_lm_is_that_of_every_matrix(tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path)
    edit(tmp_path, lambda config: config["lora_parameters"].pop("rank"))
    assert read_adapter(tmp_path)[1]["r"] == 4


MLX_BREAKS = {
    "no scale": (lambda p, c: p.pop("scale"), r"lora_parameters\.scale: found None; .* it can't be told"),
    "a scale of zero": (lambda p, c: p.update(scale=0), r"scale: found 0; expected a number above 0"),
    "a scale in words": (lambda p, c: p.update(scale="20"), r"scale: found '20'; expected a number above 0"),
    "an alpha too": (lambda p, c: p.update(alpha=16), r"lora_parameters\.alpha: its meaning has changed"),
    "an unknown key": (lambda p, c: p.update(use_rslora=True), r"lora_parameters\.use_rslora: unknown to mlx-lm"),
    "no parameters": (lambda p, c: c.pop("lora_parameters"), "names no lora_parameters; add rank and scale"),
    "whole weights": (lambda p, c: c.update(fine_tune_type="full"), "fine_tune_type 'full'; expected lora or dora"),
    "dora without m": (lambda p, c: c.update(fine_tune_type="dora"), "has no magnitudes m, but fine_tune_type is dora"),
    "another rank": (lambda p, c: p.update(rank=8), "has rank 4, but the config says 8"),
    "a rank in words": (lambda p, c: p.update(rank="4"), "rank: found '4'; expected an integer"),
    "other keys": (lambda p, c: p.update(keys=["mlp.up_proj"]), "which lora_parameters.keys don't name"),
    "fewer layers": (lambda p, c: c.update(num_layers=1), "has weights of 2 layers, but num_layers is 1"),
}


@pytest.mark.parametrize(("change", "message"), MLX_BREAKS.values(), ids=MLX_BREAKS)
def test_an_mlx_config_that_does_not_say_what_its_weights_mean_is_refused(change, message, tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path)
    edit(tmp_path, lambda config: change(config["lora_parameters"], config))
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{message}"):
        read_adapter(tmp_path)


# --- Files and folders


def test_an_adapter_in_a_folder_of_its_own_name_is_pointed_at(tiny_model, tmp_path):
    peft_model(tiny_model, name="mine").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no adapter_config\.json; its folder mine has one: name that"):
        read_adapter(tmp_path)


def test_two_adapters_in_one_file_are_refused(tiny_model, tmp_path):
    tuned = peft_model(tiny_model)
    tuned.save_pretrained(tmp_path)
    tuned.add_adapter("other", peft.LoraConfig(r=4, target_modules=["o_proj"]))
    save_raw(tuned, tmp_path)
    with pytest.raises(UserError, match="holds several adapters, default, other; expected one"):
        read_adapter(tmp_path)


def test_a_file_that_says_a_tensor_twice_is_refused(tiny_model, tmp_path):
    peft_model(tiny_model).save_pretrained(tmp_path)
    weights: Mapping[str, Array] = load_file(tmp_path / WEIGHTS_NAME)
    again = {key.replace(".weight", ".default.weight"): value for key, value in weights.items()}
    save_file({**weights, **again}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(UserError, match=r"lora_[AB]\.weight twice"):
        read_adapter(tmp_path)


def test_a_copied_folder_is_the_same_adapter(tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (read_adapter(tmp_path / name) for name in ("one", "two"))
    assert one[1] == two[1] and all((one[0][key] == two[0][key]).all() for key in one[0])
