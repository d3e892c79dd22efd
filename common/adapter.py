"""The adapter's files: written as PEFT writes them, read back with suspicion.

PEFT loads a file with missing tensors with no more than a warning, so nothing is called an adapter here before
its keys, shapes and values were read back from the disk and found whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from common.config import LoraConfig
from common.engine import Array
from common.errors import UserError
from common.lora import HEAD, saved_key

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TIED = "ensure_weight_tying"
EMBEDDING_KEY, HEAD_KEY = saved_key("model.embed_tokens"), saved_key(HEAD)
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that take something out of the base
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def peft_config(
    lora: LoraConfig, target_modules: Sequence[str], base: str, revision: str | None, tied_embeddings: bool = False
) -> dict[str, Any]:
    """Return the adapter_config.json of an adapter: PEFT's classic keys, which every reader knows.

    One newer key tells PEFT that a matrix trained whole is embedding and head at once (`tied_embeddings`).
    """
    layers = lora.layers_to_transform
    return {
        "peft_type": "LORA",
        "task_type": lora.task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(target_modules),
        "layers_to_transform": list(layers) if layers is not None else None,
        "layers_pattern": None,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": list(lora.modules_to_save) if lora.modules_to_save else None,
        "auto_mapping": None,
        **({TIED: True} if tied_embeddings and lora.modules_to_save else {}),
    }


def write_adapter(directory: Path, weights: Mapping[str, Array], config: Mapping[str, Any]) -> None:
    """Write config and weights into a folder that exists.

    PEFT wants embedding and head in the file even where they are one matrix, which training has once.
    """
    if config.get(TIED) and EMBEDDING_KEY in weights:
        weights = {**weights, HEAD_KEY: weights[EMBEDDING_KEY]}
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(directory / WEIGHTS_NAME, weights)


def save_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write a safetensors file with the permissions of any other file (safetensors' own writer makes it private)."""
    path.write_bytes(save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, {"format": "pt"}))


def read_adapter(directory: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read weights, as float32, and config; raises UserError where the folder is no LoRA adapter."""
    config = read_adapter_config(directory)
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{directory}: has no {WEIGHTS_NAME}; expected a PEFT adapter")
    try:
        weights = {name: _float32(**tensor) for name, tensor in deserialize(path.read_bytes())}
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read ({error}); save or copy the adapter again") from None
    if config.get(TIED) and np.array_equal(weights.get(HEAD_KEY, ()), weights.get(EMBEDDING_KEY, (0,))):
        del weights[HEAD_KEY]
    return weights, config


def _float32(dtype: str, shape: Sequence[int], data: bytes) -> Array:
    if dtype == "BF16":  # which NumPy lacks: the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, DTYPES[dtype]).astype(np.float32).reshape(shape)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json; raises UserError where it is missing, no JSON, or not of plain LoRA."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{directory}: has no {CONFIG_NAME}; expected the folder of a PEFT adapter, such as .../final")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: is no LoRA adapter; expected peft_type LORA")
    return config


def lora_of(config: Mapping[str, Any], source: Path) -> LoraConfig:
    """Return the LoRA settings that an adapter_config.json describes; raises UserError for what we can't honour."""
    unknown = [key for key in ("fan_in_fan_out", "target_parameters", "trainable_token_indices") if config.get(key)]
    if unknown or config.get("bias", "none") != "none":
        raise UserError(f"{source / CONFIG_NAME}: uses {', '.join(unknown or ['bias'])}, which is not supported")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        raise UserError(
            f"{source / CONFIG_NAME}: init_lora_weights: {config['init_lora_weights']}: it was saved against a changed "
            "base; save it again with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    if not config.get("target_modules"):
        raise UserError(f"{source / CONFIG_NAME}: names no target_modules; add those the adapter was trained with")
    keys = (
        *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora"),
    )
    try:
        return LoraConfig(**{key: config[key] for key in keys if config.get(key) is not None})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(f"{source / CONFIG_NAME}: {problems}") from None


def check_adapter(
    weights: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], source: Path, trained: bool
) -> None:
    """Raise UserError where weights don't fit the model, hold NaN, or, if `trained`, change nothing."""
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or extra:
        found = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the model has no place for"
        more = len(missing) + len(extra) - 1
        raise UserError(f"{source}: {found}{f' ({more} more)' if more else ''}; is it an adapter of another base?")
    for key, shape in shapes.items():
        if weights[key].shape != tuple(shape):
            raise UserError(f"{source}: {key} has shape {weights[key].shape}; expected {tuple(shape)}")
        if not np.isfinite(weights[key]).all():
            raise UserError(
                f"{source}: {key} holds NaN or infinity; this adapter is broken, take an earlier checkpoint"
            )
    if trained and not any(weights[key].any() for key in shapes if ".lora_B." in key):
        raise UserError(f"{source}: every B is zero: the adapter changes nothing; was the learning rate 0?")
