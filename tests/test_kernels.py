"""The Triton kernels: bitsandbytes' numbers, the formula's losses, copies as they were, and gaps that stay.

Without a card Triton interprets them (tests/conftest.py), where it is installed.
"""

import numpy as np
import pytest
import torch
from engines import TORCH_DEVICE
from packed_layers import four_bit_layer
from plain_loss import AFTER, compare_with_plain

pytest.importorskip("triton")

from common.logits import AfterHead
from torch_backend.copy_kernel import Copies
from torch_backend.loss_kernel import softmax_error_
from torch_backend.unpack_kernel import unpack_into


@pytest.mark.parametrize("shape", [(96, 128), (50, 64), (33, 200), (3, 2300)])
@pytest.mark.parametrize("double", [False, True])
def test_a_weight_is_unpacked_as_bitsandbytes_does(shape: tuple[int, int], double: bool) -> None:
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    layer = four_bit_layer(weight, torch.float32, double).to(TORCH_DEVICE)
    codes, scales, _, *form = layer.packed()
    wide = torch.full((shape[0], shape[1] + 24), 7.0, device=codes.device)
    unpack_into(wide[:, : shape[1]], codes, scales, *form)
    torch.testing.assert_close(wide[:, : shape[1]], layer.dense(), rtol=0, atol=0)
    assert (wide[:, shape[1] :] == 7).all()


def test_parts_of_a_flat_array_are_copied_to_their_places_alone() -> None:
    flat, wide = torch.randn(20_000, device=TORCH_DEVICE), torch.zeros(50, 70, device=TORCH_DEVICE)
    tall = torch.zeros(3000, 1, device=TORCH_DEVICE)
    places = [slice(5, 1805), slice(4000, 4140), slice(9000, 12_000)]  # one is longer than a program's share
    targets = [wide[:30, :60], wide[30:, 60:67], tall]
    Copies(places, targets).make(flat)
    for place, target in zip(places, targets, strict=True):
        torch.testing.assert_close(target.reshape(-1), flat[place], rtol=0, atol=0)
    assert wide[30:, :60].abs().sum() == wide[:30, 60:].abs().sum() == wide[:, 67:].abs().sum() == 0


@pytest.mark.parametrize("vocabulary", [1, 2, 301, 16384, 16385, 40_001])
@pytest.mark.parametrize("after", AFTER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_their_derivative_are_those_of_the_formula(
    vocabulary: int, after: AfterHead, dtype: torch.dtype
) -> None:
    compare_with_plain(softmax_error_, dtype, vocabulary, after, TORCH_DEVICE)
