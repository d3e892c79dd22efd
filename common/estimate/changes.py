"""The smallest changes that make a run fit, in order of harm: each is made only if those before it don't suffice.

Shorter packed rows and checkpointing change no result, offloading costs the host's memory, smaller micro-batches speed,
4 bits a little quality, and a lower rank what the adapter can learn. What turns out needless once a later change is
made is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common.config import TrainConfig
from common.config.resume import flat
from common.estimate.memory import half_up

LEAST_RANK = 4
Total = Callable[[TrainConfig], int]
Settings = dict[str, Any]  # dotted keys


@dataclass(frozen=True)
class Change:
    """Hold keys to set together, and the estimate with them and all changes before."""

    settings: Settings
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the form of `estimate --json`."""
        return {"set": self.settings, "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        return ", ".join(f"{key}: {str(value).lower()}" for key, value in self.settings.items())


def find_changes(
    config: TrainConfig, name: str, device_type: str, longest: int | None, budget: int, total: Total
) -> list[Change]:
    """Return the changes after which `total` is within the budget, or all that help where none suffice."""
    made: list[Settings] = []
    current, size = config, total(config)
    while size > budget:
        step = _next(current, name, device_type, longest, size, total)
        if step is None:
            break
        made.append(step)
        current = changed(current, step)
        size = total(current)
    if size <= budget:
        made = _needed(config, made, budget, total)
    return list(_with_totals(config, _merged(made), total))


def changed(config: TrainConfig, settings: Settings) -> TrainConfig:
    """Return a config with dotted keys set."""
    top = {key: value for key, value in settings.items() if "." not in key}
    for group in ("lora", "quantization"):
        inner = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{group}.")}
        if inner:
            old = config.lora if group == "lora" else config.quantization
            top[group] = old.model_copy(update=inner)
    return config.model_copy(update=top)


def _next(
    config: TrainConfig, name: str, device_type: str, longest: int | None, size: int, total: Total
) -> Settings | None:
    """Return the least harmful change that helps, None where none is left."""
    candidates = _candidates(config, name, device_type, longest)
    return next((each for each in candidates if total(changed(config, each)) < size), None)


def _candidates(config: TrainConfig, name: str, device_type: str, longest: int | None) -> Iterator[Settings]:
    accumulation, rows = config.gradient_accumulation_steps, config.per_device_train_batch_size
    half = half_up(config.max_seq_length)
    if config.packing and longest and half >= longest:
        yield {"max_seq_length": half, "gradient_accumulation_steps": 2 * accumulation}
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    elif name == "torch" and device_type == "cuda" and not config.activation_offloading:
        yield {"activation_offloading": True}
    if rows > 1 and rows % 2 == 0:
        yield {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * accumulation}
    elif rows > 1:
        yield {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * accumulation}
    if not config.quantization.way:
        yield {"quantization.load_in_4bit": True} if name == "torch" else {"quantization.bits": 4}
    if config.lora.r > LEAST_RANK:  # with alpha, so that the scale stays
        yield {"lora.r": half_up(config.lora.r), "lora.lora_alpha": config.lora.lora_alpha / 2}


def _needed(config: TrainConfig, made: list[Settings], budget: int, total: Total) -> list[Settings]:
    """Leave out each change without which the rest suffices, the most harmful that can be spared first."""
    kept = list(made)
    for place in reversed(range(len(made) - 1)):
        rest = [each for each in kept if each is not made[place]]
        trial = _applied(config, rest)
        is_whole = trial.gradient_checkpointing or not trial.activation_offloading
        if is_whole and not _is_repeated(made, place) and total(trial) <= budget:
            kept = rest
    return kept


def _is_repeated(made: list[Settings], place: int) -> bool:
    """Tell whether the keys of a change, absolute values, are set by another too."""
    return any(set(made[place]) & set(each) for number, each in enumerate(made) if number != place)


def _applied(config: TrainConfig, made: list[Settings]) -> TrainConfig:
    for settings in made:
        config = changed(config, settings)
    return config


def _merged(made: list[Settings]) -> list[Settings]:
    """Make one change of several halvings of the same keys."""
    merged: list[Settings] = []
    for settings in made:
        if merged and merged[-1].keys() == settings.keys():
            merged[-1] = settings
        else:
            merged.append(settings)
    return merged


def _with_totals(config: TrainConfig, made: list[Settings], total: Total) -> Iterator[Change]:
    for settings in made:
        before, config = flat(config.to_dict()), changed(config, settings)
        after = flat(config.to_dict())
        yield Change({key: after[key] for key in settings if before[key] != after[key]}, total(config))
