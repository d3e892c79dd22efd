"""LoRA on torch: PEFT puts the layers in; here they get one flat buffer and the names that files use."""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel

from common.config import LoraConfig
from common.flat import FlatLayout
from common.lora import lora_a_key, lora_b_key, portable_target_modules, select_modules

ADAPTER = ".default.weight"  # PEFT's adapter name inside parameter names; its files leave it out


class Adapter:
    """Hold the adapter's parameters as views of one flat float32 buffer, and their gradients likewise."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Move the LoRA parameters of a model into one buffer."""
        parameters = {
            name.replace(ADAPTER, ".weight"): parameter
            for name, parameter in model.named_parameters()
            if ".lora_" in name
        }
        self.layout = FlatLayout({key: tuple(parameter.shape) for key, parameter in parameters.items()})
        self.weights = torch.zeros(self.layout.size, device=device)
        self.gradient = torch.zeros(self.layout.size, device=device)
        for key, place, shape in self.layout.slices():
            parameters[key].data = self.weights[place].view(shape)
            parameters[key].grad = self.gradient[place].view(shape)  # backward accumulates into it


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear modules of a model, quantised ones too, by path in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def output_head(model: PreTrainedModel) -> str | None:
    """Return the path of the linear module that makes logits, None where it is none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) under a module, without its adapter, dequantised where it is packed."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return dequantize_module_weight(base).detach()


def inject(model: PreTrainedModel, lora: LoraConfig) -> tuple[nn.Module, list[str]]:
    """Freeze the model and let PEFT wrap the modules that the config targets; returns it and `target_modules`."""
    model.requires_grad_(False)
    linear = list(linear_modules(model))
    chosen = select_modules(linear, output_head(model), lora)
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=chosen,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, peft_config)
    expected = {key for module in chosen for key in (lora_a_key(module), lora_b_key(module))}
    found = {name.replace(ADAPTER, ".weight") for name, _ in wrapped.named_parameters() if ".lora_" in name}
    assert found == expected, f"PEFT wrapped other modules than the config targets: {sorted(found ^ expected)[:4]}"
    return wrapped, portable_target_modules(chosen, linear, lora)
