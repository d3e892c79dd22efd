"""What the programs that load adapters can't load, with the source of each limit: the one table `--for` goes by.

A limit is here because the program's own code or manual says so; `source` names the place. Read there in November 2026:
vLLM, SGLang, TGI, LoRAX, mlx-lm, Ollama's manual; what llama.cpp loads is tested here; the others call PEFT.
Programs move: where one has learnt more, a file made for it still loads, because every adaptation is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.errors import UserError

Format = Literal["peft", "mlx", "gguf", "merged", "merged-gguf"]

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Reader:
    """Hold the limits of one program, and what a person sets in it."""

    name: str
    adapter: Format  # as which it loads an adapter
    merged: Format  # as which it loads a model, where it can't load the adapter
    source: str
    usage: str  # {folder}, {base} and {rank} are filled in
    dora: bool = False
    saved: bool = False  # modules_to_save
    rslora: bool = False
    patterns: bool = False  # rank_pattern and alpha_pattern
    every_layer: bool = False  # a kind of module that one layer lacks is left out of all
    together: tuple[Sequence[str], ...] = ()  # modules of which it wants all or none, as it fuses them
    max_rank: int | None = None
    rank_steps: tuple[int, ...] = ()  # the values of its own setting for the highest rank


READERS = (
    Reader(
        "vllm",
        "peft",
        "merged",
        "vllm/lora/peft_helper.py (no DoRA, no modules_to_save, one r and lora_alpha), vllm/config/lora.py (ranks)",
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}",
        rslora=True,
        max_rank=VLLM_RANKS[-1],
        rank_steps=VLLM_RANKS,
    ),
    Reader(
        "sglang",
        "peft",
        "merged",
        "python/sglang/srt/lora/lora.py (scaling = lora_alpha / r; q, k, v and gate, up are stacked), lora_config.py",
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
        "--lora-paths NAME={folder}",
        together=(QKV, GATE_UP),
    ),
    Reader(
        "tgi",
        "peft",
        "merged",
        "server/text_generation_server/adapters/lora.py (LoraWeights.prepare_weights: every layer, one rank and alpha)",
        "LORA_ADAPTERS=NAME={folder} text-generation-launcher --model-id {base}",
        rslora=True,
        every_layer=True,
    ),
    Reader(
        "lorax",
        "peft",
        "merged",
        "server/lorax_server/adapters/lora.py (LoraWeights.load: every layer, one rank and alpha)",
        'lorax-launcher --model-id {base}, and in a request: "adapter_id": "{folder}", "adapter_source": "local"',
        rslora=True,
        every_layer=True,
    ),
    Reader(
        "llama.cpp",
        "gguf",
        "merged-gguf",
        "src/llama-adapter.cpp (lora_a and lora_b alone, one alpha), convert_lora_to_gguf.py",
        "llama-server -m BASE.gguf --lora {folder}/adapter-f32.gguf",
        patterns=True,
    ),
    Reader(
        "ollama",
        "gguf",
        "merged-gguf",
        "docs.ollama.com/import (GGUF adapters; its own reader of safetensors knows no rsLoRA)",
        "ollama create NAME -f {folder}/Modelfile",
        patterns=True,
    ),
    Reader(
        "mlx-lm",
        "mlx",
        "merged",
        "mlx_lm/tuner/utils.py (load_adapters, linear_to_lora_layers: one rank and scale, lora or dora)",
        "mlx_lm.generate --model {base} --adapter-path {folder}",
        dora=True,
    ),
    *(
        Reader(
            name,
            "peft",
            "merged",
            source,
            usage,
            dora=True,
            saved=True,
            rslora=True,
            patterns=True,
        )
        for name, source, usage in (
            ("peft", "peft itself", 'PeftModel.from_pretrained(base, "{folder}")'),
            ("transformers", "integrations/peft.py: it calls peft", 'model.load_adapter("{folder}")'),
            ("unsloth", "unsloth/models/loader.py: it calls peft", 'FastLanguageModel.from_pretrained("{folder}")'),
            ("axolotl", "src/axolotl/loaders/adapter.py: it calls peft", "lora_model_dir: {folder}"),
        )
    ),
)


def find_reader(name: str) -> Reader:
    """Return the program of that name; raises UserError for one that is not in the table."""
    for reader in READERS:
        if reader.name == name.lower():
            return reader
    known = ", ".join(reader.name for reader in READERS)
    raise UserError(f"--for {name}: unknown; expected one of {known}; any program that calls PEFT reads --to peft")
