"""The README.md of an export: what it is, how it was proven, and what the run's own card says of its training."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from common.export.proof import Proof
from common.export.readers import Format
from common.export.source import Source

# What the Hub calls the library of such files, and what they are to a person.
LIBRARIES: dict[Format, tuple[str, str]] = {
    "peft": ("peft", "A LoRA adapter in PEFT's files"),
    "mlx": ("mlx", "A LoRA adapter for mlx-lm, in the folder `mlx`,"),
    "gguf": ("gguf", "A LoRA adapter for llama.cpp and Ollama"),
    "merged": ("transformers", "A model with its LoRA adapter merged into the weights"),
    "merged-gguf": ("gguf", "A model for llama.cpp and Ollama with its LoRA adapter merged into the weights"),
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def export_card(source: Source, to: Format, dtype: str, notes: Sequence[str], proof: Proof, computed_by: str) -> str:
    """Write the model card of an export; without the card of a twintune run it tells what the adapter's files do."""
    library, what = LIBRARIES[to]
    header = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [lora, twintune]"]
    if HUB_NAME.fullmatch(source.base_name) and not Path(source.base_name).exists():
        header.insert(0, f"base_model: {source.base_name}")  # the Hub refuses a card that names a folder here
    rows = [
        ("base", f"`{source.base_name}`"),
        ("stored as", dtype),
        *[("made so", note) for note in notes],
        ("proof", str(proof)),
        ("computed by", computed_by),
    ]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    front = "\n".join(header)
    return f"---\n{front}\n---\n\n# {what}\n\n| | |\n| --- | --- |\n{table}\n\n{_training(source)}"


def _training(source: Source) -> str:
    """Return what is known of the training: the run's card without its header and its code, or the LoRA settings."""
    path = source.folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).strip()
    if "Trained by twintune" in body:
        return "## Training\n\n" + re.sub(r"\A# .*\n", "", body.split("```")[0]).strip() + "\n"
    settings = json.dumps(source.adapter.lora.model_dump(mode="json", exclude_defaults=True), indent=2)
    return f"## LoRA\n\n```json\n{settings}\n```\n"
