"""`twintune init`: a config of one's own from five answers, with a word on every key that one may want to change.

What is not asked is set to what suits most runs; the file is checked like any other before it is written.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import load_config
from common.errors import UserError
from common.files import write_text

Ask = Callable[[str, str], str]  # a question and the answer to suggest, "" for none

TEMPLATE = """\
# The base: a local folder, or a Hugging Face Hub name.
model_name_or_path: {model}
# Checkpoints, metrics and the final adapter.
output_dir: {output_dir}

# Each line {{"messages": [{{"role": "user", "content": ...}}, ...]}}; README.md, "Data", lists the other forms.
data:
  train: {train}
  {validation}

lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}
{quantization}
max_seq_length: 2048              # longest example, and the length of a packed row; less needs less memory
packing: true                     # whole examples end to end in each row, none sees another
# prefix_sharing: true            # where examples begin alike, with a system prompt: compute that once a row
per_device_train_batch_size: 1
gradient_accumulation_steps: 8    # a step sees 8 rows
gradient_checkpointing: true      # less memory, about a third more time
num_train_epochs: 3
learning_rate: 2e-4
lr_scheduler_type: cosine
warmup_ratio: 0.03

eval_strategy: epoch
save_strategy: epoch
save_minutes: 20                  # and every 20 minutes besides
save_total_limit: 2
load_best_model_at_end: true      # final/ is the checkpoint with the lowest validation loss
"""


@dataclass(frozen=True)
class Answers:
    """Hold the five answers; None is to be asked."""

    model: str | None = None
    train: str | None = None
    validation: str | None = None  # a file, or a share or number of the training examples
    four_bits: bool | None = None
    output_dir: str | None = None


def write_config(path: Path, given: Answers, ask: Ask | None) -> None:
    """Ask what is not given, and write the config; raises UserError where nobody can be asked or a file is there."""
    if path.exists():
        raise UserError(f"{path}: is there already; name another file with --output, or delete it")
    text = config_text(given, ask or _refuse)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        load_config(draft)
    write_text(path, text)


def config_text(given: Answers, ask: Ask) -> str:
    """Return the text of the config."""
    model = given.model or ask("--model: the base, a folder or a Hugging Face Hub name", "")
    train = given.train or ask("--train: the file with your examples", "data/train.jsonl")
    validation = given.validation or ask("--validation: a file, or the share of the examples to hold out", "0.05")
    bits = given.four_bits
    if bits is None:
        bits = ask("--4bit: hold the base in 4 bits, for a quarter of the memory (yes or no)", "no") in ("y", "yes")
    output = given.output_dir or ask("--output-dir: the folder to train into", f"outputs/{Path(model).name}")
    return TEMPLATE.format(
        model=json.dumps(model),
        output_dir=json.dumps(output),
        train=json.dumps(train),
        validation=f"validation_split: {validation}"
        if _is_number(validation)
        else f"validation: {json.dumps(validation)}",
        quantization=_quantization() if bits else "",
    )


def _quantization() -> str:
    """Choose the 4 bits of the engine that `engine: auto` takes on this machine."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if apple:
        return "quantization: {bits: 4}           # MLX's format; for CUDA: {load_in_4bit: true}\n"
    return "quantization: {load_in_4bit: true}  # bitsandbytes' NF4; for MLX: {bits: 4}\n"


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _refuse(question: str, suggested: str) -> str:
    raise UserError(f"{question}: missing, and there is no terminal to ask at; give it as an option")
