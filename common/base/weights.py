"""What lies in a base model's folder: found, whole, and recognisable again, before anything heavy is loaded.

Only headers and a sample of the bytes are read, so that a 30 GB folder is checked in well under a second; the
price is that a byte flipped between the samples goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.errors import UserError

SAMPLES, SAMPLE_BYTES = 64, 65_536
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def check_model_folder(directory: Path) -> None:
    """Refuse a folder that is no complete model: config, and weight files as long as their headers say."""
    read_model_config(directory)
    for path in weight_files(directory):
        read_header(path)


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a model folder; raises UserError where it is missing or no JSON."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: has no config.json; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no JSON ({error}); download the model again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path}: names no model_type; expected the config of a transformers model")
    return config


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files of a model, all that its index names; raises UserError where one is missing."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            paths = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index}: no index of weights; download the model again") from None
    else:
        paths = sorted(directory.glob("model*.safetensors"))
    if not paths:
        others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pth") for path in directory.glob(pattern))
        found = f"found {', '.join(others[:3])}" if others else "the folder has no weights"
        raise UserError(f"{directory}: {found}; expected model.safetensors (twintune convert makes it from GGUF)")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: named by {index.name} but missing; download the model again")
    return paths


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read the tensors' names, dtypes and shapes of a safetensors file, and check the file's length against them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{path}: no safetensors file, or cut off inside its header ({size:,} bytes); copy it again"
            )
        if length > MAX_HEADER_BYTES:
            raise UserError(
                f"{path}: its header claims {length:,} bytes; expected at most {MAX_HEADER_BYTES:,}; "
                "nothing real has such a one, don't use this file"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            if not all(_describes_a_tensor(entry) for entry in header.values()):
                raise ValueError
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise UserError(f"{path}: its safetensors header can't be read; copy or download it again") from None
    if size != end:
        raise UserError(f"{path}: truncated: {size:,} bytes, its header promises {end:,}; copy or download it again")
    return header


def read_metadata(path: Path) -> dict[str, str]:
    """Read what the writer of a safetensors file, whose header was checked, noted in it."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__") or {})


def _describes_a_tensor(entry: dict[str, Any]) -> bool:
    """Tell whether an entry of a header has the types that its readers count on."""
    whole = [*entry["shape"], *entry["data_offsets"]]
    return isinstance(entry["dtype"], str) and len(entry["data_offsets"]) == 2 and all(type(n) is int for n in whole)


def tensor_names(directory: Path) -> set[str]:
    """Collect the names of all tensors of a model."""
    return {name for path in weight_files(directory) for name in read_header(path)}


def data_start(path: Path) -> int:
    """Return the offset behind the header of a safetensors file, from which its tensors' offsets count."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def vocabulary_size(directory: Path) -> int | None:
    """Read how many tokens a model knows; None where its config doesn't say."""
    config = read_model_config(directory)
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def context_length(directory: Path) -> int | None:
    """Read how many tokens a model can look back on; None where its config doesn't say."""
    config = read_model_config(directory)
    text = {**config, **(config.get("text_config") or {})}
    return next((text[key] for key in ("max_position_embeddings", "n_positions", "n_ctx") if text.get(key)), None)


def fingerprint(directory: Path) -> str:
    """Return a sha256 over config.json and, of each weight file, name, size, header and 64 spread samples."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def rope_in_both_forms(config: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE keys of a config in the old top-level form and in transformers 5's `rope_parameters`.

    mlx-lm 0.32 reads only the first and falls silently back to theta 10000; transformers 5 writes only the second.
    Models with one RoPE per layer type (a dict of dicts) are left as they are: mlx-lm has keys of its own for them.
    """
    modern = config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in modern.values()):
        return {}
    theta = modern.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        return {}
    scaling = {key: value for key, value in modern.items() if key != "rope_theta"} or config.get("rope_scaling")
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else scaling,
        "rope_parameters": {**(scaling or {}), "rope_type": kind, "rope_theta": theta},
    }
