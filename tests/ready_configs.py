"""The rule by which configs/MACHINE/MODEL.yaml exist, and what they say: `python tests/ready_configs.py` writes them.

A model has a config for the smallest machine that holds it at all, its base in 4 bits, and for the smallest that holds
it in 16 bits. Of the settings that fit, by our own estimate with a margin, the fastest is taken.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from published_models import MODELS, Published, published_shape

from common.config import LoraConfig, QuantizationConfig, TrainConfig
from common.engine import DeviceMemory
from common.estimate.memory import estimate_memory
from common.estimate.shape import ModelShape
from common.estimate.workload import Workload

CONFIGS = Path(__file__).parent.parent / "configs"
MARGIN = 0.9  # estimates may be off by a tenth
STEP_TOKENS = 16384
LARGE = 2e10  # weights; beyond some 20 billion QLoRA's authors halve the learning rate (arXiv:2305.14314)


@dataclass(frozen=True)
class Machine:
    """Describe a kind of machine: its folder, what it is called, and what a run may fill there."""

    folder: str
    name: str
    engine: str
    memory: DeviceMemory

    @property
    def size(self) -> str:
        """Give the memory alone."""
        return self.name.rpartition(" with ")[2]

    def fits(self, size: int) -> bool:
        """Tell whether so many bytes are within what the machine has, with a margin."""
        return size <= MARGIN * self.memory.free_bytes


def mac(gigabytes: int, share: float) -> Machine:
    """Describe a Mac, whose GPU macOS recommends to fill to a share of the memory (the least of several releases)."""
    memory = DeviceMemory("metal", "a Mac", round(share * gigabytes * 2**30))
    return Machine(f"mac-{gigabytes}gb", f"a Mac with {gigabytes} GB", "mlx", memory)


def card(gigabytes: int) -> Machine:
    """Describe an NVIDIA card, a tenth of which is the driver's and the screen's."""
    memory = DeviceMemory("cuda", "a card", round(0.9e9 * gigabytes), compiles=True)
    return Machine(f"cuda-{gigabytes}gb", f"an NVIDIA card with {gigabytes} GB", "torch", memory)


KINDS = {
    "Mac": [mac(8, 2 / 3), mac(16, 2 / 3), mac(32, 2 / 3), mac(64, 3 / 4)],
    "CUDA": [card(8), card(16), card(24), card(80)],
}
MACHINES = [machine for machines in KINDS.values() for machine in machines]


@dataclass(frozen=True)
class Choice:
    """Hold what differs between the configs."""

    bits: int
    length: int
    rows: int
    checkpointing: bool

    @property
    def accumulation(self) -> int:
        """Give the passes of a step."""
        return STEP_TOKENS // self.length // self.rows

    @property
    def config(self) -> TrainConfig:
        """Give what memory depends on."""
        return TrainConfig(
            packing=True,
            max_seq_length=self.length,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.accumulation,
            gradient_checkpointing=self.checkpointing,
            quantization=QuantizationConfig(load_in_4bit=self.bits == 4, use_double_quant=self.bits == 4),
            lora=LoraConfig(r=16),
        )

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.rows} x {self.length:,}{', c' if self.checkpointing else ''}"


WAYS = [(False, 4), (False, 2), (False, 1), (True, 4), (True, 2), (True, 1)]  # the fastest first
SIXTEEN_BITS = [Choice(16, 2048, rows, checkpointing) for checkpointing, rows in WAYS]
FOUR_BITS = [Choice(4, length, rows, checkpointing) for length in (2048, 1024) for checkpointing, rows in WAYS]


@cache
def shape_of_model(model: Published) -> ModelShape:
    """Build each shape once."""
    return published_shape(model)


def peak(config: TrainConfig, shape: ModelShape, machine: Machine) -> int:
    """Estimate the memory of a run whose data fill every row and are trained on whole, in bytes."""
    return estimate_memory(shape, config, Workload().work(config), machine.engine, machine.memory).total


def ready(model: Published) -> Iterator[tuple[Machine, Choice]]:
    """Yield where a model has a config, and which."""
    for machines in KINDS.values():
        found: list[tuple[Machine, Choice]] = []
        for choices in (SIXTEEN_BITS, FOUR_BITS):
            fitting = ((machine, choice) for machine in machines for choice in choices if _fits(model, machine, choice))
            first = next(fitting, None)
            if first and not (found and machines.index(first[0]) >= machines.index(found[0][0])):
                found.append(first)
        yield from reversed(found)


def _fits(model: Published, machine: Machine, choice: Choice) -> bool:
    return machine.fits(peak(choice.config, shape_of_model(model), machine))


def config_text(model: Published, machine: Machine, choice: Choice, larger: Machine | None) -> str:
    """Write a config; `larger` is the machine that holds the base in 16 bits."""
    rows, accumulation = choice.rows, choice.accumulation
    gated = model.name.startswith(("meta-llama/", "google/"))
    checkpointing = ("true", "less memory, about a third more time") if choice.checkpointing else ("false", "")
    lines = [
        ("# yaml-language-server: $schema=../config.schema.json", ""),
        (f"# {model.title} on {machine.name} or more, its base in {choice.bits} bits.", ""),
        (f"# For {larger.name} or more: configs/{larger.folder}, in 16 bits." if larger else None, ""),
        ("# Name your data, look at it (twintune preview --config FILE), train (twintune train --config FILE).", ""),
        ("", ""),
        (f"model_name_or_path: {model.name}", "gated: accept its licence on the Hub first" if gated else ""),
        (f"output_dir: outputs/{model.file_name.removesuffix('.yaml')}", ""),
        ("", ""),
        ("data:", ""),
        ("  train: data/train.jsonl", 'a line: {"messages": [{"role": "user", "content": ...}, ...]}'),
        ("  validation_split: 0.05", "of the examples, held out; or validation: FILE"),
        ("", ""),
        ("quantization:" if choice.bits == 4 else None, "NF4, the same on either engine"),
        ("  load_in_4bit: true" if choice.bits == 4 else None, ""),
        ("  use_double_quant: true" if choice.bits == 4 else None, ""),
        ("lora: {r: 16, lora_alpha: 32, target_modules: all-linear}", ""),
        ("", ""),
        ("packing: true", "whole examples end to end in each row"),
        (f"max_seq_length: {choice.length}", "tokens of a row; a longer example is cut"),
        (f"per_device_train_batch_size: {rows}", ""),
        (f"per_device_eval_batch_size: {rows}", ""),
        (f"gradient_accumulation_steps: {accumulation}", f"so that a step sees {STEP_TOKENS:,} tokens"),
        (f"gradient_checkpointing: {checkpointing[0]}", checkpointing[1]),
        ("", ""),
        ("num_train_epochs: 3", ""),
        (f"learning_rate: {'2e-4' if model.num_weights < LARGE else '1e-4'}", ""),
        ("lr_scheduler_type: cosine", ""),
        ("warmup_ratio: 0.03", ""),
        ("", ""),
        ("logging_steps: 5", ""),
        ("eval_strategy: epoch", ""),
        ("save_strategy: epoch", ""),
        ("save_minutes: 20", "and every 20 minutes besides"),
        ("save_total_limit: 2", "the newest two, and the best"),
        ("load_best_model_at_end: true", "final/ has the lowest validation loss"),
    ]
    return "".join(
        f"{f'{text:<38}  # {comment}' if comment else text}\n" for text, comment in lines if text is not None
    )


def config_files() -> dict[str, str]:
    """Return the text of every config by its path in configs/."""
    files = {}
    for model in MODELS:
        there = list(ready(model))
        for machine, choice in there:
            sixteen = (other for other, its in there if its.bits == 16 and other.engine == machine.engine)
            larger = next(sixteen, None) if choice.bits == 4 else None
            files[f"{machine.folder}/{model.file_name}"] = config_text(model, machine, choice, larger)
    return files


def readme() -> str:
    """Return the text of configs/README.md."""
    return README.format(tables="\n\n".join(_table(machines) for machines in KINDS.values()))


README = """\
# Ready configs

[quickstart.yaml](quickstart.yaml) is the first run, with its data in [quickstart/](quickstart). The folders here hold a
config for each model named below: for the smallest machine that holds it at all, its base in 4 bits, and for the
smallest that holds it in 16 bits. Find your machine's column, take the config, name your data in it:

```
cp configs/mac-16gb/llama-3.2-3b.yaml mine.yaml
twintune estimate --config mine.yaml
twintune train --config mine.yaml
```

A cell says how many bits the base has, how many rows of how many tokens are computed at a time, and the peak of memory,
estimated for rows that are full and trained on whole; `c` is gradient checkpointing. A step sees 16,384 tokens in each.
On a machine larger than the config's, `gradient_checkpointing: false` is a third faster, and twice
`per_device_train_batch_size` with half of `gradient_accumulation_steps` is the same training; `twintune estimate` says
whether that fits.

{tables}

What a run may fill: on a Mac two thirds of the memory (three quarters from 64 GB), which is what macOS recommends for
the GPU; of a card nine tenths, the rest being the driver's and the screen's. Each config keeps a tenth below that. The
peaks are estimates: none of these has run on the machine that it names. The configs say nothing of engine and device,
and NF4 is the same on both engines, so those for one kind of machine run on the other, and a run moves between them.
Cards without bfloat16 (T4, V100, RTX 20) need `dtype: float16`. Meta's and Google's models are gated: accept their
licence on the Hub, then `hf auth login`.

[apple_silicon_config.json](apple_silicon_config.json), in float32 for a Mac with 32 GB, and
[cuda_config.json](cuda_config.json), in NF4 for a card with 8 GB, are one run of Llama 3.2 3B in JSON with comments.

Written by `python tests/ready_configs.py`; a test holds every config to it.
"""


def _table(machines: list[Machine]) -> str:
    heads = [machine.name.partition(" ")[2] for machine in machines[:1]] + [machine.size for machine in machines[1:]]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(machines)]
    for model in MODELS:
        there = {machine.folder: choice for machine, choice in ready(model)}
        lines.append(f"| {model.title} | {' | '.join(_cells(model, machines, there))} |")
    return "\n".join(lines)


def _cells(model: Published, machines: list[Machine], there: dict[str, Choice]) -> Iterator[str]:
    newest: Machine | None = None
    for machine in machines:
        if choice := there.get(machine.folder):
            newest = machine
            size = peak(choice.config, shape_of_model(model), machine)
            yield f"[{choice}]({machine.folder}/{model.file_name}) {size / 1e9:.1f} GB"
        elif newest:
            yield f"[as {newest.size}]({newest.folder}/{model.file_name})"
        else:
            yield "no"


if __name__ == "__main__":
    for machine in MACHINES:
        shutil.rmtree(CONFIGS / machine.folder, ignore_errors=True)
    for path, text in config_files().items():
        (CONFIGS / path).parent.mkdir(exist_ok=True)
        (CONFIGS / path).write_text(text, encoding="utf-8")
    (CONFIGS / "README.md").write_text(readme(), encoding="utf-8")
