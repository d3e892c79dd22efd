"""The values an adapter starts from: bit for bit the same on both engines, and with them a model is still its base.

Everything is drawn or derived in NumPy, each tensor by itself, so that neither the order of modules nor the engine
matters. What needs the base's weights (DoRA's magnitudes, PiSSA, OLoRA, modules trained whole) asks the engine for
them one by one, dequantised: a host copy of one matrix at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np

from common.config import LoraConfig
from common.engine import Array, Engine, TrainState
from common.lora import as_stored, keeps_start, lora_a_key, lora_b_key, magnitude_key, module_of_key, module_scaling

OVERSAMPLING = 8  # columns beyond the rank in the randomised SVD, enough by Halko et al., section 4.2


def starting_weights(engine: Engine, lora: LoraConfig, seed: int) -> dict[str, Array]:
    """Return a fresh adapter for an engine; `lora` is the config's own, not `as_stored`."""
    return initial_weights(engine.adapter_shapes(), seed, lora, engine.base_weight)


def untrained(engine: Engine, lora: LoraConfig, seed: int) -> TrainState:
    """Return an adapter that changes nothing, whatever training starts from: with it a model is its base."""
    return TrainState.fresh(starting_weights(engine, as_stored(lora), seed))


def initial_weights(
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    lora: LoraConfig | None = None,
    base_weight: Callable[[str], Array] | None = None,
) -> dict[str, Array]:
    """Draw or derive the starting adapter as `lora` says; with shapes and seed alone, PEFT's default for A and B.

    `base_weight` gives the frozen weight (out, in) of a module as float32.
    """
    lora = lora or LoraConfig()
    weights: dict[str, Array] = {}
    for key, shape in shapes.items():
        module = module_of_key(key)
        if ".lora_" not in key:
            assert base_weight, f"{key} starts from the base's weight"
            weights[key] = base_weight(module)
        elif key == magnitude_key(module):
            assert base_weight, f"{key} starts from the base's weight"
            weights[key] = np.linalg.norm(base_weight(module), axis=1)
        elif not keeps_start(lora):
            weights[key] = _drawn(key, shape, seed, lora)
        elif key == lora_a_key(module):
            assert base_weight, f"{key} starts from the base's weight"
            weights |= _part_of_base(module, base_weight(module), shape[0] // 2, lora, seed)
    return {key: weights[key] for key in shapes}


def _drawn(key: str, shape: tuple[int, ...], seed: int, lora: LoraConfig) -> Array:
    """Draw A as PEFT does: uniform within 1 / sqrt(in_features), or normal with deviation 1 / r; B is zero."""
    if ".lora_B." in key:
        return np.zeros(shape, np.float32)
    if lora.init_lora_weights == "gaussian":
        return _generator(key, seed).standard_normal(shape, np.float32) / np.float32(shape[0])
    draw = _generator(key, seed).random(shape, np.float32)
    return (draw * 2 - 1) * np.float32(1 / math.sqrt(shape[-1]))


def _part_of_base(module: str, weight: Array, rank: int, lora: LoraConfig, seed: int) -> dict[str, Array]:
    """Take B0 and A0 out of the base and return [B0, B0] and [A0; -A0], whose product is zero (see `as_stored`)."""
    if lora.init_lora_weights == "olora":
        b, a = _leading_qr(weight, rank)
    else:
        method = str(lora.init_lora_weights)
        iterations = int(method.rpartition("_")[2]) if "_niter_" in method else None
        draw = _generator(lora_a_key(module), seed)
        b, a = _principal(weight, rank, module_scaling(module, lora), iterations, draw)
    return {
        lora_a_key(module): np.concatenate([a, -a]).astype(np.float32),
        lora_b_key(module): np.concatenate([b, b], axis=1).astype(np.float32),
    }


def _leading_qr(weight: Array, rank: int) -> tuple[Array, Array]:
    """Split off the first columns of Q and rows of R (OLoRA, arXiv:2406.01775; PEFT's `olora_init`)."""
    q, r = np.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def _principal(
    weight: Array, rank: int, scale: float, iterations: int | None, draw: np.random.Generator
) -> tuple[Array, Array]:
    """Split the principal components evenly over B and A (PiSSA, arXiv:2404.02948; PEFT's `pissa_init`)."""
    if iterations is None:
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vt = _randomised_svd(weight, rank, iterations, draw)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _randomised_svd(weight: Array, rank: int, iterations: int, draw: np.random.Generator) -> tuple[Array, Array, Array]:
    """Find the leading singular triples by subspace iteration (Halko, Martinsson, Tropp 2011, algorithms 4.4, 5.1)."""
    width = min(rank + OVERSAMPLING, *weight.shape)
    basis = np.linalg.qr(weight @ draw.standard_normal((weight.shape[1], width), np.float32))[0]
    for _ in range(iterations):
        basis = np.linalg.qr(weight @ np.linalg.qr(weight.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vt


def _generator(key: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
