"""The base model on MLX: architecture and weights by mlx-lm, packed where the config says so."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from common.base.quantized import check_quantization, stored_format
from common.base.weights import read_model_config
from common.config import QuantizationConfig
from common.errors import MachineError, UserError
from mlx_backend.amend import amend
from mlx_backend.dialect import translated
from mlx_backend.head import output_head
from mlx_backend.long_rows import lighten_attention
from mlx_backend.names import routers
from mlx_backend.products import choose_products
from mlx_backend.quantize import quantize_layers, set_dtype
from mlx_backend.rope import lighten_rope
from mlx_backend.stored import classes_for_packed
from mlx_backend.swiglu import lighten_swiglu

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def choose_device(device: str) -> mx.Device:
    """Resolve the config's device to MLX's and make it the default; raises MachineError where there is none."""
    if device == "cpu":
        chosen = mx.Device(mx.cpu)
    elif device == "auto":
        chosen = mx.default_device()
    else:
        available = {
            "mps": mx.metal.is_available(),
            "cuda": mx.cuda.is_available(),
            "gpu": mx.is_available(mx.gpu),
        }
        if not available[device]:
            raise MachineError(f"device: {device}: this MLX has no such device here; use device: cpu or auto")
        chosen = mx.Device(mx.gpu)
    mx.set_default_device(chosen)
    return chosen


def load_base(directory: Path, dtype: str, quantization: QuantizationConfig) -> nn.Module:
    """Load a model folder lazily in a dtype, quantising its linear layers where the config says so.

    Raises UserError for an architecture that mlx-lm lacks, weights that don't fit it, or a format it can't have.
    """
    config = read_model_config(directory)
    check_quantization(directory, config, quantization, "mlx")
    classes = classes_for_packed(DTYPES[dtype])
    try:
        model, _ = load_model(directory, lazy=True, model_config=translated(config), get_model_classes=classes)
    except (ValueError, KeyError, TypeError, AttributeError, SystemExit) as error:  # OLMo 1 exits without its package
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise UserError(
            f"{directory}: the MLX engine can't load this model (model_type {config['model_type']}): {reason}"
        ) from None
    set_dtype(model, DTYPES[dtype])
    lighten_attention(model)
    lighten_rope(model)
    lighten_swiglu(model)
    amend(model, config, DTYPES[dtype])
    if quantization.way and stored_format(config) is None:
        quantize_layers(model, quantization, {output_head(model)[0], *routers(model)})
    choose_products(model, DTYPES[dtype])
    return model
