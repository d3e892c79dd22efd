"""Memory by part: what lies in memory all the time, and the worst moment of a step on top of it.

A step has three moments that can be the worst: the head, when all layers' activations are kept; the backward pass of
the last layer; the update of the adapter. Parts are those of the worst one, so that they add up to the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.config import TrainConfig
from common.cpus import available_cpus
from common.engine import DeviceMemory
from common.estimate.activations import Setting, Work, activations
from common.estimate.shape import ModelShape, is_head
from common.lora import as_stored, module_rank, select_modules

PARTS = ("weights", "adapters", "optimizer", "activations", "logits", "attention", "framework")
FLOAT32 = 4
# Copies of the adapter, float32, that live during AdamW: clipped gradient and its square, new moments, denominator,
# decayed weights, quotient, result. MLX fuses most of them; torch updates a slice at a time, of torch_backend/step.py.
UPDATE_COPIES = {"torch": 9, "mlx": 4}
UPDATE_SLICE = 2**22  # SLICE there
# Of the largest weight, unpacked in MLX's backward pass: two to six were measured on a CPU, as its queue runs ahead.
MLX_UNPACKED = 5
# Of a CUDA card's free memory: what MLX's work holds on its way there, in portions for that memory (schedule.py there).
WAITING = 0.035
# Beside the numbers: of a CPU's process libraries, tokenizer and code, measured with a tiny model in `twintune train`;
# on CUDA cuBLAS' workspace (32 MiB on Hopper) and tables of angles.
FRAMEWORK = {("torch", "cpu"): 510e6, ("mlx", "cpu"): 390e6, ("torch", "cuda"): 60e6}


@dataclass(frozen=True)
class Memory:
    """Hold bytes by part, at the worst moment."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Add the parts up."""
        return sum(self.parts.values())


def estimate_memory(shape: ModelShape, config: TrainConfig, work: Work, name: str, machine: DeviceMemory) -> Memory:
    """Estimate the peak of a training run on an engine; raises UserError where the adapter's targets match nothing."""
    chosen = _adapted(shape, config)
    how = _setting(shape, config, name, machine)
    trained = _trained_elements(shape, config, chosen)
    adapter = trained * FLOAT32
    kept = _adapter_bytes(config, how, adapter)
    live = activations(shape, work, how)
    kept_alive = live.kept + min(live.kept, _waiting_bytes(config, name, machine))
    at_turn = {"activations": kept_alive, "attention": live.attention}
    moments: list[dict[str, float]] = [
        {**at_turn, "logits": live.logits},
        {**at_turn, "activations": kept_alive + live.passing + _unpacked_bytes(shape, config, name, how.bytes_each)},
        {"optimizer": _update_bytes(name, trained) + max(0, 2 * adapter - kept)},
    ]
    worst = max(moments, key=lambda moment: sum(moment.values()))
    always: dict[str, float] = {
        "weights": _weight_bytes(shape, config, how.bytes_each),
        "adapters": kept,
        "optimizer": 2 * adapter,
        "framework": FRAMEWORK.get((name, machine.device_type), 0),
    }
    parts = {part: always.get(part, 0) + worst.get(part, 0) for part in PARTS}
    return Memory({part: round(parts[part]) for part in PARTS})


def _adapter_bytes(config: TrainConfig, how: Setting, adapter: int) -> float:
    """Count weights and what lies beside them: on MLX the initial ones, on torch the gradient.

    Torch in half precision has a rounded copy of plain LoRA's weights, and no gradient until a backward pass has ended.
    """
    plain = not (config.lora.use_dora or config.lora.modules_to_save or config.lora.target_parameters)
    if how.engine == "torch" and how.bytes_each == 2 and plain:
        return (1.5 if config.gradient_accumulation_steps == 1 else 2.5) * adapter
    return 2 * adapter


def _waiting_bytes(config: TrainConfig, name: str, machine: DeviceMemory) -> float:
    """Count what is not freed yet as work waits for a card; with checkpointing the portions are small."""
    on_cuda = name == "mlx" and machine.device_type == "cuda"
    return WAITING * machine.free_bytes if on_cuda and not config.gradient_checkpointing else 0


def _update_bytes(name: str, trained: int) -> int:
    """Count what AdamW's update holds beside weights, gradient and moments; torch the squares of the whole gradient."""
    if name != "torch" or trained <= UPDATE_SLICE:
        return UPDATE_COPIES[name] * trained * FLOAT32
    return max(UPDATE_COPIES[name] * UPDATE_SLICE, trained) * FLOAT32


def _adapted(shape: ModelShape, config: TrainConfig) -> list[str]:
    head = next((name for name in shape.linear if is_head(name)), None)
    return select_modules(list(shape.linear), head, as_stored(config.lora))


def _trained_elements(shape: ModelShape, config: TrainConfig, chosen: list[str]) -> int:
    """Count A, B and DoRA's magnitudes of each module; what is trained whole counts with embedding and head."""
    lora = as_stored(config.lora)
    count = sum(module_rank(name, lora) * sum(shape.linear[name]) for name in chosen)
    count += sum(shape.linear[name][0] for name in chosen) if lora.use_dora else 0
    whole = _whole(config)
    return count + (1 if shape.tied and whole else len(whole)) * shape.vocabulary * shape.hidden


def _whole(config: TrainConfig) -> set[str]:
    """Return which of embedding and head are trained whole; tied, either is both."""
    return {"embed_tokens", "lm_head"} & set(config.lora.modules_to_save or ())


def _setting(shape: ModelShape, config: TrainConfig, name: str, machine: DeviceMemory) -> Setting:
    dtype = config.compute_dtype
    if dtype == "auto":  # as both engines choose it
        half = machine.device_type == "cuda" or (name == "mlx" and machine.device_type == "metal")
        dtype = "bfloat16" if half else "float32"
    by_default = machine.compiles and not config.lora.target_parameters
    compiled = by_default if config.torch_compile is None else config.torch_compile
    return Setting(
        engine=name,
        device_type=machine.device_type,
        bytes_each=4 if dtype == "float32" else 2,
        compiled=compiled,
        packed=config.packing,
        checkpointing=config.gradient_checkpointing,
        offloading=config.activation_offloading,
        trained_head=bool(_whole(config)),
        dropout=config.lora.lora_dropout > 0,
        streams=available_cpus() if name == "mlx" and machine.device_type == "cpu" else 1,
    )


def _weight_bytes(shape: ModelShape, config: TrainConfig, bytes_each: int) -> float:
    """Count the base in memory: only linear modules of layers are quantised, by either engine."""
    quantization = config.quantization
    if shape.stored:
        return shape.stored + shape.other * bytes_each
    each: float = bytes_each
    if quantization.load_in_4bit:  # blocks of 64 share a float32 scale; quantised again, 8 bits and 4 bytes for 256
        each = 0.5 + ((1 + 4 / 256) / 64 if quantization.use_double_quant else 4 / 64)
    elif quantization.load_in_8bit:
        each = 1.0
    elif form := quantization.mlx_format:  # a scale and a bias a group, or a scale of one byte
        scales = 2 * bytes_each if form["mode"] == "affine" else 1
        each = form["bits"] / 8 + scales / form["group_size"]
    return shape.quantisable * each + shape.other * bytes_each


def _unpacked_bytes(shape: ModelShape, config: TrainConfig, name: str, bytes_each: int) -> float:
    """Count the weights that MLX has unpacked at a time; torch's one matrix is within the error."""
    if name != "mlx" or not (config.quantization.way or shape.stored):
        return 0
    each = bytes_each if config.quantization.mlx_format else FLOAT32  # 4 bits of bitsandbytes go through float32
    sizes = (math.prod(size) for name, size in shape.linear.items() if not is_head(name))
    return MLX_UNPACKED * each * max(sizes, default=0)


def gigabytes(count: float) -> str:
    """Write bytes as a person reads them."""
    return f"{count / 1e9:.2f} GB" if count < 9.995e9 else f"{count / 1e9:.1f} GB"


def half_up(value: int) -> int:
    """Halve a count, never below 1."""
    return max(1, math.ceil(value / 2))
