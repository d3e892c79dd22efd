"""Plain LoRA layers on torch: one product added at once gives what PEFT's own forward pass gives, in less memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import gradient_of, make_batches, open_fresh
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny_models import write_family
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.batches import BatchPlan
from common.config import LoraConfig
from common.engine import Engine
from torch_backend.low_rank import add_products_at_once

IN, OUT, RANK = 24, 40, 4
PATTERNS = LoraConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3.0}, target_modules="all-linear")


def changed_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def leave_to_peft(engine: Engine) -> None:
    layers = changed_layers(engine._model)
    assert layers
    for layer in layers:
        del layer.forward


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        (PATTERNS, {}),
        (LoraConfig(use_rslora=True), {"packing": True}),
        (LoraConfig(lora_dropout=0.3), {"gradient_checkpointing": True}),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), {}),
        (LoraConfig(), {"quantization": {"load_in_4bit": True}, "gradient_checkpointing": True}),
        (LoraConfig(), {"quantization": {"load_in_8bit": True}}),
    ],
    ids=["patterns", "rslora packed", "dropout", "a module trained whole", "4 bits", "8 bits"],
)
def test_a_models_loss_and_gradient_are_pefts(lora: LoraConfig, settings: dict, tmp_path: Path) -> None:
    base = write_family(tmp_path, "qwen2")  # its q, k and v have a bias
    engine = open_fresh("torch", base, lora, **settings)
    plan = BatchPlan(make_batches(), 2, 1, 42, 1, capacity=64 if settings.get("packing") else None)
    loss, gradient = gradient_of(engine, plan.step_batch(1))
    leave_to_peft(engine)
    expected_loss, expected = gradient_of(engine, plan.step_batch(1))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    size = max(np.abs(array).max() for array in expected.values())
    for key, array in expected.items():  # float32, whose sums are in another order
        np.testing.assert_allclose(gradient[key], array, rtol=1e-3, atol=1e-4 * size, err_msg=key)


def make_layer(dtype: torch.dtype = torch.float32, **settings: object) -> LoraLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype)).requires_grad_(False)
    config = PeftLoraConfig(r=RANK, lora_alpha=10, target_modules=["0"], init_lora_weights=False, **settings)
    wrapped = get_peft_model(model, config)  # its A and B are float32
    add_products_at_once(wrapped)
    return wrapped.base_model.model[0]


def outputs_of(layer: LoraLinear, inputs: torch.Tensor, ours: bool) -> list[torch.Tensor]:
    """Return a layer's output, and the gradients of its input, A and B by random numbers for that of the output."""
    inputs = inputs.detach().requires_grad_()
    output = layer(inputs) if ours else type(layer).forward(layer, inputs)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    by_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, [inputs, *parameters], by_output)]


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (0, IN)])
def test_output_and_gradients_of_a_layer_are_pefts(shape: tuple[int, ...]) -> None:
    layer, inputs = make_layer(), torch.randn(shape)
    for found, expected in zip(outputs_of(layer, inputs, True), outputs_of(layer, inputs, False), strict=True):
        torch.testing.assert_close(found, expected)  # float32 rounding, torch's own bound


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_dtypes_are_pefts(autocast: bool) -> None:
    layer, inputs = make_layer(torch.bfloat16), torch.randn(2, 3, IN, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        both = outputs_of(layer, inputs, True), outputs_of(layer, inputs, False)
    for found, expected in zip(*both, strict=True):
        # 8 bits; the scale is multiplied before a rounding or after one. What PEFT does itself is the same.
        torch.testing.assert_close(found, expected, rtol=3e-2 if autocast else 0, atol=0.1 if autocast else 0)


def test_dora_keeps_pefts_forward_pass() -> None:
    assert not changed_layers(make_layer(use_dora=True))


def test_a_merged_or_switched_off_adapter_is_not_added() -> None:
    layer, inputs = make_layer(), torch.randn(3, IN)
    expected = layer(inputs)
    layer.merge()
    torch.testing.assert_close(layer(inputs), expected)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(inputs), layer.base_layer(inputs))  # which unmerged it


def test_an_input_without_gradient_gets_none() -> None:
    output = make_layer()(torch.randn(3, IN))
    assert "_WithLowRank" not in str(output.grad_fn.next_functions)


class Widths(TorchDispatchMode):
    """Note how wide the results of products with numbers are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor:
            self.seen.add(result.shape[-1])
        return result


@pytest.mark.parametrize(("ours", "expected"), [(True, {RANK}), (False, {OUT})])
def test_the_scale_meets_arrays_of_rank_width_alone(ours: bool, expected: set[int]) -> None:
    layer, inputs = make_layer(), torch.randn(3, IN)
    with Widths() as widths:
        outputs_of(layer, inputs, ours)
    assert widths.seen == expected
