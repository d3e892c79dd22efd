"""Which way a product with MLX's quantised weights goes: its kernel for few rows, unpacking first for many.

`quantized_matmul` reads the packed weight for every block of rows; past some number of rows it is cheaper to unpack
it once and let the ordinary product run, 3.4 times for 8,192 rows on an H200. Where that number lies depends on the
machine, so it is measured once, with one layer of the model, and kept in the user's cache folder. Both ways are the
same product up to rounding. The cost: some tenths of a second at the first start with a format, and where MLX compiles
its kernel then, on CUDA, half a minute.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.errors import DiskError
from common.files import cache_folder, write_text
from mlx_backend.frozen import Unpacked

ROWS = (16, 64, 256, 1024, 4096)
ROWS_ON_CUDA = (256, 4096)  # MLX compiles a kernel for each: 110 s for the first three of ROWS (an H200)
NEVER = 2**31
CLEARLY = 0.9  # of the kernel's time, to be called faster
LONGEST = 0.3  # seconds of one measurement, after which no larger one is made


class ChosenLinear(nn.QuantizedLinear):
    """Multiply by MLX's quantised weight, unpacked first for `_min_rows` rows and more."""

    def choose(self, min_rows: int, dtype: mx.Dtype) -> None:
        """Take the number of rows from which the weight is unpacked, and the dtype it is unpacked to."""
        settings = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode, "dtype": dtype}
        self._min_rows = min_rows
        self._unpacked = Unpacked(partial(mx.dequantize, **settings))

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., in) to (..., out)."""
        if self._few(x):
            return super().__call__(x)
        return self._biased(self._unpacked(x, self._packed()))

    def add_to(self, total: mx.array, x: mx.array) -> mx.array:
        """Return total (N, out) + W x of rows x (N, in)."""
        if self._few(x):
            return total + super().__call__(x)
        return self._biased(self._unpacked.add_to(total, x, self._packed()))

    def input_gradient(self, of_out: mx.array) -> mx.array:
        """Return W^T of_out (N, in) of rows of_out (N, out)."""
        if self._few(of_out):
            settings = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
            return mx.quantized_matmul(of_out, *self._packed(), transpose=False, **settings)
        return self._unpacked.input_gradient(of_out, self._packed())

    def _few(self, rows: mx.array) -> bool:
        return rows.size // rows.shape[-1] < self._min_rows

    def _packed(self) -> list[mx.array]:
        return [self[name] for name in ("weight", "scales", "biases") if self.get(name) is not None]

    def _biased(self, out: mx.array) -> mx.array:
        return out + self.bias if "bias" in self else out


class ChosenEmbedding(nn.QuantizedEmbedding):
    """Look up rows of MLX's quantised weight in a dtype; MLX itself has the small-float modes in bfloat16 only."""

    def choose(self, dtype: mx.Dtype) -> None:
        """Take the dtype that rows are unpacked to."""
        self._dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Map token ids (...) to (..., in)."""
        return super().__call__(x).astype(self._dtype)


def choose_products(model: nn.Module, dtype: mx.Dtype) -> None:
    """Make every layer of MLX's own formats take the faster way."""
    layers = []
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = ChosenLinear
            layers.append(module)
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = ChosenEmbedding
            module.choose(dtype)
    by_format: dict[str, list[ChosenLinear]] = {}
    for layer in layers:
        by_format.setdefault(f"{layer.mode}-{layer.bits}-{layer.group_size}-{dtype}", []).append(layer)
    for name, same in by_format.items():
        min_rows = _min_rows(name, max(same, key=lambda layer: layer.weight.size), dtype)
        for layer in same:
            layer.choose(min_rows, dtype)


def _min_rows(name: str, layer: ChosenLinear, dtype: mx.Dtype) -> int:
    """Return from how many rows on unpacking is faster, measured with a layer, or as it was measured before."""
    device = mx.default_device().type.name
    path = cache_folder() / f"products-{device}-{mx.device_info()['device_name']}-{mx.__version__}.json".replace(
        " ", "_"
    )
    key = f"{name}-{'x'.join(map(str, layer.weight.shape))}"
    known: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    if key not in known:
        known[key] = measure(layer, dtype)
        with contextlib.suppress(DiskError):  # measured again at the next start
            write_text(path, json.dumps(known, indent=1))
    return known[key]


def measure(layer: ChosenLinear, dtype: mx.Dtype, rows: Sequence[int] | None = None) -> int:
    """Return the first of some numbers of rows for which forward and gradient are faster unpacked, else NEVER."""
    columns = layer.weight.shape[1] * 32 // layer.bits
    for count in rows or (ROWS_ON_CUDA if mx.cuda.is_available() else ROWS):
        x = mx.ones((count, columns), dtype)
        seconds = []
        for min_rows in (NEVER, 0):
            layer.choose(min_rows, dtype)
            seconds.append(_seconds(partial(_there_and_back, layer), x))
        if seconds[1] < CLEARLY * seconds[0]:
            return count
        if seconds[0] > LONGEST:
            break
    return NEVER


def _there_and_back(layer: ChosenLinear, x: mx.array) -> list[mx.array]:
    value, gradient = mx.value_and_grad(lambda x: layer(x).sum())(x)
    return [value, gradient]


def _seconds(function: Callable[[mx.array], Any], x: mx.array) -> float:
    """Return the shortest of three times, after one that warms up."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        mx.eval(function(x))
        times.append(time.perf_counter() - began)
    return min(times[1:])
