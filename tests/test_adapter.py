"""An adapter's files: PEFT loads what we write, we load what PEFT writes, and broken ones are told apart."""

import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.adapters.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_adapter,
    lora_of,
    peft_config,
    read_adapter,
    save_tensors,
    write_adapter,
)
from common.adapters.files import read_adapter_config
from common.config import LoraConfig
from common.errors import UserError
from common.initial import initial_weights
from common.lora import lora_a_key, lora_b_key, module_scaling, portable_target_modules, select_modules

A, B = lora_a_key("layers.0.q_proj"), lora_b_key("layers.0.q_proj")
SHAPES = {A: (4, 16), B: (8, 4)}
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])


def trained_weights(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {key: random.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def write(directory: Path, lora: LoraConfig = LORA, **changes) -> dict[str, np.ndarray]:
    weights = trained_weights()
    config = peft_config(lora, ["q_proj"], "some/base", None) | changes
    write_adapter(directory, weights, config)
    return weights


def tiny_base(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def linear_shapes(model) -> dict[str, tuple[int, int]]:
    import torch

    modules = model.named_modules()
    return {name: tuple(module.weight.shape) for name, module in modules if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        LoraConfig(r=2, lora_alpha=3, use_rslora=True),
        LoraConfig(r=2, target_modules=["k_proj"], layers_to_transform=[1]),
        LoraConfig(r=2, target_modules=r".*\.0\..*up_proj|lm_head"),
    ],
    ids=["names", "all-linear rslora", "one layer", "expression"],
)
def test_peft_computes_with_what_we_write(tmp_path, llama, lora):
    import peft
    import torch

    base = tiny_base(llama)
    shapes = linear_shapes(base)
    modules = select_modules(list(shapes), "lm_head", lora)
    weights = trained_weights(
        {lora_a_key(m): (lora.r, shapes[m][1]) for m in modules}
        | {lora_b_key(m): (shapes[m][0], lora.r) for m in modules}
    )
    targets = portable_target_modules(modules, list(shapes), lora)
    write_adapter(tmp_path, weights, peft_config(lora, targets, str(llama), None))

    expected = {m: base.get_submodule(m).weight.detach().clone() for m in shapes}
    for module in modules:
        delta = weights[lora_b_key(module)] @ weights[lora_a_key(module)]
        expected[module] += module_scaling(module, lora) * torch.from_numpy(delta)
    merged = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for module, weight in expected.items():
        # The same float32 product through another BLAS; entries are of order ten.
        torch.testing.assert_close(merged.get_submodule(module).weight, weight, rtol=1e-5, atol=1e-5)


def test_we_read_what_peft_writes(tmp_path, llama):
    import peft

    settings = dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny_base(llama), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path)
    weights, config = read_adapter(tmp_path)
    lora = lora_of(config, tmp_path)
    assert (lora.r, lora.lora_alpha, lora.use_rslora) == (4, 8, True)
    assert set(lora.target_modules) == {"q_proj", "down_proj"}
    shapes = {key: tuple(value.shape) for key, value in peft.get_peft_model_state_dict(model).items()}
    check_adapter(weights, shapes, tmp_path, trained=False)


def test_every_key_of_our_config_is_one_of_peft(tmp_path):
    import peft

    write(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    for key, value in read_adapter_config(tmp_path).items():
        found = getattr(config, key)
        assert (sorted(found) if isinstance(found, set) else found) == value, key


def test_weights_come_back_bit_for_bit_and_readable_by_all(tmp_path):
    weights = write(tmp_path)
    found, config = read_adapter(tmp_path)
    assert found.keys() == weights.keys()
    assert all(found[key].tobytes() == weights[key].tobytes() for key in weights)
    assert lora_of(config, tmp_path) == LORA.model_copy(update={"target_modules": ("q_proj",)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    assert len(modes) == 1, "safetensors' own writer makes its file private"


def test_transposed_views_are_written_as_they_read(tmp_path):
    view = np.arange(12, dtype=np.float32).reshape(3, 4).T
    save_tensors(tmp_path / "t.safetensors", {"x": view, "part": np.arange(10, dtype=np.float32)[::3]})
    found = load_file(tmp_path / "t.safetensors")
    assert (found["x"] == view).all() and found["part"].tolist() == [0, 3, 6, 9]


def test_same_adapter_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG_NAME, None, "has no adapter_config.json; expected the folder of a PEFT adapter"),
        (CONFIG_NAME, b"{", "adapter_config.json: no JSON"),
        (CONFIG_NAME, b"\xff\xfe", "adapter_config.json: no JSON"),
        (CONFIG_NAME, b"[]", "is no LoRA adapter; expected peft_type LORA"),
        (CONFIG_NAME, b'{"peft_type": "IA3"}', "is no LoRA adapter; expected peft_type LORA"),
        (WEIGHTS_NAME, None, "has no adapter_model.safetensors; expected a PEFT adapter"),
        (WEIGHTS_NAME, b"", "adapter_model.safetensors: no safetensors file"),
        (WEIGHTS_NAME, b"\x00" * 100, "adapter_model.safetensors: its safetensors header can't be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    write(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(("end", "message"), [(20, "cut off inside its header"), (-4, "truncated: ")])
def test_a_weights_file_cut_off_is_named(tmp_path, end, message):
    write(tmp_path)
    raw = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(raw[:end])
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors: .*{message}"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fan_in_fan_out": True, "bias": "all"}, "uses fan_in_fan_out, which is not supported"),
        ({"trainable_token_indices": [5]}, "uses trainable_token_indices, which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "saved against a changed base; save it again"),
        ({"bias": "all"}, "uses bias"),
        ({"target_modules": None}, "names no target_modules"),
        ({"r": 0}, "adapter_config.json: .*r"),
        ({"r": "8"}, "adapter_config.json: .*r"),
    ],
)
def test_an_adapter_we_can_not_honour_is_refused(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        lora_of(read_adapter_config(tmp_path), tmp_path)


BREAKS = {
    "a tensor missing": (lambda w: w.pop(B), f"lacks {B}; is it an adapter of another base"),
    "a tensor too many": (lambda w: w.update(x=w[A]), "holds x, which the model has no place for"),
    "several wrong": (lambda w: [w.pop(A), w.pop(B)], r"lacks .*lora_A.weight \(1 more\)"),
    "another shape": (lambda w: w.update({A: w[A].T}), r"has shape \(16, 4\); expected \(4, 16\)"),
    "nan": (lambda w: w[B].__setitem__((0, 0), np.nan), "lora_B.weight holds NaN or infinity"),
    "infinity": (lambda w: w[A].__setitem__((0, 0), -np.inf), "lora_A.weight holds NaN or infinity"),
}


@pytest.mark.parametrize(("change", "message"), BREAKS.values(), ids=BREAKS)
def test_weights_that_do_not_fit_are_refused(change, message):
    weights = trained_weights()
    check_adapter(weights, SHAPES, Path("run/final"), trained=True)
    change(weights)
    with pytest.raises(UserError, match="^run/final: .*" + message):
        check_adapter(weights, SHAPES, Path("run/final"), trained=True)


def test_an_adapter_that_changes_nothing_is_refused_only_where_it_should_be_trained():
    fresh = initial_weights(SHAPES, seed=0)
    check_adapter(fresh, SHAPES, Path("run"), trained=False)
    with pytest.raises(UserError, match=r"every B is zero: the adapter changes nothing; was the learning rate 0\?"):
        check_adapter(fresh, SHAPES, Path("run"), trained=True)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_weights_of_others_are_read_as_float32_whatever_their_dtype(tmp_path, dtype):
    import torch
    from safetensors.torch import save_file

    write(tmp_path)
    weights = {key: torch.from_numpy(value).to(getattr(torch, dtype)) for key, value in trained_weights().items()}
    save_file(weights, tmp_path / WEIGHTS_NAME)
    found, _ = read_adapter(tmp_path)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert found[key].dtype == np.float32
        assert (found[key] == value.float().numpy()).all()


def test_weights_of_whole_numbers_are_refused(tmp_path):
    write(tmp_path)
    save_tensors(tmp_path / WEIGHTS_NAME, {key: value.astype(np.int8) for key, value in trained_weights().items()})
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: .* is of dtype 'I8'; expected F32"):
        read_adapter(tmp_path)
