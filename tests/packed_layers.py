"""Packed layers of bitsandbytes, settled as a run has them."""

import numpy as np
import pytest
import torch
from torch import nn


def four_bit_layer(weight: np.ndarray, dtype: torch.dtype, double: bool = True, flat: bool = False) -> nn.Module:
    """Pack a weight (out, in); `flat` has it as one row, as on a CPU where rows are no multiple of a block."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    four_bit = pytest.importorskip("torch_backend.four_bit")
    rows, columns = weight.shape
    layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
    stored = torch.from_numpy(weight).to(dtype)
    layer.weight = bitsandbytes.nn.Params4bit(stored, requires_grad=False, quant_type="nf4").to("cpu")
    four_bit.settle(layer, double, dtype)
    if flat:
        layer.weight.quant_state.shape = torch.Size((1, weight.size))
        layer.__class__ = four_bit.FlatFourBitLinear
    return layer
