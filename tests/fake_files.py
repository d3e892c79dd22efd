"""A base and an adapter of it on disk, for the engine in NumPy, which looks at no weights but the adapter's."""

import json
from pathlib import Path

import numpy as np
from fake_engine import A, B
from safetensors.numpy import save_file
from tiny_run import adapter_files
from tiny_tokenizer import CHATML, write_tokenizer

from common.adapters.adapter import write_adapter
from common.config import LoraConfig

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["proj"])
RANDOM = np.random.default_rng(4)
WEIGHTS = {
    A: RANDOM.standard_normal((2, 8)).astype(np.float32),
    B: RANDOM.standard_normal((416, 2)).astype(np.float32),
}
STANDS = {"model_type": "llama", "vocab_size": 416, "max_position_embeddings": 4096}


def write_base(folder: Path, **config: object) -> Path:
    write_tokenizer(folder, CHATML)
    (folder / "config.json").write_text(json.dumps(STANDS | config))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")  # the engine in NumPy reads none
    return folder


def write_tuned(folder: Path, base: Path, scale: float = 1.0) -> None:
    """Write an adapter whose part is so many times that of WEIGHTS."""
    folder.mkdir(parents=True)
    config = {**adapter_files().config, "base_model_name_or_path": str(base)}
    write_adapter(folder, {A: WEIGHTS[A], B: WEIGHTS[B] * np.float32(scale)}, config)
