"""What tests of exports share: adapters made by PEFT with nothing zero, exported, and their logits by PEFT itself."""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from common.export.export import Request, export

TOKENS = np.arange(3, 103).reshape(2, 50)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_base(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def make_adapter(directory: Path, model: Path, **settings: object) -> Path:
    """Write an adapter of random A, B and magnitudes by PEFT; returns the folder."""
    torch.manual_seed(1)
    base = load_base(model)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    tuned = get_peft_model(base, LoraConfig(init_lora_weights=False, **options))
    for name, parameter in tuned.named_parameters():
        if "lora_magnitude" in name or "modules_to_save" in name:
            parameter.data += 0.05 * torch.rand_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(directory, save_embedding_layers=False)
    return directory


def peft_logits(model: Path, adapter: Path) -> np.ndarray:
    """Compute the logits (2, 50, V) of TOKENS as PEFT loads an adapter."""
    with torch.no_grad():
        return PeftModel.from_pretrained(load_base(model), adapter).eval()(torch.tensor(TOKENS)).logits.numpy()


def model_logits(model: Path) -> np.ndarray:
    """Compute the logits (2, 50, V) of TOKENS as transformers loads a model."""
    with torch.no_grad():
        return load_base(model)(torch.tensor(TOKENS)).logits.numpy()


def run_export(adapter: Path, output: Path, to: str | None, engine: str = "torch", **options: object) -> dict:
    """Export on the CPU; returns what `--json` prints."""
    return export(Request(adapter, output, to, engine=engine, device="cpu", **options), Console(quiet=True))
