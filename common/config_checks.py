"""Check config values beyond their type: single values, keys that contradict each other, changes on resume.

Plain functions apart from the model, so that `config.py` reads as the list of keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from common.config_errors import Conflict, found_text

if TYPE_CHECKING:
    from common.config import LayerFormat, TrainConfig

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def as_texts(value: Any) -> tuple[str, ...]:
    """Turn one text or a list of texts into a tuple."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("expected text or a list of texts")
    return tuple(items)


def as_sources(value: Any) -> tuple[Any, ...]:
    """Turn one path or `{path, weight}`, or a list of these, into a tuple; a weight of 1 needs no group."""
    items = value if isinstance(value, list | tuple) else (value,)
    if not all(_is_source(item) for item in items):
        raise ValueError("expected text or a list of texts, or of groups such as {path: a.jsonl, weight: 2}")
    return tuple(item["path"] if isinstance(item, dict) and item.get("weight", 1) == 1 else item for item in items)


def _is_source(item: Any) -> bool:
    if not isinstance(item, dict):
        return isinstance(item, str) and bool(item)
    path, weight = item.get("path"), item.get("weight", 1)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
    return set(item) <= {"path", "weight"} and isinstance(path, str) and bool(path) and is_number


def check_split(value: float) -> float:
    """Accept a share below 1, or a whole number of examples."""
    if value > 1 and value != int(value):
        raise ValueError("expected a share below 1, e.g. 0.05, or a whole number of examples, e.g. 200")
    return value


def as_reporters(value: Any) -> tuple[str, ...]:
    """Check the names of trackers, and turn Hugging Face's "none" into the empty tuple."""
    names = tuple(dict.fromkeys(name for name in as_texts(value) if name != "none"))
    for name in names:
        if name == "all":
            raise ValueError(f"it would depend on what is installed; name them: {', '.join(TRACKERS)}")
        if name not in TRACKERS:
            raise ValueError(f"{name} is not among {', '.join(TRACKERS)}, none")
    return names


def as_layers(value: Any) -> Any:
    """Turn one layer number or a list of them into a tuple; pydantic checks the numbers."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def as_overrides(value: Any) -> Any:
    """Turn false, a module's way to be left as it is, into null; pydantic checks the formats."""
    if not isinstance(value, dict) or not all(isinstance(own, dict) or not own for own in value.values()):
        raise ValueError("expected modules with a format or false, e.g. {lm_head: {bits: 8}, embed_tokens: false}")
    known: dict[str, list[Any]] = {
        "mode": [*MLX_MODES],
        "group_size": sorted({group for groups, _ in MLX_MODES.values() for group in groups}),
        "bits": sorted({number for _, bits in MLX_MODES.values() for number in bits}),
    }
    for module, own in value.items():
        for name, found in (own or {}).items():
            if found is not None and found not in known.get(name, [found]):
                allowed = ", ".join(map(str, known[name]))
                raise ValueError(f"expected in {module} as {name}, where there is {found_text(found)}: {allowed}")
    return {key: own or None for key, own in value.items()}


def also_false(schema: dict[str, Any]) -> None:
    """Say in the JSON schema of a field of modules that false is as good as null."""
    schema["additionalProperties"]["anyOf"].append({"const": False})


def as_modules(value: Any) -> str | tuple[str, ...]:
    """Check a regular expression, or turn a list of module names into a tuple."""
    if not isinstance(value, str):
        names = as_texts(value)
        if not names:
            raise ValueError("expected at least one name, e.g. [q_proj, v_proj]")
        return names
    if not value:
        raise ValueError("expected all-linear, a regular expression, or a list of names such as [q_proj]")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error}); write all-linear or a list of names") from None
    return value


def known_initialisation(value: bool | str) -> bool | str:
    """Accept the starting points of an adapter that need neither data nor another base."""
    if value in (True, "gaussian", "pissa", "olora") or re.fullmatch(r"pissa_niter_\d+", str(value)):
        return value
    if value == "loftq":
        raise ValueError("LoftQ needs a base that is quantised anew around the adapter, so none is exact; write pissa")
    raise ValueError("expected true, gaussian, pissa, pissa_niter_<n> or olora")


def check_patterns(value: dict[str, Any]) -> dict[str, Any]:
    """Accept names that are regular expressions."""
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error}); write e.g. down_proj: 8") from None
    return value


def known_optimizer(value: str) -> str:
    """Accept the names that mean AdamW, the one optimizer here."""
    if value in ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_hf", "adamw_mlx"):
        return value
    raise ValueError("the only optimizer here is AdamW with float32 moments of the adapter; write adamw_torch")


def known_metric(value: str) -> str:
    """Accept the names of the metrics that `evaluate` can compute."""
    if value in ("valid_json", "exact_match") or re.fullmatch(r"json_field:.+", value):
        return value
    raise ValueError("expected valid_json, exact_match or json_field:<name>, e.g. json_field:intent")


def known_best_metric(value: str) -> str:
    """Accept the names of the one metric that is computed while training."""
    if value in ("eval_loss", "loss"):
        return "eval_loss"
    raise ValueError("the only metric computed while training is the loss on data.validation; write eval_loss")


def check_columns(value: dict[str, str]) -> dict[str, str]:
    """Accept names for the fields that an example can have, and no others."""
    *others, last = _FIELDS
    if not set(value) <= set(_FIELDS):
        raise ValueError(f"expected names for {', '.join(others)} or {last}, e.g. {{prompt: question}}")
    return value


_FIELDS = (
    *("messages", "conversations", "system", "tools", "prompt", "completion", "text"),
    *("instruction", "input", "output", "history", "input_ids", "labels", "attention_mask"),
)


def conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Yield every contradiction between keys that are well-formed each by itself."""
    yield from _dtype_conflicts(config)
    yield from _quantization_conflicts(config)
    yield from _best_conflicts(config)
    yield from _expert_conflicts(config)
    if config.adapter_name_or_path and config.lora.init_lora_weights is not True:
        yield Conflict(
            ("lora.init_lora_weights", "adapter_name_or_path"),
            f"found {config.lora.init_lora_weights}, but adapter_name_or_path says where the adapter starts; "
            "write init_lora_weights: true",
        )
    if config.warmup_steps and config.warmup_ratio:
        yield Conflict(("warmup_ratio", "warmup_steps"), "warmup_steps is set too; keep one of them")
    if config.max_steps <= 0 and config.num_train_epochs <= 0:
        yield Conflict(
            ("num_train_epochs", "max_steps"),
            f"found 0 with max_steps: {config.max_steps}: trains nothing; write e.g. num_train_epochs: 3",
        )
    if config.activation_offloading and not config.gradient_checkpointing:
        yield Conflict(
            ("activation_offloading", "gradient_checkpointing"),
            "found true, but only what gradient_checkpointing keeps is moved; write gradient_checkpointing: true too",
        )
    if config.packing and config.group_by_length:
        yield Conflict(
            ("group_by_length", "packing"),
            "packing is set too, which leaves no padding to save; write group_by_length: false",
        )
    if config.data.validation_split and config.data.validation:
        yield Conflict(
            ("data.validation_split", "data.validation"),
            f"found {config.data.validation_split:g}, but data.validation is set too; keep one of them",
        )
    if config.eval_strategy != "no" and not config.data.validation and not config.data.validation_split:
        yield Conflict(
            ("eval_strategy", "data.validation"),
            f"found {config.eval_strategy} without data.validation; add it, or write eval_strategy: no",
        )


def _expert_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Refuse beside adapted experts what PEFT can't do for them: they are parameters, not modules."""
    lora = config.lora
    wishes = (
        ("lora.lora_dropout", f"{lora.lora_dropout:g}", lora.lora_dropout > 0, "0"),
        ("lora.use_dora", "true", lora.use_dora, "false"),
        ("lora.init_lora_weights", str(lora.init_lora_weights), lora.init_lora_weights is not True, "true"),
    )
    for key, value, wished, instead in wishes:
        if lora.target_parameters and wished:
            name = key.removeprefix("lora.")
            yield Conflict(
                (key, "lora.target_parameters"),
                f"found {value}, which PEFT can't do for target_parameters; write {name}: {instead}, or leave them out",
            )


def _dtype_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Compare the ways to name the dtype of a run: all that are written must agree."""
    wishes = _dtype_wishes(config)
    if not wishes:
        return
    first_key, first_value, first_dtype = wishes[0]
    other = f"which contradicts {first_key}: {first_value}; keep one of them"
    for key, value, dtype in wishes[1:]:
        if dtype != first_dtype:
            yield Conflict((key, first_key), f"found {value}, {other}")
            return
    for flag, state, dtype in (("fp16", config.fp16, "float16"), ("bf16", config.bf16, "bfloat16")):
        if state is False and first_dtype == dtype:
            yield Conflict((flag, first_key), f"found false, {other}")


def _dtype_wishes(config: TrainConfig) -> list[tuple[str, str, str]]:
    """List each request for a dtype as key, value as written, dtype meant."""
    wishes: list[tuple[str, str, str]] = []
    nested = config.quantization.compute_dtype
    if config.dtype != "auto":
        wishes.append(("dtype", config.dtype, config.dtype))
    if config.quantization.load_in_4bit and nested:
        wishes.append(("quantization.compute_dtype", nested, nested))
    if config.fp16 is False and config.bf16 is False:
        wishes.append(("fp16", "false with bf16: false", "float32"))
    if config.fp16:
        wishes.append(("fp16", "true", "float16"))
    if config.bf16:
        wishes.append(("bf16", "true", "bfloat16"))
    return wishes


def _quantization_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Allow one way to quantise, and no setting of a way that isn't chosen unless it has a default."""
    group = config.quantization
    ways = {
        "quantization.load_in_4bit": group.load_in_4bit,
        "quantization.load_in_8bit": group.load_in_8bit,
        "quantization.bits": group.bits is not None,
        "quantization.mode": group.mode is not None and group.bits is None,
    }
    chosen = tuple(key for key, is_set in ways.items() if is_set)
    if len(chosen) > 1:
        yield Conflict(chosen, f"{' and '.join(chosen)} are different ways to quantise the base; keep one")
    for name, value in (("group_size", group.group_size), ("overrides", group.overrides)):
        if value and not group.mlx_format:
            yield Conflict(
                (f"quantization.{name}", "quantization.bits"),
                f"found {found_text(value)} without quantization.bits; write bits: 4 too, or delete {name}",
            )
    yield from _format_conflicts("quantization", group, None)
    for key, own in group.overrides.items():
        if own:
            yield from _format_conflicts(f"quantization.overrides.{key}", own, group)


def _format_conflicts(where: str, own: LayerFormat, above: LayerFormat | None) -> Iterator[Conflict]:
    """Refuse bits and group sizes that a mode lacks."""
    found = complete_format(own, above)
    mode, groups, bits = found["mode"], *MLX_MODES[found["mode"]]
    for name, allowed in (("group_size", groups), ("bits", bits)):
        if found[name] not in allowed:
            listed = " or ".join(map(str, allowed))
            yield Conflict((f"{where}.{name}",), f"found {found[name]} with mode: {mode}, which has {listed}")


def complete_format(own: LayerFormat, above: LayerFormat | None = None) -> dict[str, Any]:
    """Return MLX's `group_size`, `bits` and `mode`: as written, else as above it in the same mode, else MLX's own."""
    mode = own.mode or (above and above.mode) or "affine"
    inherited = above if above and (above.mode or "affine") == mode else own
    groups, bits = MLX_MODES[mode]
    return {
        "group_size": own.group_size or inherited.group_size or (64 if 64 in groups else groups[0]),
        "bits": own.bits or inherited.bits or (4 if 4 in bits else bits[0]),
        "mode": mode,
    }


# Group sizes and bits of each mode of MLX's quantize.
MLX_MODES = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def _best_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Ask for evaluations where the best is wanted, and, as transformers does, for checkpoints in the same rhythm."""
    patience, evaluation, saving = config.early_stopping_patience, config.eval_strategy, config.save_strategy
    if patience and evaluation == "no":
        yield Conflict(
            ("early_stopping_patience", "eval_strategy"),
            f"found {patience}, but eval_strategy is no; write eval_strategy: steps or epoch, or delete the line",
        )
    if not config.load_best_model_at_end:
        return
    if evaluation == "no":
        yield Conflict(
            ("load_best_model_at_end", "eval_strategy"),
            "found true, but eval_strategy is no; write eval_strategy: steps or epoch, or false",
        )
    elif evaluation != saving:
        yield Conflict(
            ("load_best_model_at_end", "save_strategy", "eval_strategy"),
            f"found true, but save_strategy is {saving} and eval_strategy {evaluation}; give both the same value",
        )
    elif evaluation == "steps" and config.save_steps % config.eval_steps:
        nearest = max(1, round(config.save_steps / config.eval_steps)) * config.eval_steps
        yield Conflict(
            ("load_best_model_at_end", "save_steps", "eval_steps"),
            f"found true, but save_steps: {config.save_steps} is no multiple of eval_steps: {config.eval_steps}; "
            f"write e.g. save_steps: {nearest}",
        )


def differences_for_resume(old: Mapping[str, Any], new: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """List the keys that differ between two resolved configs and forbid a resume, as `lora.r: 16 -> 8`."""
    before, after = {**flat(default), **flat(old)}, {**flat(default), **flat(new)}
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and key not in _FREE_ON_RESUME and not key.startswith("evaluation.")
    ]


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the keys of groups their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_group = isinstance(value, Mapping)
        flat.update({f"{name}.{key}": item for key, item in value.items()} if is_group else {name: value})
    return flat


_FREE_ON_RESUME = {
    # Where things lie and who computes: the fingerprints in a checkpoint compare the bytes of data, base and adapter.
    *("model_name_or_path", "revision", "adapter_name_or_path"),
    *("data.train", "data.validation", "data.test"),
    *("output_dir", "run_name", "engine", "device", "report_to"),
    # How long and how fast to go on.
    *("learning_rate", "num_train_epochs", "max_steps", "early_stopping_patience", "max_nonfinite_steps"),
    # What leaves no trace in the weights. Every accepted `optim` is the same AdamW.
    *("logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit"),
    *("save_minutes", "load_best_model_at_end", "metric_for_best_model", "per_device_eval_batch_size"),
    *("gradient_checkpointing", "activation_offloading", "torch_compile", "optim"),
}
