"""LoRA on torch: PEFT puts the layers in, around the linear modules that the config targets.

LoRA, rsLoRA, DoRA and modules trained whole are all PEFT's own layers, so what trains here is what PEFT loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from common.config import LoraConfig
from common.errors import UserError
from common.lora import (
    lora_a_key,
    lora_b_key,
    magnitude_key,
    not_trainable_whole,
    portable_target_modules,
    saved_key,
    select_modules,
    select_parameters,
    select_saved,
)
from torch_backend.adapter import trainable_parameters
from torch_backend.low_rank import add_products_at_once


def linear_modules(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear modules of a model, quantised ones too, by path in model order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def text_modules(model: PreTrainedModel) -> list[str]:
    """List the linear modules that read text: not those of a vision or audio tower, which MLX leaves out."""
    decoder = next(path for path, module in model.named_modules() if module is model.get_decoder())
    head = output_head(model)
    return [path for path in linear_modules(model) if path == head or path.startswith(f"{decoder}.")]


def expert_stacks(model: PreTrainedModel) -> list[str]:
    """List the parameters that hold the matrices of all experts of a layer, (E, out, in) or (E, in, out)."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name]


def output_head(model: PreTrainedModel) -> str | None:
    """Return the path of the linear module that makes logits, None where it is none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Return the frozen weight (out, in) under a module, without its adapter, dequantised where it is packed."""
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if base.weight.dtype == torch.int8:  # LLM.int8, whose scales PEFT's way loses on the CPU before the first step
        scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return base.weight.data * (scales[:, None] * (1 / 127))
    weight = dequantize_module_weight(base).detach()
    # torch_backend/four_bit.py has some weights as one long row.
    return weight.reshape(base.out_features, base.in_features) if isinstance(base, nn.Linear) else weight


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Tell whether the head's matrix is that of the token embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def inject(model: PreTrainedModel, lora: LoraConfig) -> tuple[nn.Module, list[str]]:
    """Let PEFT wrap the modules of a frozen model that the config targets; returns it and `target_modules`."""
    linear, saved = list(linear_modules(model)), _saved_modules(model, lora)
    parameters = select_parameters(expert_stacks(model), lora)
    chosen = select_modules(text_modules(model), output_head(model), lora, list(parameters))
    if lora.use_dora:
        _refuse_long_rows(model, chosen)
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=chosen,
        target_parameters=list(parameters) or None,
        modules_to_save=saved or None,
        ensure_weight_tying=bool(saved),
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, peft_config)
    add_products_at_once(wrapped)
    for path in saved:
        _keep_dtype(model.get_submodule(path))
    keys = (lora_a_key, lora_b_key, *([magnitude_key] if lora.use_dora else []))
    expected = {key(module) for module in chosen for key in keys} | {saved_key(module) for module in saved}
    expected |= {key(module) for module in parameters.values() for key in (lora_a_key, lora_b_key)}
    found = trainable_parameters(wrapped).keys()
    if found != expected:  # PEFT takes gate_proj of some mixtures for routed experts, when reading too
        raise UserError(
            f"lora.target_modules: in {model.config.model_type} PEFT makes other tensors of them, such as "
            f"{min(found ^ expected)}; name modules outside the experts: [q_proj, k_proj, v_proj, o_proj]"
        )
    return wrapped, portable_target_modules(chosen, linear, lora)


def _refuse_long_rows(model: PreTrainedModel, chosen: Sequence[str]) -> None:
    """Raise UserError for DoRA over weights that torch_backend/four_bit.py has as one row, which PEFT can't read."""
    packed = [path for path in chosen if not model.get_submodule(path).weight.is_floating_point()]
    if not packed:
        return
    from torch_backend.four_bit import FlatFourBitLinear  # bitsandbytes is not there on macOS

    for path in packed:
        linear = model.get_submodule(path)
        if isinstance(linear, FlatFourBitLinear):
            raise UserError(
                f"lora.use_dora: {path} has rows of {linear.in_features} weights, no multiple of 64, whose 4 bits "
                "PEFT misreads on a CPU; write use_dora: false, or use --engine mlx or a GPU"
            )


def _saved_modules(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Choose the modules to train whole; raises UserError for one that is quantised or has more than a weight."""
    tied = has_tied_embeddings(model)
    embedding = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    head = output_head(model) if tied else None
    modules = {path: dict(module.named_parameters(recurse=False)) for path, module in model.named_modules()}
    names = [path for path, parameters in modules.items() if "weight" in parameters and path != head]
    saved = select_saved(names, embedding if tied else None, lora)
    for path in saved:
        if not modules[path]["weight"].is_floating_point() or len(modules[path]) > 1:
            raise not_trainable_whole(path, quantised=len(modules[path]) == 1)
    return saved


def _keep_dtype(module: nn.Module) -> None:
    """Let a module that is trained in float32 give out the base's dtype, as it did before."""
    dtype = dense_weight(module).dtype

    def cast(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    module.register_forward_hook(cast)
