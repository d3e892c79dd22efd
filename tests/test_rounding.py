"""In bfloat16 LoRA's first steps, far below what an output is rounded to, have their effect; PEFT's order has none."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
from engines import TORCH_DEVICE
from packed_layers import four_bit_layer
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from mlx_backend.frozen import FourBitLinear
from mlx_backend.lora import LoRALinear
from mlx_backend.products import ChosenLinear
from torch_backend.bordered import Bordered, products
from torch_backend.low_rank import add_products_at_once

ROWS, WIDTH, RANK = 64, 512, 4
rng = np.random.default_rng(0)
X, W = rng.normal(0, 1, (ROWS, WIDTH)), rng.normal(0, 0.05, (WIDTH, WIDTH))
A, B = rng.normal(0, 0.05, (RANK, WIDTH)), rng.normal(0, 2e-4, (WIDTH, RANK))  # B as after a few steps
X, W, A, B = (array.astype(np.float32) for array in (X, W, A, B))


def share_that_arrives(output: np.ndarray, without: np.ndarray) -> float:
    """Return how much of B A x is in the difference of two outputs, on average: it is a hundredth of their rounding."""
    wanted = X @ A.T @ B.T
    return float(((output - without) * wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize("packed", ["no", "4 bits", "nf4"])
def test_mlx_adds_the_base_to_the_adapter(packed: str) -> None:
    linear = mlx_nn.Linear(WIDTH, WIDTH, bias=False)
    linear.weight = mx.array(W).astype(mx.bfloat16)
    if packed == "nf4":
        linear = FourBitLinear.from_linear(linear, "nf4", double=False)
    elif packed == "4 bits":
        linear = mlx_nn.QuantizedLinear.from_linear(linear, 64, 4)
        linear.__class__ = ChosenLinear
        linear.choose(0, mx.bfloat16)
    layer = LoRALinear(linear, RANK, 1.0, 0.0, mx.bfloat16)
    layer.lora_a, x = (mx.array(array).astype(mx.bfloat16) for array in (A, X))
    outputs = []
    for up in (mx.array(B), mx.zeros((WIDTH, RANK))):
        layer.lora_b = up.astype(mx.bfloat16)
        outputs.append(np.array(layer(x).astype(mx.float32)))
    assert share_that_arrives(*outputs) == pytest.approx(1, abs=0.3)


def torch_layer(packed: str, ours: bool = True) -> LoraLayer:
    """Wrap a linear module by PEFT, with our forward pass or its own."""
    if packed == "no":
        linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(torch.from_numpy(W))
    else:
        linear = four_bit_layer(W, torch.bfloat16, flat="flat" in packed)
    model = nn.Sequential(linear).to(TORCH_DEVICE)
    wrapped = get_peft_model(model, PeftLoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    if ours:
        add_products_at_once(wrapped)
    return wrapped.base_model.model[0]


def share_on_torch(layer: LoraLayer, compute: Callable[[torch.Tensor], torch.Tensor]) -> float:
    x, outputs = torch.from_numpy(X).bfloat16().to(TORCH_DEVICE), []
    layer.lora_A["default"].weight.data.copy_(torch.from_numpy(A))
    for up in (torch.from_numpy(B), torch.zeros(WIDTH, RANK)):
        layer.lora_B["default"].weight.data.copy_(up)
        with torch.autocast(TORCH_DEVICE, torch.bfloat16):
            outputs.append(compute(x).detach().float().cpu().numpy())
    return share_that_arrives(*outputs)


@pytest.mark.parametrize("packed", ["no", "nf4", "nf4 in flat rows"])
@pytest.mark.parametrize("ours", [True, False])
def test_torch_adds_the_base_to_the_adapter_and_peft_does_not(packed: str, ours: bool) -> None:
    layer = torch_layer(packed, ours)
    assert share_on_torch(layer, layer) == pytest.approx(1 if ours else 0, abs=0.3)


@pytest.mark.parametrize("packed", ["no", "nf4"])
def test_at_the_border_of_the_base_the_adapter_arrives_too(packed: str) -> None:
    kind = Bordered if packed == "no" else pytest.importorskip("torch_backend.packed_border").PackedBordered
    layer = torch_layer(packed)
    bordered = kind([layer])
    assert share_on_torch(layer, lambda x: products(x, bordered)[0]) == pytest.approx(1, abs=0.3)
