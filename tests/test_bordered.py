"""LoRA's matrices at the border of frozen weights, as cards have them: the numbers of PEFT's own order, on a CPU."""

import weakref

import numpy as np
import pytest
import torch
from engines import Step, gradient_of, make_batches, open_fresh
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tiny_models import FAMILIES, write_family, write_llama
from torch import nn

from common.batches import BatchPlan
from common.config import LoraConfig
from common.engine import Engine, StepBatch
from common.sampling import Sampling
from torch_backend.aligned import ALIGNED, LINE
from torch_backend.bordered import Bordered
from torch_backend.device import Hardware
from torch_backend.low_rank import ADAPTER, plain_layers

PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3.0, "k_proj": 5.0}}


@pytest.fixture
def border(monkeypatch: pytest.MonkeyPatch):
    """Say whether products are rounded before they are added, as on a card in half precision."""
    return lambda answer: monkeypatch.setattr(Hardware, "borders", lambda *_: answer)


def step(packing: bool = False) -> StepBatch:
    return BatchPlan(make_batches(), 4, 1, 42, 2, capacity=64 if packing else None).step_batch(1)


def compare(found: Step, expected: Step, off: float | None = None) -> None:
    """Hold loss and gradients to be the same, but for float32 sums in another order."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for key, array in expected[1].items():
        atol = 1e-5 * np.abs(array).max() if off is None else off
        np.testing.assert_allclose(found[1][key], array, rtol=1e-3, atol=atol, err_msg=key)


def bordered_layers(engine: Engine) -> list[nn.Module]:
    return [layer for layer in plain_layers(engine._base) if layer.place is not None]


@pytest.mark.parametrize(
    ("family", "lora", "settings"),
    [
        ("qwen2", LoraConfig(r=6, target_modules="all-linear", **PATTERNS), {}),  # q, k and v have a bias
        ("llama", LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]), {"packing": True}),
        ("gemma3_text", LoraConfig(use_rslora=True), {"gradient_checkpointing": True}),
        ("phi3", LoraConfig(target_modules="all-linear"), {}),  # one matrix for q, k and v, one for gate and up
        ("llama", LoraConfig(r=3), {"quantization": {"load_in_4bit": True, "use_double_quant": True}}),
        ("qwen2", LoraConfig(), {"quantization": {"load_in_4bit": True}, "gradient_checkpointing": True}),
    ],
)
def test_loss_and_gradient_are_those_of_layers_by_themselves(family, lora, settings, border, tmp_path):
    base, found = write_family(tmp_path, family), []
    for answer in (False, True):
        border(answer)
        engine = open_fresh("torch", base, lora, **settings)
        assert bool(bordered_layers(engine)) == answer
        found.append(gradient_of(engine, step(settings.get("packing", False))))
    expected, ours = found
    compare(ours, expected)


@pytest.mark.parametrize(
    ("settings", "room"), [({}, True), ({"gradient_checkpointing": True}, False), ({"torch_compile": False}, False)]
)
def test_compiled_layers_make_the_widest_gradient_with_room_unless_they_are_computed_again(
    settings, room, border, llama
):
    border(True)
    engine = open_fresh("torch", llama, **{"torch_compile": True} | settings)
    assert engine._base.model.layers[0].mlp.up_proj.place.bordered.alone == 2 - room


@pytest.mark.parametrize("settings", [{}, {"quantization": {"load_in_4bit": True}}], ids=str)
def test_room_beside_the_widest_gradient_changes_no_number(settings, border, llama):
    border(True)
    found = []
    for room in (False, True):
        engine = open_fresh("torch", llama, **settings)
        alone = [layer.place.bordered for layer in bordered_layers(engine) if layer.place.bordered.alone]
        assert any(len(bordered.layers) == 2 for bordered in alone)  # gate and up
        for bordered in alone:
            bordered.alone = len(bordered.layers) - room
        found.append(gradient_of(engine, step()))
    expected, ours = found
    compare(ours, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_computes_the_same(family, border, tmp_path):
    base, found = write_family(tmp_path, family), []
    for answer in (False, True):
        border(answer)
        found.append(gradient_of(open_fresh("torch", base), step()))
    expected, ours = found
    largest = max(np.abs(array).max() for array in expected[1].values())
    compare(ours, expected, 1e-4 * largest)  # linear attention's rounding errors grow with the length


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True, "quantization": {"load_in_4bit": True}}], ids=str
)
def test_compiled_for_any_shape_the_numbers_are_the_same(settings, border, tmp_path):
    base, found = write_llama(tmp_path, num_hidden_layers=1), []
    for answer in (False, True):
        border(answer)
        engine = open_fresh("torch", base, LoraConfig(r=8), torch_compile=answer, **settings)
        # The first shape makes a graph of its own, the second one for any length and number of rows.
        found.append([gradient_of(engine, BatchPlan(make_batches(), rows, 1, 42, 2).step_batch(1)) for rows in (4, 3)])
    for expected, ours in zip(*found, strict=True):
        compare(ours, expected)


def test_state_weights_and_answers_are_those_of_layers_by_themselves(border, llama):
    states, weights, answers = [], [], []
    for answer in (False, True):
        border(answer)
        engine = open_fresh("torch", llama)
        gradient_of(engine, step())
        states.append(engine.read_state().weights)
        weights.append(engine.base_weight("model.layers.1.self_attn.k_proj"))
        answers.append(list(engine.generate([[5, 6, 7], [8]], Sampling(6))))
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(*weights)
    for key, array in states[0].items():  # after one update by a gradient with float32 rounding
        np.testing.assert_allclose(states[1][key], array, atol=4e-6, err_msg=key)


def test_layers_that_read_one_input_share_an_array(border, llama):
    border(True)
    engine = open_fresh("torch", llama)
    attention = engine._base.model.layers[0].self_attn
    shared = attention.q_proj.place.bordered
    assert shared is attention.v_proj.place.bordered
    assert len(shared.layers) == 3
    assert len(attention.o_proj.place.bordered.layers) == 1
    memory = shared.array.untyped_storage().data_ptr()
    for layer in shared.layers:
        matrices = layer.base_layer.weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        assert all(matrix.untyped_storage().data_ptr() == memory for matrix in matrices)


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(lora_dropout=0.1), LoraConfig(use_dora=True), LoraConfig(modules_to_save=["lm_head"])],
    ids=["dropout", "DoRA", "a module trained whole"],
)
def test_what_is_not_plain_lora_alone_is_left_as_it_is(lora, border, llama):
    border(True)
    assert not bordered_layers(open_fresh("torch", llama, lora))


def test_a_layer_computes_for_itself_what_the_module_above_it_was_not_called_with(border, llama):
    border(True)
    engine = open_fresh("torch", llama)
    gradient_of(engine, step())  # B is no longer zero
    layer = engine._base.model.layers[0].self_attn.k_proj
    x, other = torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.in_features)
    layer.place.given = other, torch.zeros(2, 3, layer.out_features)
    torch.testing.assert_close(layer(x), type(layer).forward(layer, x))


def test_nothing_is_held_after_a_pass_that_failed(border, llama, monkeypatch):
    border(True)
    engine = open_fresh("torch", llama)
    mlp = engine._base.model.layers[0].mlp
    monkeypatch.setattr(mlp.down_proj, "forward", lambda x: [].pop())
    with pytest.raises(IndexError):
        mlp(torch.randn(1, 2, mlp.gate_proj.in_features))
    assert mlp.gate_proj.place.given is mlp.up_proj.place.given is None


def test_a_closed_engine_lets_go_of_the_model(border, llama):
    border(True)
    engine = open_fresh("torch", llama)
    gradient_of(engine, step())
    layer = weakref.ref(engine._base.model.layers[0].mlp.gate_proj.base_layer)
    engine.close()
    assert layer() is None


@pytest.mark.parametrize("rank", [1, ALIGNED - 1, ALIGNED, 13])
def test_any_rank_leaves_rows_of_whole_16_bytes_that_begin_at_whole_lines(rank):
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24)), PeftLoraConfig(r=rank, target_modules=["0"]))
    array = Bordered([model.base_model.model[0]]).array
    assert array.shape[1] % ALIGNED == 0
    assert array.stride(0) * array.itemsize % LINE == 0
    assert array[24 + rank :].abs().sum() == array[:, 16 + rank :].abs().sum() == 0
