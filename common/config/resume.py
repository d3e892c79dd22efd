"""Which keys may change when a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.config.train import TrainConfig

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


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences of two `to_dict`s that forbid a resume, as `lora.r: 16 -> 8`.

    A key that one side lacks (an older version wrote it) counts as its default.
    """
    default = flat(TrainConfig().to_dict())
    before, after = {**default, **flat(old)}, {**default, **flat(new)}
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
