"""The flat buffers of the torch engine's adapter: what layers see of the weights, and what comes back as gradient."""

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import nn

from torch_backend.adapter import Adapter
from torch_backend.low_rank import add_products_at_once


def made(dtype: torch.dtype, **settings: object) -> tuple[nn.Module, Adapter]:
    """Wrap two linear modules and give the adapter random weights."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16), nn.SiLU(), nn.Linear(48, 64, dtype=torch.bfloat16))
    model = get_peft_model(base.requires_grad_(False), PeftLoraConfig(r=4, target_modules=["0", "2"], **settings))
    add_products_at_once(model)
    adapter = Adapter(model, torch.device("cpu"), dtype)
    torch.nn.init.normal_(adapter.weights, std=0.1, generator=torch.Generator().manual_seed(1))
    adapter.show_weights()
    return model, adapter


def pass_back(model: nn.Module, adapter: Adapter, seed: int) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    adapter.collect_gradient()


def test_rounded_weights_get_the_gradient_that_layers_rounding_for_themselves_would_get():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, adapter = made(dtype)
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {dtype}
        pass_back(model, adapter, 3)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 64).bfloat16()).sum().backward()
        adapter.zero_gradient()  # after a step that broke in its second pass
        for seed in (1, 2):
            pass_back(model, adapter, seed)
        assert adapter.gradient.dtype == adapter.weights.dtype == torch.float32
        found.append((adapter.weights, adapter.gradient))
    for wide, rounded in zip(*found, strict=True):
        torch.testing.assert_close(rounded, wide, rtol=0, atol=0)


def test_an_adapter_with_more_than_plain_loras_parameters_stays_in_float32():
    model, adapter = made(torch.bfloat16, use_dora=True)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    pass_back(model, adapter, 1)
    assert adapter.gradient.square().sum() > 0
