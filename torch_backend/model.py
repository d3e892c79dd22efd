"""The base model on torch: architecture and weights by transformers, NF4 by bitsandbytes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging

from common.base.quantized import BITSANDBYTES_4BIT, check_quantization, stored_format
from common.base.weights import read_model_config
from common.config import QuantizationConfig
from common.errors import UserError
from common.heap import without_holes
from torch_backend.device import DTYPES


def load_base(directory: Path, dtype: str, quantization: QuantizationConfig, device: torch.device) -> PreTrainedModel:
    """Load a model folder onto a device in a dtype, quantised where the config says so.

    Raises UserError for an architecture that transformers lacks or weights that don't fit it.
    """
    stored = read_model_config(directory)
    check_quantization(directory, stored, quantization, "torch")
    packed = stored_format(stored)
    bitsandbytes = None if packed else _bitsandbytes_config(quantization, dtype)
    with without_holes() if bitsandbytes and device.type == "cpu" else contextlib.nullcontext():
        model, report = _read(directory, dtype, bitsandbytes, device)
        _refuse_unfitting_weights(directory, report)
        if packed:
            _cast_unpacked(model, DTYPES[dtype])
        if quantization.load_in_4bit or packed == BITSANDBYTES_4BIT:
            from torch_backend.four_bit import settle  # bitsandbytes is not there on macOS

            settle(model, quantization.use_double_quant, DTYPES[dtype])
    return model


def packable_modules(config: Mapping[str, Any], where: Path) -> list[str]:
    """List the linear modules that transformers lets bitsandbytes pack in a model of a config, without its weights.

    Raises UserError, which names `where`, for a model that transformers can't build or that has convolutions for
    linear layers, which bitsandbytes stores transposed.
    """
    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            described = AutoConfig.for_model(config["model_type"], **settings)
            model = _auto_class(config["model_type"]).from_config(described)
    except (ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError) as error:
        raise _unloadable(where, config["model_type"], error) from None
    modules = dict(model.named_modules())
    if any(isinstance(module, Conv1D) for module in modules.values()):
        raise UserError(
            f"{where}: {config['model_type']} has convolutions for linear layers, which bitsandbytes keeps transposed; "
            "let transformers quantise it"
        )
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return [name for name, module in modules.items() if type(module) is nn.Linear and should_convert_module(name, kept)]


def _read(
    directory: Path, dtype: str, bitsandbytes: Any, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Let transformers read a model, packing each weight as it comes; returns it with its report of the load."""
    model_type = read_model_config(directory)["model_type"]
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what its report says is refused by our caller
    try:
        return _auto_class(model_type).from_pretrained(
            directory,
            config=_without_dropout(AutoConfig.from_pretrained(directory)),
            dtype=DTYPES[dtype],
            device_map={"": device},
            quantization_config=bitsandbytes,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, StrictDataclassError) as error:
        raise _unloadable(directory, model_type, error) from None


def _unloadable(directory: Path, model_type: str, error: Exception) -> UserError:
    reason = re.sub(r"\s+", " ", str(error))[:300]
    return UserError(f"{directory}: the torch engine can't load this model (model_type {model_type}): {reason}")


def _cast_unpacked(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what a packed checkpoint holds plainly (embeddings, norms, head) the run's dtype; transformers does not."""
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _auto_class(model_type: str) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """Choose how transformers opens a model: some that also see are no causal language models to it, as Mistral 3."""
    seeing = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return AutoModelForImageTextToText if model_type in seeing else AutoModelForCausalLM


def _refuse_unfitting_weights(directory: Path, report: dict[str, Any]) -> None:
    """Raise UserError where transformers filled missing weights with random numbers, or left some out."""
    for kind, names in (("lack", report["missing_keys"]), ("hold", report["unexpected_keys"])):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            place = "which the model needs" if kind == "lack" else "which its config has no place for"
            raise UserError(
                f"{directory}: the weights {kind} {sorted(names)[0]}{more}, {place}; "
                "config.json and the safetensors files are not of one model: download it again"
            )


def _bitsandbytes_config(quantization: QuantizationConfig, dtype: str) -> Any:
    if not (quantization.load_in_4bit or quantization.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=quantization.load_in_4bit,
        load_in_8bit=quantization.load_in_8bit,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=False,  # torch_backend/four_bit.py does it
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Turn the base's own dropout off: it is frozen, and only `lora_dropout` is the config's to say."""
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config
