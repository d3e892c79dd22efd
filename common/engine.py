"""The seam: what a Trainer hands to an engine, what it gets back, and the one line that opens one.

The cut is at one optimizer step. Above it (order of the data, schedule, checkpoints, metrics) everything is
NumPy and plain Python and exists once; below it (forward, loss, backward, clipping, AdamW) each engine is free
to be fast. The cost: weights cross the seam as NumPy copies, which happens only when a checkpoint is saved.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import MachineError

if TYPE_CHECKING:
    from common.config import LoraConfig, QuantizationConfig, TrainConfig
    from common.convert.source import Source
    from common.convert.target import Target
    from common.doctor.finding import Finding
    from common.sampling import Sampling

PACKAGES = {"mlx": "mlx_backend", "torch": "torch_backend"}
EXTRAS = {"mlx": "mlx", "torch": "cuda"}
LIBRARIES = {"mlx": "mlx", "torch": "torch"}

# Factor on the loss by dtype: float16 gradients of a mean loss underflow; bfloat16 and float32 have the range.
LOSS_SCALE = {"float16": 1024.0}

Array = NDArray[Any]
Handle = Any  # what an engine gives for work under way; only that engine looks inside


@dataclass(frozen=True)
class MicroBatch:
    """Hold the arrays of one forward and backward pass, each of shape (B, T).

    `targets[b, t]` is the token after `token_ids[b, t]`; `loss_mask[b, t]` says whether predicting it counts.
    `segment_ids` number the examples of a row from 1 and are 0 on padding; `position_ids` restart with each. What
    several examples of a row begin with may stand there once, before them, as a segment of its own; the positions of
    these examples then go on from it, and each attends to it and to itself (common/segments.py).
    """

    token_ids: Array  # int32
    targets: Array  # int32
    segment_ids: Array  # int32
    position_ids: Array  # int32
    loss_mask: Array  # bool


@dataclass(frozen=True)
class StepBatch:
    """Hold the micro-batches of one optimizer step and what is known of them on the host."""

    step: int  # counts from 1
    epoch: float  # after this step
    micro_batches: tuple[MicroBatch, ...]
    num_loss_tokens: int
    num_tokens: int  # without padding
    examples: tuple[int, ...]  # rows of the data set, for messages


@dataclass(frozen=True)
class StepResult:
    """Report one step: the summed loss in nats, its token count, the gradient norm before clipping."""

    loss_sum: float
    num_loss_tokens: int
    grad_norm: float = 0.0
    updated: bool = True  # False: loss or gradient was not finite and the update was skipped


@dataclass
class TrainState:
    """Hold all that training changes, as float32 under PEFT keys in PEFT orientation: A (r, in), B (out, r)."""

    weights: dict[str, Array]
    moment1: dict[str, Array]
    moment2: dict[str, Array]
    update_count: int = 0

    @classmethod
    def fresh(cls, weights: Mapping[str, Array]) -> TrainState:
        """Start from given weights with zero moments."""
        return cls(
            weights=dict(weights),
            moment1={key: np.zeros_like(value) for key, value in weights.items()},
            moment2={key: np.zeros_like(value) for key, value in weights.items()},
        )


@dataclass(frozen=True)
class MemoryUse:
    """Report memory in bytes: held now, and the highest so far."""

    active_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class DeviceMemory:
    """Say where an engine would compute, and the memory it may fill there."""

    device_type: str  # "cuda", "metal", "mps" or "cpu"
    device: str  # as a person would say it
    free_bytes: int
    compiles: bool = False  # whether torch compiles layers there without being asked


def update_constants(config: TrainConfig) -> dict[str, float]:
    """Give what clipping and AdamW take from a config, by the names that both engines call it."""
    return {
        "beta1": config.adam_beta1,
        "beta2": config.adam_beta2,
        "epsilon": config.adam_epsilon,
        "weight_decay": config.weight_decay,
        "max_norm": config.max_grad_norm,
    }


class Engine(Protocol):
    """Train, evaluate and generate with one model and one adapter on one device."""

    name: str  # "mlx" or "torch"
    device_type: str  # "cuda", "metal", "mps" or "cpu"
    device: str  # as a person would say it: "NVIDIA H200", "the CPU (2 threads)"
    dtype: str  # of the base weights and activations
    tied_embeddings: bool  # whether the head's matrix is that of the token embedding
    versions: Mapping[str, str]  # library -> version

    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Give the shape of every adapter tensor, by PEFT key, in PEFT orientation."""

    def target_modules(self) -> Sequence[str]:
        """Give the modules that carry an adapter, as `target_modules` of an adapter_config.json."""

    def load_state(self, state: TrainState) -> None:
        """Replace weights, moments and update count."""

    def read_state(self) -> TrainState:
        """Copy weights, moments and update count to the host."""

    def train_step(self, batch: StepBatch, learning_rate: float) -> Handle:
        """Launch one optimizer step and return without waiting for it."""

    def eval_step(self, batch: MicroBatch) -> Handle:
        """Launch the loss of one micro-batch, without dropout, and return without waiting for it."""

    def fetch(self, handle: Handle) -> StepResult:
        """Wait for that step only and read its result."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, int]]:
        """Yield (row, token id) as tokens are chosen; a row ends after a stop token or `max_new_tokens`."""

    def logits(self, token_ids: Array) -> Array:
        """Compute the logits of every position of (B, T) tokens with the adapter: float32 (B, T, vocabulary)."""

    def base_weight(self, module: str) -> Array:
        """Copy the frozen weight (out, in) of a linear module or an embedding, dequantised, as float32."""

    def memory(self) -> MemoryUse:
        """Read the memory the engine's device holds."""

    def close(self) -> None:
        """Release the model and the device's memory."""


def installed(name: str) -> bool:
    """Tell whether the library behind an engine can be imported, without importing it."""
    return importlib.util.find_spec(LIBRARIES[name]) is not None


def choose_engine(name: str) -> str:
    """Resolve "auto": MLX on Apple silicon, else torch; whichever is installed where only one is.

    Raises MachineError where the engine asked for, or any engine at all, is not installed.
    """
    if name == "auto":
        apple = platform.system() == "Darwin" and platform.machine() == "arm64"
        order = ("mlx", "torch") if apple else ("torch", "mlx")
        name = next((each for each in order if installed(each)), order[0])
    if not installed(name):
        raise MachineError(
            f"engine {name}: {LIBRARIES[name]} is not installed in this environment; "
            f"install it with: pip install 'twintune[{EXTRAS[name]}]' (or: make train-{EXTRAS[name]})"
        )
    return name


def open_engine(name: str, config: TrainConfig, model_dir: Path, lora: LoraConfig | None) -> Engine:
    """Load the base model, inject the adapter (none where `lora` is None) and return a ready engine.

    Raises UserError for a model that can't be loaded, MachineError for a device that isn't there.
    """
    return importlib.import_module(PACKAGES[name]).open_engine(config, model_dir, lora)


def examine_engine(name: str) -> Sequence[Finding]:
    """Let an installed engine say how the machine suits it."""
    return importlib.import_module(PACKAGES[name]).examine()


def mlx_dequantize(parts: Sequence[Array], form: Mapping[str, Any]) -> Array:
    """Unpack rows in one of MLX's formats, codes, scales and biases where it has them, to float32 (rows, columns).

    `form` has `bits`, `group_size` and `mode`; scales and biases are float32, or uint8 where the mode keeps them so.
    Raises MachineError where MLX is not installed.
    """
    return importlib.import_module(PACKAGES[choose_engine("mlx")]).dequantize(parts, form)


def mlx_target(source: Source, quantization: QuantizationConfig, dtype: str | None) -> Target:
    """Plan the folder that mlx-lm makes of a model, its weights packed where the config says so.

    Raises MachineError where MLX is not installed, UserError for a model that mlx-lm can't represent.
    """
    return importlib.import_module(PACKAGES[choose_engine("mlx")]).conversion_target(source, quantization, dtype)


def packable_modules(config: Mapping[str, Any], where: Path) -> Sequence[str]:
    """List the linear modules of transformers' model of a config that bitsandbytes packs.

    Raises MachineError where torch is not installed, UserError, which names `where`, for a model it can't build.
    """
    return importlib.import_module(PACKAGES[choose_engine("torch")]).packable_modules(config, where)


def device_memory(name: str, device: str) -> DeviceMemory:
    """Let an installed engine look at the device that the config means, before any model is loaded.

    Raises MachineError for a device that isn't there.
    """
    return importlib.import_module(PACKAGES[name]).device_memory(device)


def matmul_rate(name: str, device: str) -> float:
    """Let an installed engine measure, in a second, the FLOP/s of a matrix product in the dtype it trains in there."""
    return importlib.import_module(PACKAGES[name]).matmul_rate(device)


def is_out_of_memory(name: str, error: Exception) -> bool:
    """Tell whether what an engine raised says that memory ran out."""
    return isinstance(error, MemoryError) or importlib.import_module(PACKAGES[name]).is_out_of_memory(error)
