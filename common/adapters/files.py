"""An adapter's folder, whoever wrote it: which of its files count, and their bytes read with suspicion.

Two layouts are known by their config, PEFT's and mlx-lm's; from_peft.py and from_mlx.py know what their tensors
mean. Nothing here trusts a file: lengths are looked at before anything is read into memory, names must be plain, and
pickles are named but never opened, for opening one runs its code. The cost: those of old programs need a conversion.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from common.base.tensor_files import FLOATS, decode
from common.base.weights import read_header
from common.engine import Array
from common.errors import UserError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MLX_WEIGHTS_NAME = "adapters.safetensors"
MLX_FOLDER = "mlx"  # where an adapter's twin for mlx-lm lies beside the files for PEFT

MAX_CONFIG_BYTES = 10_000_000
PLAIN_NAME = re.compile(r"\w[\w-]*(\.[\w-]+)*", re.ASCII)
MLX_KEYS = ("lora_parameters", "fine_tune_type", "num_layers", "lora_layers")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LFS_POINTER = b"version https://git-lfs"
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's zip, pickle's protocols


@dataclass(frozen=True)
class AdapterFolder:
    """Hold where an adapter lies, whose layout it has, and its config as it was written."""

    path: Path
    config: dict[str, Any]

    @property
    def is_mlx(self) -> bool:
        """Tell whether mlx-lm wrote it rather than PEFT."""
        return "peft_type" not in self.config

    @property
    def weights(self) -> Path:
        """Give the path of its weights."""
        return self.path / (MLX_WEIGHTS_NAME if self.is_mlx else WEIGHTS_NAME)


def adapter_path(directory: Path) -> Path:
    """Return the folder that holds an adapter's files: `directory`, or its mlx/ where only that has any."""
    inner = directory / MLX_FOLDER
    return inner if (inner / CONFIG_NAME).is_file() and not (directory / CONFIG_NAME).is_file() else directory


def open_adapter(directory: Path) -> AdapterFolder:
    """Find an adapter's config and weights; raises UserError where it is none, or its weights can't be read safely."""
    path = adapter_path(directory)
    folder = AdapterFolder(path, read_adapter_config(path))
    if not folder.weights.is_file():
        raise UserError(f"{path}: has no {folder.weights.name}; {_what_else(folder)}")
    return folder


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json; raises UserError where it is missing, no JSON, or neither PEFT's LoRA nor mlx-lm's."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        inner = sorted(found.parent.name for found in directory.glob(f"*/{CONFIG_NAME}"))
        expected = f"its folder {inner[0]} has one: name that" if inner else "expected the folder of a PEFT adapter"
        raise UserError(f"{directory}: has no {CONFIG_NAME}; {expected}{'' if inner else ', such as .../final'}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size:,} bytes; expected a config of at most {MAX_CONFIG_BYTES:,}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({error}); save the adapter again") from None
    known = isinstance(config, dict) and ("peft_type" in config or any(key in config for key in MLX_KEYS))
    if not known or config.get("peft_type", "LORA") != "LORA":
        found = f"has peft_type {config['peft_type']!r:.40}, which" if known else "names no peft_type, so it"
        raise UserError(f"{path}: {found} is no LoRA adapter; expected peft_type LORA, or mlx-lm's lora_parameters")
    return config


def read_tensors(path: Path) -> dict[str, Array]:
    """Read a safetensors file as float32; raises UserError that says what is wrong with it.

    The header alone is judged first: a file that claims 10 GB of it, or odd names or dtypes, is never loaded.
    """
    _refuse_disguise(path)
    for name, entry in read_header(path).items():
        if not PLAIN_NAME.fullmatch(name):
            raise UserError(
                f"{path}: holds a tensor named {name[:80]!a}; expected names of modules, such as "
                "model.layers.0.self_attn.q_proj.lora_A.weight; don't use a file that somebody tampered with"
            )
        if entry.get("dtype") not in FLOATS:
            raise UserError(
                f"{path}: {name[:200]} is of dtype {entry.get('dtype')!a:.20}; expected F32, BF16, F16 or F64; "
                "save the adapter in one of them"
            )
    try:
        read = deserialize(path.read_bytes())
        return {name: decode(each["data"], each["dtype"]).reshape(each["shape"]) for name, each in read}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({str(error)[:200]}); save or copy the adapter again") from None


def _refuse_disguise(path: Path) -> None:
    """Raise UserError for what is often found under the name of weights but is none."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise UserError(f"{path}: is a pointer of Git LFS, not the weights; fetch them with: git lfs pull")
    if start.startswith(PICKLED) and start[8:9] != b"{":
        raise UserError(f"{path}: is a pickle under another name; {_UNPICKLE}")


_UNPICKLE = (
    "pickles can run code when opened, so none is; where you trust it, load it with PEFT and save it again: "
    "PeftModel.from_pretrained(base, DIR).save_pretrained(NEW_DIR)"
)


def _what_else(folder: AdapterFolder) -> str:
    """Say what a folder without the weights that its config promises has instead, and what to do."""
    path, writer = folder.path, "an mlx-lm adapter" if folder.is_mlx else "a PEFT adapter"
    pickles = sorted(found.name for pattern in PICKLES for found in path.glob(pattern))
    if pickles:
        return f"found {pickles[0]}, a pickle; {_UNPICKLE}"
    if (path / "adapters.npz").is_file():
        return (
            "found adapters.npz, of an early mlx-lm; turn it into one in that folder: python -c "
            f"\"import mlx.core as mx; mx.save_safetensors('{MLX_WEIGHTS_NAME}', dict(mx.load('adapters.npz')))\""
        )
    saved = sorted(found.name for found in path.glob(f"*_{MLX_WEIGHTS_NAME}"))
    if saved:
        return f"found {saved[-1]}, of one moment of the training; copy it to {MLX_WEIGHTS_NAME}"
    other = WEIGHTS_NAME if folder.is_mlx else MLX_WEIGHTS_NAME
    if (path / other).is_file():
        return f"found {other}, but {CONFIG_NAME} is that of {writer}; bring the config that belongs to it"
    return f"expected {writer}"
