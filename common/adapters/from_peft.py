"""What PEFT's files mean: the quirks of their config's keys and of their tensors' names, brought to one form.

PEFT itself drops keys it doesn't know and passes over tensors that don't fit with a warning; here each key is honoured,
known to change nothing, or refused. A scale or list of modules that is missing is never guessed: PEFT would take its
own defaults, which may not be what the adapter was trained with. Cost: a key that a newer PEFT adds is refused where
it is switched on, until somebody looks what it means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.adapters.checks import BASE_COPY, deduced_rank
from common.engine import Array
from common.errors import UserError
from common.lora import HEAD, PREFIX, lora_a_key, lora_b_key, magnitude_key, module_of_key, saved_key

TIED = "ensure_weight_tying"  # of a trained matrix that is embedding and head at once

HONOURED = {  # by adapter.lora_of, which refuses the values that nothing here computes
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save", "target_parameters"),
    *("fan_in_fan_out", "init_lora_weights", "peft_type", "task_type", "base_model_name_or_path", "revision"),
    *("trainable_token_indices", TIED),
}
HARMLESS = {
    # About the program that made it
    *("peft_version", "auto_mapping", "inference_mode", "runtime_config", "megatron_core", "merge_weights"),
    # How it began, or was trained: judged by init_lora_weights, or gone once it is trained
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # ms-swift's
    # Which layers: its tensors say that themselves
    "layers_pattern",
}

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch.compile, FSDP, checkpointing
LORA = re.compile(r"(?P<module>.+)\.(?P<kind>lora_[AB])(\.(?P<adapter>\w+))?\.weight")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?P<adapter>(?!weight$)\w+))?(\.weight)?")
SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>\w+)\.(?P<leaf>weight|bias)")
UNSUPPORTED = {
    "lora_embedding_": "LoRA on an embedding",
    "lora_B.bias": "a bias of its own (lora_bias)",
    "token_adapter": "single trained tokens (trainable_token_indices)",
    "trainable_tokens": "single trained tokens (trainable_token_indices)",
}
MERGE = "merge it into its base with PEFT's merge_and_unload, and train from there"


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Array], source: Path
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return an adapter's tensors under PEFT's classic names, and its config with `r` and `lora_alpha` filled in.

    Copies of the base's weights, which PEFT keeps where a head is targeted, stay under `<module>.base_layer.weight`.
    Raises UserError for what is missing, of another kind than plain LoRA, or of unknown meaning.
    """
    _refuse_unknown(config, source)
    weights = _classic(tensors, source)
    missing = [key for key in ("target_modules", "lora_alpha") if config.get(key) is None]
    if missing:
        raise UserError(f"{source}: names no {missing[0]}; {_missing(missing[0], weights)}")
    _refuse_extra(weights, config, source)
    rank = config.get("r") if config.get("r") is not None else deduced_rank(weights, source)
    return weights, {**config, "r": rank, "lora_alpha": whole(config["lora_alpha"])}


def whole(number: Any) -> Any:
    """Return a float without fraction as the integer that it is: `lora_alpha: 16.0` is common, and means 16."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _refuse_unknown(config: Mapping[str, Any], source: Path) -> None:
    on = sorted(key for key in config.keys() - HONOURED - HARMLESS if config[key])
    if on:
        raise UserError(f"{source}: uses {', '.join(on)[:200]}, whose meaning is not known here; {MERGE}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{source}: has task_type {config['task_type']!r:.40}; expected CAUSAL_LM")


def _refuse_extra(weights: Mapping[str, Array], config: Mapping[str, Any], source: Path) -> None:
    """Raise UserError for whole weights of the base that the config doesn't say were trained."""
    named = config.get("modules_to_save")
    saved = tuple(f".{name}" for name in named) if isinstance(named, list) else ()
    for key in weights:
        known = ".lora_" in key or key.endswith(BASE_COPY) or key.rpartition(".")[0].endswith(saved)
        if not known and not (config.get(TIED) and key == saved_key(HEAD)):
            raise UserError(
                f"{source}: holds {key[:200]}, which is no LoRA weight, nor one that modules_to_save names; PEFT saves "
                f"such where a vocabulary was resized or biases were trained; {MERGE}"
            )


def _missing(key: str, weights: Mapping[str, Array]) -> str:
    if key == "lora_alpha":
        return (
            "the scale can't be told from the weights; add the one it was trained with (PEFT's default is 8), "
            'e.g. "lora_alpha": 16'
        )
    names = sorted({module_of_key(name).rsplit(".", 1)[-1] for name in weights if ".lora_" in name})
    listed = ", ".join(f'"{name}"' for name in names)[:300]
    return f"so it can't be told whether weights are missing; it has some of [{listed}]: add those it was trained with"


def _classic(tensors: Mapping[str, Array], source: Path) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    adapters: set[str] = set()
    for name, tensor in tensors.items():
        key, adapter = _classic_name(name, source)
        adapters |= {adapter} if adapter else set()
        if key in weights:
            raise UserError(f"{source}: holds {key[:200]} twice, once as {name[:200]}; save the adapter again")
        weights[key] = tensor
    if len(adapters) > 1:
        raise UserError(
            f"{source}: holds several adapters, {', '.join(sorted(adapters))[:200]}; expected one; "
            "save them one by one with PEFT's save_pretrained(selected_adapters=[...])"
        )
    return weights


def _classic_name(name: str, source: Path) -> tuple[str, str | None]:
    """Return the name PEFT's save_pretrained would have written, and the adapter's own name where it was inside.

    Raw state dicts (FSDP, DeepSpeed, plain torch) keep wrappers and the adapter's name; injected models lack PREFIX.
    """
    for word, meaning in UNSUPPORTED.items():
        if word in name:
            raise UserError(f"{source}: {name[:200]} is {meaning}, which is not supported; {MERGE}")
    path = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    path = path.removeprefix("module.")  # of DDP and DeepSpeed
    while path.startswith(PREFIX):  # twice where a PEFT model was wrapped again
        path = path.removeprefix(PREFIX)
    if found := LORA.fullmatch(path):
        name_of = lora_a_key if found["kind"] == "lora_A" else lora_b_key
        return name_of(found["module"]), found["adapter"]
    if found := MAGNITUDE.fullmatch(path):
        return magnitude_key(found["module"]), found["adapter"]
    if found := SAVED.fullmatch(path):
        return f"{PREFIX}{found['module']}.{found['leaf']}", found["adapter"]
    return PREFIX + path.replace(".original_module.weight", BASE_COPY), None
