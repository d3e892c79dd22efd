"""The README.md beside a finished adapter: what it was trained from and on, and how to load it."""

from __future__ import annotations

import json

from common.config import LoraConfig, TrainConfig
from common.engine import Engine
from common.lora import as_stored, keeps_start
from common.runs.best import Best
from common.runs.run import RunFolder
from common.trainer import Progress
from common.view.metrics import read_metrics

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, twintune]
---

# LoRA adapter for {base}

Trained by twintune with the {engine} engine on {device} ({versions}).

| | |
| --- | --- |
| data | {data} |
| fingerprints | data `{data_fingerprint}`, base `{base_fingerprint}` |
| begun from | {start} |
| steps, epochs | {steps}, {epochs:.2f} |
| weights | {weights} |
| last training loss | {loss} |
| last validation loss | {eval_loss} |
| kind | {kind} |
| rank, alpha, dropout | {r}, {alpha}, {dropout} |
| learning rate | {learning_rate:g}, {schedule} |
| dtype of the base | {dtype} |
| supervised tokens | {supervised_tokens:,} |

Everything else is in `training_config.json`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base_literal})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def model_card(config: TrainConfig, engine: Engine, progress: Progress, folder: RunFolder, best: Best | None) -> str:
    """Write the model card of a run from its config, how far it came, its folder, and the best step if shipped."""
    rows = read_metrics(folder.path / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    evaluated = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    return CARD.format(
        base=config.model_name_or_path,
        base_literal=json.dumps(config.model_name_or_path),
        engine=engine.name,
        device=engine.device,
        versions=", ".join(f"{library} {version}" for library, version in engine.versions.items()),
        data=", ".join(f"`{path}`" for path in config.data.train),
        data_fingerprint=folder.identity.data,
        base_fingerprint=folder.identity.base,
        start=f"the adapter `{config.adapter_name_or_path}`" if config.adapter_name_or_path else f"seed {config.seed}",
        steps=progress.step,
        epochs=progress.epoch,
        weights=f"the best: {best}" if best else "of the last step",
        loss=f"{losses[-1]:.4f}" if losses else "not measured",
        eval_loss=f"{evaluated[-1]:.4f}" if evaluated else "not measured",
        kind=_kind(config.lora),
        r=as_stored(config.lora).r,
        alpha=as_stored(config.lora).lora_alpha,
        dropout=config.lora.lora_dropout,
        learning_rate=config.learning_rate,
        schedule=config.lr_scheduler_type,
        dtype=engine.dtype,
        supervised_tokens=progress.supervised_tokens,
    )


def _kind(lora: LoraConfig) -> str:
    """Name the member of the LoRA family in words."""
    parts = ["DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"]
    if keeps_start(lora):
        parts.append(f"from {lora.init_lora_weights}, held as the difference to its start at twice the rank {lora.r}")
    if lora.modules_to_save:
        parts.append(f"with {', '.join(lora.modules_to_save)} trained whole")
    if lora.target_parameters:
        parts.append(f"on {', '.join(lora.target_parameters)} too")
    return ", ".join(parts)
