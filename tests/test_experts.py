"""LoRA on the experts of mixtures: PEFT's `target_parameters`, on both engines, with PEFT as the oracle."""

from pathlib import Path

import numpy as np
import peft
import pytest
from engines import ENGINES, make_batches, open_fresh
from peft_oracle import transformers_model
from safetensors.numpy import load_file
from test_lora_family import assert_close, logits_of, moved, peft_training, tokens
from test_lora_family import train as train_steps
from tiny_models import write_family

from common.adapters.adapter import lora_of, peft_config, read_adapter, write_adapter
from common.batches import BatchPlan
from common.config import LoraConfig, TrainConfig
from common.errors import UserError

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "gpt_oss", "qwen3_5_moe_text")
CHOICES = {
    "both": LoraConfig(r=3, target_modules=["q_proj"], target_parameters=BOTH),
    "gates and ups": LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    "one layer's downs": LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=["model.layers.1.mlp.experts.down_proj"], use_rslora=True
    ),
    "ranks of their own": LoraConfig(
        r=5, target_modules=["q_proj"], target_parameters=BOTH, rank_pattern={"experts.down_proj": 2}
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_family(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def check_training(name: str, base: Path, lora: LoraConfig) -> None:
    """Train as PEFT does from the same start; compare losses, and what the adapter then computes."""
    engine, plan = open_fresh(name, base, lora), BatchPlan(make_batches(), 4, 1, 42, 2)
    engine.load_state(moved(engine))
    expected, model = peft_training(base, lora, engine, plan)
    np.testing.assert_allclose(train_steps(engine, plan), expected, rtol=1e-4)
    # A token to which two experts are equal but for rounding may go to either: most rows are compared, not all.
    found, wanted = engine.logits(tokens()), logits_of(model)
    worst = np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max()
    assert np.quantile(worst, 0.9) < 2e-3


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_architecture_train_as_in_peft(name: str, family: str, bases: dict[str, Path]) -> None:
    lora = CHOICES["both"].model_copy(update={"target_modules": ("o_proj",)})
    check_training(name, bases[family], lora)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("choice", CHOICES)
def test_any_choice_of_stacks_trains_as_in_peft(name: str, choice: str, bases: dict[str, Path]) -> None:
    check_training(name, bases["qwen3_moe"], CHOICES[choice])


@pytest.mark.parametrize("choice", CHOICES)
def test_peft_loads_what_is_saved_and_both_engines_file_it_alike(
    choice: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, lora = bases["qwen3_moe"], CHOICES[choice]
    first, second = (open_fresh(name, base, lora) for name in ENGINES)
    assert first.adapter_shapes() == second.adapter_shapes()
    state = moved(first)
    for engine in (first, second):
        engine.load_state(state)
    write_adapter(tmp_path, state.weights, peft_config(lora, first.target_modules(), str(base), None))
    model = peft.PeftModel.from_pretrained(transformers_model(base), tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(peft.get_peft_model_state_dict(model))
    for engine in (first, second):
        assert_close(engine.logits(tokens()), logits_of(model))
    weights, config = read_adapter(tmp_path)
    assert lora_of(config, tmp_path).target_parameters == lora.target_parameters
    for key, value in state.weights.items():
        np.testing.assert_array_equal(weights[key], value)


@pytest.mark.parametrize("name", ENGINES)
def test_checkpointing_keeps_the_gradients_of_experts(name: str, bases: dict[str, Path]) -> None:
    plan = BatchPlan(make_batches(), 4, 1, 42, 2)
    plain, recomputed = (
        open_fresh(name, bases["qwen3_moe"], CHOICES["both"], gradient_checkpointing=wanted) for wanted in (False, True)
    )
    assert train_steps(recomputed, plan) == pytest.approx(train_steps(plain, plan), rel=2e-5)
    for key, value in plain.read_state().weights.items():
        np.testing.assert_allclose(recomputed.read_state().weights[key], value, atol=1e-3, err_msg=key)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("parameters", [["mlp.experts.up_proj"], ["experts"]])
def test_a_stack_that_is_not_there_is_refused(name: str, parameters: list[str], bases: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"matches no stack of experts .*choose among: mlp.experts.down_proj"):
        open_fresh(name, bases["qwen3_moe"], LoraConfig(target_parameters=parameters))


@pytest.mark.parametrize("name", ENGINES)
def test_a_model_without_experts_says_so(name: str, llama: Path) -> None:
    with pytest.raises(UserError, match="it has none: delete the key"):
        open_fresh(name, llama, LoraConfig(target_parameters=BOTH))


@pytest.mark.parametrize("extra", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_peft_lacks_for_experts_is_refused(extra: dict) -> None:
    with pytest.raises(
        UserError, match=f"lora.{next(iter(extra))}: found .* which PEFT can't do for target_parameters"
    ):
        TrainConfig.from_dict({"lora": {"target_parameters": BOTH, **extra}}, "train.yaml")
