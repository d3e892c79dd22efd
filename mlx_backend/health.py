"""What the MLX engine needs of the machine: a GPU it can use, or on a Linux CPU a fast BLAS and a C compiler."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import mlx.core as mx

from common.doctor.finding import Finding

COMPILERS = ("cc", "gcc", "clang", "g++", "c++")


def examine(blas: str) -> Iterator[Finding]:
    """Look at the device, and on Linux at what its CPU build lacks; `blas` is what `use_fast_blas` said."""
    yield _device()
    if blas:
        warning = blas.startswith("warning")
        yield Finding("warning" if warning else "ok", "mlx BLAS", blas.removeprefix("warning: "))
    if sys.platform == "linux":
        compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
        if compiler:
            yield Finding("ok", "mlx compiler", compiler)
        else:
            fix = "install one: apt install g++, or dnf install gcc-c++"
            yield Finding("warning", "mlx compiler", "no C compiler, which MLX needs to compile kernels for a CPU", fix)


def _device() -> Finding:
    if mx.metal.is_available():
        info = mx.device_info()
        budget = info.get("max_recommended_working_set_size", 0) / 1e9
        return Finding("ok", "mlx device", f"Metal: {info['device_name']}, {budget:.1f} GB for the GPU")
    if mx.cuda.is_available():
        return Finding("ok", "mlx device", f"CUDA: {mx.device_info()['device_name']}")
    if sys.platform == "darwin":
        fix = "run it outside a virtual machine, with a native arm64 Python on macOS 14 or newer"
        return Finding("wrong", "mlx device", "Metal is not usable", fix)
    return Finding("ok", "mlx device", "the CPU: good for a try with a small model, slow for more")
