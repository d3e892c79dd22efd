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
from safetensors.numpy import save

from common.adapters.checks import check_base_copies, check_whole, without_base_copies
from common.adapters.files import CONFIG_NAME, WEIGHTS_NAME, open_adapter, read_tensors
from common.adapters.from_mlx import from_mlx
from common.adapters.from_peft import TIED, from_peft
from common.base.tensor_files import TensorSpec, write_safetensors
from common.config import LoraConfig
from common.engine import Array, Engine
from common.errors import UserError
from common.lora import HEAD, saved_key

EMBEDDING_KEY, HEAD_KEY = saved_key("model.embed_tokens"), saved_key(HEAD)
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that take something out of the base


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
        **({"target_parameters": list(lora.target_parameters)} if lora.target_parameters else {}),
        **({TIED: True} if tied_embeddings and lora.modules_to_save else {}),
    }


def write_adapter(
    directory: Path, weights: Mapping[str, Array], config: Mapping[str, Any], dtype: str = "float32"
) -> None:
    """Write config and weights, rounded to a dtype, into a folder that exists.

    PEFT wants embedding and head in the file even where they are one matrix, which training has once.
    """
    if config.get(TIED) and EMBEDDING_KEY in weights:
        weights = {**weights, HEAD_KEY: weights[EMBEDDING_KEY]}
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if dtype == "float32":
        save_tensors(directory / WEIGHTS_NAME, weights)
    else:
        specs = [TensorSpec(key, value.shape, dtype) for key, value in weights.items()]
        write_safetensors(directory / WEIGHTS_NAME, specs, weights.values())


def save_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write a safetensors file with the permissions of any other file (safetensors' own writer makes it private)."""
    path.write_bytes(save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, {"format": "pt"}))


def read_adapter(directory: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read an adapter of PEFT's layout or of mlx-lm's: weights, as float32 under PEFT's keys, and PEFT's config.

    Raises UserError where the folder is no LoRA adapter, or one that is broken or can't be understood.
    """
    folder = open_adapter(directory)
    understand = from_mlx if folder.is_mlx else from_peft
    weights, config = understand(folder.config, read_tensors(folder.weights), folder.path)
    if config.get(TIED) and np.array_equal(weights.get(HEAD_KEY, ()), weights.get(EMBEDDING_KEY, (0,))):
        del weights[HEAD_KEY]
    check_whole(weights, config, folder.path)
    return weights, config


def lora_of(config: Mapping[str, Any], source: Path) -> LoraConfig:
    """Return the LoRA settings that an adapter_config.json describes; raises UserError for what we can't honour."""
    unknown = [key for key in ("fan_in_fan_out", "trainable_token_indices") if config.get(key)]
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
        *("rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save", "use_rslora", "use_dora"),
    )
    try:
        return LoraConfig(**{key: config[key] for key in keys if config.get(key) is not None})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(f"{source / CONFIG_NAME}: {problems}") from None


def fitted_weights(weights: Mapping[str, Array], engine: Engine, source: Path) -> dict[str, Array]:
    """Return the weights that an engine opened for this adapter takes; raises UserError where they don't fit it."""
    kept = without_base_copies(weights)
    check_adapter(kept, engine.adapter_shapes(), source, trained=True)
    check_base_copies(weights, engine.base_weight, source)
    return kept


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
