"""The Triton kernel that unpacks 4-bit weights: bitsandbytes' numbers, and nothing written between rows.

Without a card Triton interprets it, where Triton is installed.
"""

import os

import numpy as np
import pytest
import torch
from engines import DEVICE
from packed_layers import four_bit_layer

if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from torch_backend.unpack_kernel import unpack_into  # it reads TRITON_INTERPRET


@pytest.mark.parametrize("shape", [(96, 128), (50, 64), (33, 200), (3, 2300)])
@pytest.mark.parametrize("double", [False, True])
def test_a_weight_is_unpacked_as_bitsandbytes_does(shape: tuple[int, int], double: bool) -> None:
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    layer = four_bit_layer(weight, torch.float32, double).to("cpu" if DEVICE == "cpu" else "cuda")
    codes, scales, _, *form = layer.packed()
    wide = torch.full((shape[0], shape[1] + 24), 7.0, device=codes.device)
    unpack_into(wide[:, : shape[1]], codes, scales, *form)
    torch.testing.assert_close(wide[:, : shape[1]], layer.dense(), rtol=0, atol=0)
    assert (wide[:, shape[1] :] == 7).all()
