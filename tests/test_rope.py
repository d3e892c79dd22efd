"""Rotary embeddings as MLX on CUDA has them turn as MLX's own do, in every kind of module."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import FAMILIES, write_family

from common.config import QuantizationConfig
from mlx_backend import rope as ours
from mlx_backend.model import load_base

HEADS, LENGTH, WIDTH = 4, 50, 32
TOLERANCE = 2e-3  # of numbers up to 4 in float16, of which rounding the result is 1e-3


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape).astype(mx.float16)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("offset", [0, 7, np.array(5), np.array([3, 0, 11])], ids=str)
@pytest.mark.parametrize("own_wavelengths", [False, True])
@pytest.mark.parametrize("dims", [WIDTH, 12])
def test_angles_and_gradient_are_mlxs(traditional, offset, own_wavelengths, dims):
    mx.random.seed(0)
    x, cotangent = normal(3, HEADS, LENGTH, WIDTH), normal(3, HEADS, LENGTH, WIDTH)
    how: dict[str, Any] = {
        "traditional": traditional,
        "base": None if own_wavelengths else 1e4,
        "scale": 0.5,
        "freqs": mx.random.uniform(1, 1000, (dims // 2,)) if own_wavelengths else None,
        "offset": offset if isinstance(offset, int) else mx.array(offset),
    }
    found = mx.vjp(lambda x: ours.rope(x, dims, **how), [x], [cotangent])
    expected = mx.vjp(lambda x: mx.fast.rope(x, dims, **how), [x.astype(mx.float32)], [cotangent.astype(mx.float32)])
    for one, other in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert one.dtype == mx.float16
        np.testing.assert_allclose(np.array(one), np.array(other), atol=TOLERANCE)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, TOLERANCE), (mx.float32, 5e-5)], ids=str)
@pytest.mark.parametrize("dims", [WIDTH, 12])
def test_each_position_of_a_packed_row_may_be_a_row_of_its_own(traditional, dtype, tolerance, dims):
    x, positions = normal(240, HEADS, 1, WIDTH).astype(dtype), mx.arange(240) % 80
    how: dict[str, Any] = {"traditional": traditional, "base": 1e4, "scale": 1.0}
    found, gradient = mx.vjp(lambda x: ours.rope(x, dims, **how, offset=positions), [x], [x])
    exact = x.astype(mx.float32)[:, :, 0]
    rows = exact.reshape(3, 80, HEADS, WIDTH).swapaxes(1, 2)
    expected = mx.vjp(lambda x: mx.fast.rope(x, dims, **how, offset=0), [rows], [rows])
    for one, other in zip((*found, *gradient), (*expected[0], *expected[1]), strict=True):
        assert one.dtype == dtype
        other = other.swapaxes(1, 2).reshape(x.shape)
        np.testing.assert_allclose(np.array(one), np.array(other), atol=tolerance)


def test_a_compiled_gradient_is_the_same():
    x = normal(2, HEADS, LENGTH, WIDTH)
    how: dict[str, Any] = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 0}

    def gradient(x: mx.array) -> mx.array:
        return mx.grad(lambda x: mx.square((ours.rope(x, WIDTH, **how) + x).astype(mx.float32)).sum())(x)

    np.testing.assert_allclose(np.array(mx.compile(gradient)(x)), np.array(gradient(x)), atol=4 * TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_that_turns_calls_it_with_what_it_takes(name: str, tmp_path: Path, monkeypatch):
    calls = []

    def checked(x: mx.array, *args: Any, **how: Any) -> mx.array:
        numbers = normal(*x.shape)  # x itself can't be computed everywhere: a CPU's experts have float32 only
        turned, expected = original(numbers, *args, **how), mx.fast.rope(numbers.astype(mx.float32), *args, **how)
        np.testing.assert_allclose(np.array(turned), np.array(expected), atol=TOLERANCE)
        calls.append(args)
        return original(x, *args, **how)

    original = ours.rope
    monkeypatch.setattr(ours, "rope", checked)
    monkeypatch.setattr(ours, "on_cuda", lambda: True)
    load_base(write_family(tmp_path, name), "float16", QuantizationConfig())(mx.arange(5, 45).reshape(2, 20))
    assert calls
