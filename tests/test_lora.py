"""Modules, names and starting values of an adapter, with PEFT on a tiny random Llama as the oracle."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import LoraConfig
from common.errors import UserError
from common.initial import initial_weights
from common.lora import (
    lora_a_key,
    lora_b_key,
    module_of_key,
    module_scaling,
    portable_target_modules,
    select_modules,
)

LAYERS, NAMES = 3, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
GOLDEN_DRAWS = ["-0x1.75c9800000000p-5", "0x1.6db8100000000p-4", "0x1.1022600000000p-5"]

TARGETS = {
    "all-linear": LoraConfig(target_modules="all-linear"),
    "all-linear but one": LoraConfig(target_modules="all-linear", exclude_modules=["o_proj"]),
    "last names": LoraConfig(target_modules=["q_proj", "v_proj"]),
    "two last names": LoraConfig(target_modules=["mlp.down_proj", "self_attn.q_proj"]),
    "the head": LoraConfig(target_modules=["q_proj", "lm_head"]),
    "full names": LoraConfig(target_modules=["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]),
    "a regular expression": LoraConfig(target_modules=r".*\.(q|v)_proj"),
    "an expression of layers": LoraConfig(target_modules=r"model\.layers\.[02]\..*(mlp\.\w+|\.q)_proj"),
    "an expression that is a last name": LoraConfig(target_modules=r".*q_proj|lm_head"),
    "one layer": LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=1),
    "some layers": LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]),
    "layers and the head": LoraConfig(target_modules=["q_proj", "lm_head"], layers_to_transform=[0]),
    "a full name and layers": LoraConfig(
        target_modules=["model.layers.0.self_attn.q_proj", "up_proj"], layers_to_transform=[1]
    ),
    "without some last names": LoraConfig(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]),
    "without an expression": LoraConfig(target_modules=["q_proj", "k_proj"], exclude_modules=r".*layers\.1\..*"),
    "without full names": LoraConfig(
        target_modules=["q_proj", "k_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"]
    ),
    "layers and without": LoraConfig(
        target_modules=["q_proj", "k_proj"], layers_to_transform=[1, 2], exclude_modules=r".*2\.self_attn\.k_proj"
    ),
}


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def linear() -> list[str]:
    """Name the linear modules of the tiny Llama in model order."""
    import torch

    return [name for name, module in tiny_llama().named_modules() if isinstance(module, torch.nn.Linear)]


def peft_keys(**settings) -> dict[str, tuple[int, ...]]:
    """Give keys and shapes of the file that PEFT would save for these settings."""
    import peft

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tuple(value.shape) for key, value in state.items()}


def peft_modules(**settings) -> list[str]:
    return [module_of_key(key) for key in peft_keys(**settings) if ".lora_A." in key]


def as_peft(lora: LoraConfig) -> dict:
    settings = lora.model_dump(include={"target_modules", "exclude_modules", "layers_to_transform"})
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


@pytest.mark.parametrize("lora", TARGETS.values(), ids=TARGETS)
def test_modules_are_those_that_peft_adapts(linear, lora):
    assert select_modules(linear, HEAD, lora) == peft_modules(**as_peft(lora))


@pytest.mark.parametrize("lora", TARGETS.values(), ids=TARGETS)
def test_portable_target_modules_mean_the_same_modules_to_peft(linear, lora):
    chosen = select_modules(linear, HEAD, lora)
    portable = portable_target_modules(chosen, linear, lora)
    layers = as_peft(lora)["layers_to_transform"]
    assert peft_modules(target_modules=portable, layers_to_transform=layers) == chosen


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (LoraConfig(target_modules="all-linear"), sorted(NAMES)),
        (LoraConfig(target_modules=r".*\.(q|v)_proj"), ["q_proj", "v_proj"]),
        (LoraConfig(target_modules=["self_attn.q_proj"], layers_to_transform=[1]), ["q_proj"]),
        (LoraConfig(target_modules=r".*\.1\..*q_proj"), ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_portable_target_modules_are_last_names_where_those_suffice(linear, lora, expected):
    assert portable_target_modules(select_modules(linear, HEAD, lora), linear, lora) == expected


@given(st.sets(st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(NAMES)), min_size=1), st.booleans())
def test_portable_target_modules_give_back_any_choice(choice, with_head):
    linear = [f"model.layers.{layer}.block.{name}" for layer in range(LAYERS) for name in NAMES] + [HEAD]
    wanted = {f"model.layers.{layer}.block.{name}" for layer, name in choice} | ({HEAD} if with_head else set())
    chosen = [name for name in linear if name in wanted]
    portable = portable_target_modules(chosen, linear, LoraConfig(target_modules=chosen))
    assert select_modules(linear, HEAD, LoraConfig(target_modules=portable)) == chosen


def test_keys_and_shapes_are_those_of_a_peft_file(linear):
    keys = peft_keys(target_modules=["q_proj", "down_proj", "lm_head"])
    modules = select_modules(linear, HEAD, LoraConfig(target_modules=["q_proj", "down_proj", "lm_head"]))
    assert list(keys) == [key for module in modules for key in (lora_a_key(module), lora_b_key(module))]
    assert keys[lora_a_key(modules[0])] == (4, 16) and keys[lora_b_key(modules[0])] == (16, 4)


@pytest.mark.parametrize("module", ["lm_head", "model.layers.11.mlp.down_proj"])
def test_module_of_a_key_is_the_one_it_was_made_for(module):
    assert module_of_key(lora_a_key(module)) == module_of_key(lora_b_key(module)) == module


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(target_modules=["query_key_value"]),
        LoraConfig(target_modules="q_proj"),  # an expression for the whole name
        LoraConfig(target_modules=["q_proj"], layers_to_transform=[7]),
        LoraConfig(target_modules=["q_proj"], exclude_modules=r".*"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_what_there_is(linear, lora):
    with pytest.raises(UserError, match=r"matches no linear module of this model; choose among") as caught:
        select_modules(linear, HEAD, lora)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, or all-linear" in str(caught.value)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("r", "alpha"), [(16, 32), (8, 8), (64, 16)])
def test_scaling_is_that_of_peft(use_rslora, r, alpha):
    import peft
    import torch

    config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config).base_model.model[0]
    # One division and at most one square root on both sides.
    assert module_scaling("0", LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora)) == pytest.approx(
        layer.scaling["default"], rel=1e-15
    )


SHAPES = {lora_a_key("a"): (16, 1000), lora_b_key("a"): (70, 16), lora_a_key("b"): (16, 1000)}


def test_a_is_uniform_within_the_bound_of_peft_and_b_is_zero():
    weights = initial_weights(SHAPES, seed=3)
    a = weights[lora_a_key("a")]
    bound = 1 / math.sqrt(1000)
    assert {key: value.shape for key, value in weights.items()} == SHAPES
    assert all(value.dtype == np.float32 for value in weights.values())
    assert not weights[lora_b_key("a")].any()
    assert np.abs(a).max() <= np.float32(bound)
    # 16,000 uniform draws: extremes lie within 0.1 % of the bound but for one run in 3,000; the deviation of the
    # mean is bound / sqrt(3 * 16000) = 0.0046 bounds and that of the spread 0.0035 of it, four of each allowed.
    assert a.max() > 0.999 * bound and a.min() < -0.999 * bound
    assert abs(a.mean()) < 0.019 * bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.014)


def test_bound_of_a_is_that_of_peft():
    import peft
    import torch

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(1000, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=64, target_modules=["0"]))
    theirs = model.base_model.model[0].lora_A["default"].weight.detach().numpy()
    ours = initial_weights({lora_a_key("0"): (64, 1000)}, seed=0)[lora_a_key("0")]
    # The extremes of 64,000 uniform draws are within 0.1 % of the bound.
    assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=1e-3)


def test_same_seed_draws_the_same_tensors_in_any_order_and_company():
    whole, alone = initial_weights(SHAPES, 5), initial_weights({lora_a_key("b"): (16, 1000)}, 5)
    assert (whole[lora_a_key("b")] == alone[lora_a_key("b")]).all()


def test_another_seed_or_name_draws_another_tensor():
    one, other = initial_weights(SHAPES, 5), initial_weights(SHAPES, 6)
    assert (one[lora_a_key("a")] != other[lora_a_key("a")]).mean() > 0.99
    assert (one[lora_a_key("a")] != one[lora_a_key("b")]).mean() > 0.99


def test_draws_are_the_same_on_every_machine():
    # A golden value: NumPy promises that the bit stream of PCG64 stays as it is.
    first = initial_weights({lora_a_key("model.layers.0.self_attn.q_proj"): (4, 64)}, seed=42)
    values = next(iter(first.values())).reshape(-1)[:3]
    assert [float(value).hex() for value in values] == GOLDEN_DRAWS


def test_patterns_are_read_as_peft_reads_them():
    # A name that is an expression in a list is a name there, in PEFT too.
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.qxproj"]
    assert select_modules(names, None, LoraConfig(target_modules=["q_proj"])) == names[:1]
    with pytest.raises(UserError, match=re.escape("'q.proj'")):
        select_modules(names, None, LoraConfig(target_modules=["q.proj"]))
