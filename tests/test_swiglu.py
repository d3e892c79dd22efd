"""SwiGLU of both devices against its formula, and what a compiler makes of it."""

import io
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu as swiglu_of_mlx_lm

from mlx_backend.swiglu import gradient_in_kernels, lighten_swiglu, swiglu


def test_value_and_gradient_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    gate = np.concatenate([rng.normal(0, 4, 5000), [-200, -90, -30, 0, 30, 90, 200]]).astype(np.float32)
    x, cotangent = rng.normal(0, 1, (2, gate.size)).astype(np.float32)
    arrays = mx.array(gate), mx.array(x)
    (value,), gradients = mx.vjp(swiglu, list(arrays), [mx.array(cotangent)])
    gate, x, cotangent = (each.astype(np.float64) for each in (gate, x, cotangent))
    sigmoid = 1 / (1 + np.exp(-gate))
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    close = {"rtol": 2e-6, "atol": 1e-7}
    np.testing.assert_allclose(np.array(value), gate * sigmoid * x, **close)
    for of_gate, of_x in (gradients, gradient_in_kernels(arrays, mx.array(cotangent.astype(np.float32)), value)):
        np.testing.assert_allclose(np.array(of_x), cotangent * gate * sigmoid, **close)
        np.testing.assert_allclose(np.array(of_gate), cotangent * x * slope, rtol=2e-6, atol=2e-6)


def test_what_is_not_a_number_is_passed_on():
    assert np.isnan(swiglu(mx.array([mx.nan]), mx.array([1.0])).item())


def test_a_compiler_computes_each_gradient_in_one_kernel():
    gate, x, cotangent = mx.random.normal((3, 4, 8)).astype(mx.bfloat16)
    mx.eval(gate, x, cotangent)
    text = io.StringIO()
    gradients = mx.compile(lambda *arrays: gradient_in_kernels(arrays[:2], arrays[2], None))(gate, x, cotangent)
    mx.export_to_dot(text, *gradients)  # nothing is evaluated: on a CPU that would call a C++ compiler
    operations = re.findall(r'label ?= ?"([A-Za-z]+)"', text.getvalue())
    assert sorted(name[:8] for name in operations if name != "Depends") == ["Compiled"] * 2
    assert all(each.dtype == mx.bfloat16 for each in gradients)


def test_other_dtypes_are_computed_as_mlx_lm_does():
    gate, x = mx.random.normal((2, 8, 16)).astype(mx.bfloat16)
    assert mx.array_equal(swiglu(gate, x), swiglu_of_mlx_lm(gate, x))


def test_it_is_put_into_one_model_and_nowhere_else(monkeypatch):
    args = llama.ModelArgs("llama", 16, 1, 32, 2, 1e-5, 32)
    quick, plain = llama.Model(args), llama.Model(args)
    monkeypatch.setattr("mlx_backend.swiglu.swiglu", lambda gate, x: gate * 0)
    lighten_swiglu(quick)
    x = mx.random.normal((1, 4, 16))
    assert not mx.any(quick.layers[0].mlp(x)).item()
    assert mx.any(plain.layers[0].mlp(x)).item()
    assert isinstance(quick.layers[0].mlp, nn.Module)


def test_macs_keep_their_own(monkeypatch):
    model = llama.Model(llama.ModelArgs("llama", 16, 1, 32, 2, 1e-5, 32))
    monkeypatch.setattr("sys.platform", "darwin")
    lighten_swiglu(model)
    assert type(model.layers[0].mlp) is llama.MLP
