"""One training step of a rival, after another: Unsloth and PEFT in a bare loop, TRL by its SFTTrainer.

A bare loop flatters a rival, which does without its trainer's work. Each runs in a process of its own.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_shapes import PADDED_ROWS, TARGETS, WARM_UP, Example, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHA = 32


def unsloth_model(folder: Path, shape: Shape, length: int) -> Any:
    """Load a model as Unsloth's notebooks do."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=shape.nf4,
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=shape.r,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if shape.checkpointing else False,
    )


def peft_model(folder: Path, shape: Shape, length: int) -> Any:
    """Load a model as PEFT's documentation does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": DEVICE}, "attn_implementation": "sdpa"}
    if shape.nf4:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **settings).requires_grad_(False)
    if shape.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=shape.r, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"))


LOADERS: dict[str, Callable[[Path, Shape, int], Any]] = {"unsloth": unsloth_model, "peft": peft_model}


def loop(who: str, folder: Path, shape: Shape, examples: list[Example], steps: int) -> Iterator[tuple[int, int]]:
    """Train in a bare loop; yields the tokens and supervised tokens of each step once it is done."""
    model = LOADERS[who](folder, shape, shape.length)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=DEVICE == "cuda")
    for batch in batches(shape, examples, WARM_UP + steps):
        step(model, optimizer, {name: torch.from_numpy(array).to(DEVICE) for name, array in batch.items()})
        yield int(batch["attention_mask"].sum()), int((batch["labels"][:, 1:] >= 0).sum())


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    """Train one step and wait for it."""
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()


def batches(shape: Shape, examples: list[Example], number: int) -> Iterator[dict[str, np.ndarray]]:
    """Pad examples to batches, in the order in which they stand, again and again."""
    rows = PADDED_ROWS if shape.short else shape.rows
    for first in range(0, number * rows, rows):
        chosen = [examples[(first + row) % len(examples)] for row in range(rows)]
        width = max(len(tokens) for tokens, _ in chosen)
        ids, mask, labels = (np.full((rows, width), fill, np.int64) for fill in (0, 0, -100))
        for row, (tokens, supervised) in enumerate(chosen):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            labels[row, : len(tokens)] = np.where(supervised, tokens, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trl(folder: Path, shape: Shape, examples: list[Example], steps: int) -> Iterator[tuple[int, int]]:
    """Train with TRL's SFTTrainer on tokenised examples; yields as `loop` does, with the times of its own steps."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = PADDED_ROWS if shape.short else shape.rows
    config = SFTConfig(
        output_dir=str(folder.parent / "trl"),
        max_length=None,
        max_steps=WARM_UP + steps,
        per_device_train_batch_size=rows,
        learning_rate=1e-4,
        optim="adamw_torch_fused" if DEVICE == "cuda" else "adamw_torch",
        bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu",
        gradient_checkpointing=shape.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    data = Dataset.from_list(
        [
            {"input_ids": tokens, "labels": [t if s else -100 for t, s in zip(tokens, supervised, strict=True)]}
            for tokens, supervised in examples
        ]
    )
    counts: list[tuple[int, int, float]] = []

    class Mark(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            counts.append((*seen.pop(0), time.perf_counter()))

    trainer = SFTTrainer(
        model=peft_model(folder, shape, shape.length),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Mark()],
    )
    seen: list[tuple[int, int]] = []
    collate = trainer.data_collator

    def counting(features: list[dict[str, Any]]) -> Any:
        seen.append(
            (
                sum(len(each["input_ids"]) for each in features),
                sum(label >= 0 for each in features for label in each["labels"][1:]),
            )
        )
        return collate(features)

    trainer.data_collator = counting
    trainer.train()
    yield from counts
