"""A model small enough to try: the first layers of a checkpoint, exactly as they are, and a narrow window.

What a checkpoint computes in its first layers needs nothing of the others, so two engines that agree on those read its
config and tensors alike. Tensors are copied byte by byte, quantised ones too. A checkpoint whose layers can't be told
by their names is left whole. Sliding windows become narrower than the tokens that will be tried, where they can show.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.base.weights import read_header, read_model_config, weight_files

LARGE = 1_000_000_000  # bytes of weights; less is tried whole
WINDOW = 8
FEWEST = 2
INTERVALS = ("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval", "first_k_dense_replace")
Tensors = dict[str, tuple[Path, dict[str, Any]]]


def write_shortened(model: Path, target: Path, large: int = LARGE) -> str:
    """Write a smaller checkpoint of a model into an empty folder; returns what of it was kept, in words."""
    tensors = {name: (path, entry) for path in weight_files(model) for name, entry in read_header(path).items()}
    config = read_model_config(model)
    text = config.get("text_config") or config
    total, kept = text.get("num_hidden_layers", 0), layers_to_keep(text)
    prefix = _layers_prefix(tensors, total)
    what = "the whole model"
    if prefix and kept < total and sum(_size(entry) for _, entry in tensors.values()) > large:
        what = f"the first {kept} of its {total} layers"
        _copy({name: each for name, each in tensors.items() if _number(name, prefix) < kept}, target)
        text |= {key: value[:kept] for key, value in text.items() if isinstance(value, list) and len(value) == total}
        text["num_hidden_layers"] = kept
    else:
        for path in {*weight_files(model), *model.glob("model.safetensors.index.json")}:
            (target / path.name).symlink_to(path.resolve())
    if text.get("sliding_window"):
        text["sliding_window"] = min(text["sliding_window"], WINDOW)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return what


def layers_to_keep(config: Mapping[str, Any]) -> int:
    """Count the first layers among which is one of each kind."""
    kinds = config.get("layer_types") or []
    firsts = [kinds.index(kind) + 1 for kind in set(kinds)]
    intervals = [config[key] + (key == "first_k_dense_replace") for key in INTERVALS if config.get(key)]
    return max(FEWEST, *firsts, *(each for each in intervals if isinstance(each, int)), 0)


def _layers_prefix(tensors: Tensors, total: int) -> str | None:
    """Find the one part of the names that numbers all layers; None where there is none, or several."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        if found := re.match(r"(.+?)\.(\d+)\.", name):
            numbers[found[1]].add(int(found[2]))
    fitting = [prefix for prefix, each in numbers.items() if total and each == set(range(total))]
    return fitting[0] if len(fitting) == 1 else None


def _number(name: str, prefix: str) -> int:
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _size(entry: Mapping[str, Any]) -> int:
    first, last = entry["data_offsets"]
    return last - first


def _copy(tensors: Tensors, folder: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (_, entry) in tensors.items():
        header[name] = entry | {"data_offsets": [place, place + _size(entry)]}
        place += _size(entry)
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for path, entry in tensors.values():
            with path.open("rb") as source:
                begin = 8 + int.from_bytes(source.read(8), "little")
                source.seek(begin + entry["data_offsets"][0])
                out.write(source.read(_size(entry)))
