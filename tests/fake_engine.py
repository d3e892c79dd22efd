"""An engine in NumPy: a real, tiny model with true gradients and AdamW, exact to the bit and quick as nothing.

The model is one linear layer from a token's embedding to logits over the vocabulary, frozen, with a LoRA adapter:
`logits = x W^T + s (x A^T) B^T`. It notes every call in `calls`, and refuses to be read while a step is under way,
which is what the Trainer promises. `broken_steps` have a gradient that is not finite.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.config import TrainConfig
from common.engine import Array, MemoryUse, MicroBatch, StepBatch, StepResult, TrainState
from common.flat import FlatLayout
from common.layout import supervised_positions
from common.lora import lora_a_key, lora_b_key, module_scaling
from common.sampling import Chooser, Sampling

MODULE = "model.layers.0.proj"
A, B = lora_a_key(MODULE), lora_b_key(MODULE)
FEATURES = 8


@dataclass
class FakeHandle:
    """Hold a result until it is fetched."""

    name: str  # "train 3", "eval"
    result: StepResult


@dataclass
class FakeEngine:
    """Train a linear softmax model on the host (see common.engine.Engine)."""

    config: TrainConfig
    vocabulary: int = 16
    broken_steps: frozenset[int] = frozenset()
    name: str = "fake"
    device_type: str = "cpu"
    device: str = "no device"
    dtype: str = "float32"
    tied_embeddings: bool = False
    versions: Mapping[str, str] = field(default_factory=lambda: {"numpy": np.__version__})
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Draw the frozen base, the same for every engine."""
        random = np.random.default_rng(0)
        self._embedding = random.standard_normal((self.vocabulary, FEATURES))
        self._base = random.standard_normal((self.vocabulary, FEATURES)) / 4
        self._layout = FlatLayout(self.adapter_shapes())
        self._under_way: list[FakeHandle] = []

    def adapter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {A: (self.config.lora.r, FEATURES), B: (self.vocabulary, self.config.lora.r)}

    def target_modules(self) -> Sequence[str]:
        return ["proj"]

    def load_state(self, state: TrainState) -> None:
        self.calls.append("load_state")
        self._weights = self._layout.flatten(state.weights)
        self._first = self._layout.flatten(state.moment1)
        self._second = self._layout.flatten(state.moment2)
        self._count = state.update_count

    def read_state(self) -> TrainState:
        self.calls.append("read_state")
        assert not self._under_way, f"read while {self._under_way[0].name} is under way"
        copies = (self._layout.unflatten(flat.copy()) for flat in (self._weights, self._first, self._second))
        return TrainState(*copies, self._count)

    def train_step(self, batch: StepBatch, learning_rate: float) -> FakeHandle:
        loss_sum, gradient = 0.0, np.zeros(self._layout.size)
        for micro in batch.micro_batches:
            loss, part = self._loss_and_gradient(micro)
            loss_sum, gradient = loss_sum + loss, gradient + part
        gradient /= batch.num_loss_tokens
        if batch.step in self.broken_steps:
            gradient[0] = np.nan
        norm = float(np.sqrt((gradient**2).sum()))
        if np.isfinite(norm):
            self._update(gradient, norm, learning_rate)
        result = StepResult(loss_sum, batch.num_loss_tokens, norm, bool(np.isfinite(norm)))
        return self._launch(FakeHandle(f"train {batch.step}", result))

    def eval_step(self, batch: MicroBatch) -> FakeHandle:
        waiting = [handle.name for handle in self._under_way if handle.name.startswith("train")]
        assert not waiting, f"evaluated while {waiting[0]} is under way"
        loss, _ = self._loss_and_gradient(batch)
        return self._launch(FakeHandle("eval", StepResult(loss, int(batch.loss_mask.sum()))))

    def fetch(self, handle: FakeHandle) -> StepResult:
        self.calls.append(f"fetch {handle.name}")
        self._under_way.remove(handle)
        return handle.result

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, int]]:
        chooser = Chooser(sampling, prompts)
        last = np.array([prompt[-1] for prompt in prompts])
        while not chooser.finished:
            last = chooser.choose(self._logits(last))
            yield from chooser.accept(last)

    def logits(self, token_ids: Array) -> Array:
        return self._logits(token_ids).astype(np.float32)

    def base_weight(self, module: str) -> Array:
        assert module == MODULE, f"this model has one module, {MODULE}"
        return self._base.astype(np.float32)

    def memory(self) -> MemoryUse:
        return MemoryUse(active_bytes=1000, peak_bytes=2000)

    def close(self) -> None:
        self.calls.append("close")

    def _launch(self, handle: FakeHandle) -> FakeHandle:
        self.calls.append(handle.name)
        self._under_way.append(handle)
        return handle

    def _logits(self, tokens: Array) -> Array:
        weights = self._layout.unflatten(self._weights)
        x = self._embedding[tokens]
        return x @ self._base.T + module_scaling(MODULE, self.config.lora) * (x @ weights[A].T) @ weights[B].T

    def _loss_and_gradient(self, micro: MicroBatch) -> tuple[float, Array]:
        """Return the summed cross-entropy of the supervised positions and its gradient, flat."""
        index, targets, weight = supervised_positions(micro)
        tokens, rows = micro.token_ids.reshape(-1)[index], np.arange(len(index))
        logits = self._logits(tokens)
        logits -= logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        loss = -(log_probabilities[rows, targets] * weight).sum()
        error = np.exp(log_probabilities)
        error[rows, targets] -= 1
        error *= weight[:, None] * module_scaling(MODULE, self.config.lora)
        weights, x = self._layout.unflatten(self._weights), self._embedding[tokens]
        gradients = {A: (error @ weights[B]).T @ x, B: error.T @ (x @ weights[A].T)}
        return float(loss), np.concatenate([gradients[key].reshape(-1) for key in self._layout.shapes])

    def _update(self, gradient: Array, norm: float, learning_rate: float) -> None:
        """Clip by global norm and apply AdamW with bias correction (arXiv:1711.05101), float32 as the engines."""
        config = self.config
        if config.max_grad_norm > 0:
            gradient = gradient * min(1.0, config.max_grad_norm / (norm + 1e-6))
        self._count += 1
        self._first = (config.adam_beta1 * self._first + (1 - config.adam_beta1) * gradient).astype(np.float32)
        self._second = (config.adam_beta2 * self._second + (1 - config.adam_beta2) * gradient**2).astype(np.float32)
        first = self._first / (1 - config.adam_beta1**self._count)
        second = self._second / (1 - config.adam_beta2**self._count)
        decayed = self._weights * (1 - learning_rate * config.weight_decay)
        step = learning_rate * first / (np.sqrt(second) + config.adam_epsilon)
        self._weights = (decayed - step).astype(np.float32)
