"""The exponential of a Linux CPU against NumPy's, alone and as one loop."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_backend.exponential import HIGHEST, LOWEST, exp, fast_exp


@pytest.mark.parametrize("function", [exp, fast_exp])
def test_exponential_is_numpys_to_a_few_roundings(function):
    x = np.concatenate([np.linspace(LOWEST, HIGHEST, 200_001), np.linspace(-1, 1, 20_001), [0.0]]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(np.array(function(mx.array(x))) - expected) / expected) < 3e-7
    assert function(mx.array(0.0)).item() == 1


@pytest.mark.parametrize("function", [exp, fast_exp])
def test_exponential_stays_finite_beyond_its_ends_and_passes_on_what_is_not_a_number(function):
    ends = function(mx.array([-mx.inf, -1e5, 1e5, mx.inf]))
    assert np.array(ends).tolist() == pytest.approx([np.exp(LOWEST)] * 2 + [np.exp(HIGHEST)] * 2, rel=3e-7)
    assert np.isnan(function(mx.array(mx.nan)).item())
