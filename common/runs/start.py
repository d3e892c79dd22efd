"""A run that begins from the weights of an adapter somebody made before: `adapter_name_or_path`.

Only its weights are taken: an adapter holds neither optimizer state nor a position in the data, so the run begins
at step 0 with zero moments. It must be the adapter that the config describes; nothing of it is reshaped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.adapters.adapter import fitted_weights, lora_of, read_adapter
from common.adapters.checks import without_base_copies
from common.adapters.files import CONFIG_NAME, adapter_path, open_adapter
from common.config import LoraConfig, TrainConfig
from common.engine import Array, Engine
from common.errors import UserError
from common.lora import keeps_start, layer_of, module_of_key
from common.runs.checkpoint import MANIFEST_NAME, STATE_NAME

# What the weights mean depends on these.
SAME = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")


@dataclass(frozen=True)
class StartAdapter:
    """Hold the adapter that a run begins from."""

    path: Path
    weights: Mapping[str, Array]
    lora: LoraConfig
    fingerprint: str  # sha256 of its weights' file

    def __str__(self) -> str:
        what = f"the weights of {self.path}; its optimizer state and position are not known"
        return f"{what}, so the moments are zero and the run begins at step 1"

    def fitted_to(self, engine: Engine, lora: LoraConfig) -> StartAdapter:
        """Return it ready to load; raises UserError where it is of other modules than the config's, or doesn't fit."""
        places = (engine.adapter_shapes(), without_base_copies(self.weights))
        ours, theirs = ({module_of_key(key) for key in keys} for keys in places)
        changes = self._changes(lora, ours, theirs)
        if ours != theirs and changes:
            name = sorted(ours ^ theirs)[0]
            more = f" ({len(ours ^ theirs) - 1} more)" if len(ours ^ theirs) > 1 else ""
            raise UserError(
                f"{self.path}: {'has no' if name in ours else 'also has'} weights for {name}{more}, unlike the config; "
                f"write {', '.join(changes)}"
            )
        return replace(self, weights=fitted_weights(self.weights, engine, self.path))

    def _changes(self, lora: LoraConfig, ours: set[str], theirs: set[str]) -> list[str]:
        """Say what the config would have to be, were it to mean this adapter's modules."""
        layers = {layer for name in theirs if (layer := layer_of(name)) is not None}
        if layers and theirs == {name for name in ours if layer_of(name) in layers}:  # such as mlx-lm's last n layers
            return [f"lora.layers_to_transform: {json.dumps(sorted(layers))}"]
        return [f"lora.{key}: {_written(self.lora, key)}" for key in PLACES if _differs(self.lora, lora, key)]


def is_plain_adapter(resume: str | None) -> bool:
    """Tell whether `--resume` names an adapter and no checkpoint of a run, whole or damaged."""
    if resume is None or resume == "auto":
        return False
    folder = Path(resume)
    has_adapter = (adapter_path(folder) / CONFIG_NAME).is_file()
    return has_adapter and not any((folder / name).exists() for name in (MANIFEST_NAME, STATE_NAME))


def begin_from(config: TrainConfig, adapter: str) -> TrainConfig:
    """Return the config with `adapter_name_or_path`; raises UserError where it names another adapter already."""
    named = config.adapter_name_or_path
    if named and Path(named).expanduser().absolute() != Path(adapter).expanduser().absolute():
        raise UserError(
            f"--resume {adapter}: an adapter without optimizer state, to begin from; but the config has "
            f"adapter_name_or_path: {named} too; keep one of them"
        )
    return config.model_copy(update={"adapter_name_or_path": adapter})


def read_start(config: TrainConfig) -> StartAdapter | None:
    """Read the adapter that a config names, if it does; raises UserError where it is another than the config's."""
    name = config.adapter_name_or_path
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.is_dir():
        on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
        fetch = f"; if it is one of the Hub's, fetch it: hf download {name} --local-dir adapters/{path.name}"
        raise UserError(
            f"adapter_name_or_path: {name}: no such folder; expected that of an adapter{fetch if on_hub else ''}"
        )
    if keeps_start(config.lora):
        begun = config.lora.init_lora_weights
        raise UserError(f"lora.init_lora_weights: {begun}: the run begins from an adapter, {path}; delete one of them")
    weights, settings = read_adapter(path)
    lora = lora_of(settings, path)
    lines = [
        f"lora.{key}: {_written(config.lora, key)}; the adapter has {_written(lora, key)}: write that"
        for key in SAME
        if _differs(lora, config.lora, key)
    ]
    if lines:
        raise UserError(f"{path}: is not the adapter that the config describes:\n  " + "\n  ".join(lines))
    with open_adapter(path).weights.open("rb") as file:
        return StartAdapter(path, weights, lora, hashlib.file_digest(file, "sha256").hexdigest())


def _differs(one: LoraConfig, other: LoraConfig, key: str) -> bool:
    return bool(_value(one, key) != _value(other, key))


def _written(lora: LoraConfig, key: str) -> str:
    return json.dumps(_value(lora, key))


def _value(lora: LoraConfig, key: str) -> Any:
    """Give a value as a config has it; the order of a list says nothing."""
    value = lora.model_dump(mode="json")[key]
    return sorted(value) if isinstance(value, list) else value
