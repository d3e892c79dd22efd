"""What the torch engine needs of the machine: a GPU with a driver its build knows, and bitsandbytes' kernels."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator

import torch

from common.doctor.finding import Finding
from torch_backend.device import look_at

CUDA_WHEELS = "https://download.pytorch.org/whl/cu128"
# NF4 rounds normal weights by 0.07 on average; a broken kernel returns zeros or noise.
LARGEST_NF4_ERROR = 0.12


def examine() -> Iterator[Finding]:
    """Look at the device and at the kernels that QLoRA needs."""
    driver = _driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _card(index, driver)
    elif driver:
        fix = f"install a torch built for CUDA: pip install --index-url {CUDA_WHEELS} torch"
        yield Finding("wrong", "torch device", f"torch {torch.__version__} can't use the NVIDIA card ({driver})", fix)
    elif torch.backends.mps.is_available():
        yield Finding("ok", "torch device", "MPS; MLX is the faster engine on this machine")
    else:
        yield Finding("ok", "torch device", "the CPU: good for a try with a small model, slow for more")
    yield _bitsandbytes()


def _driver() -> str:
    """Return the version of NVIDIA's driver, nothing where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return f"driver {done.stdout.split()[0]}" if done.returncode == 0 and done.stdout.split() else ""


def _card(index: int, driver: str) -> Finding:
    free, total = torch.cuda.mem_get_info(index)
    about = f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    about = f"{about}, CUDA {torch.version.cuda}, {driver or 'driver unknown'}"
    hardware = look_at(torch.device("cuda", index))
    about = f"{about}; trains in {hardware.dtype}"
    reason = hardware.why_not_compiled(hardware.dtype)
    if reason:
        return Finding("warning", "torch device", f"{about}, uncompiled", reason)
    return Finding("ok", "torch device", about)


def _bitsandbytes() -> Finding:
    """Quantise a matrix to NF4 and back on the device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding("warning", "bitsandbytes", "not installed: no load_in_4bit", "pip install bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        import bitsandbytes.functional as kernels

        matrix = torch.randn(64, 64, device=device, generator=torch.Generator(device).manual_seed(0))
        error = (kernels.dequantize_4bit(*kernels.quantize_4bit(matrix, quant_type="nf4")) - matrix).abs().mean()
    except (RuntimeError, OSError, AttributeError, NotImplementedError) as problem:
        reason = " ".join(str(problem).split())[:120]
        return Finding(
            "wrong", "bitsandbytes", f"its kernels don't run on {device}: {reason}", "reinstall bitsandbytes"
        )
    if not error < LARGEST_NF4_ERROR:
        fix = "reinstall bitsandbytes, and run python -m bitsandbytes"
        return Finding("wrong", "bitsandbytes", f"NF4 on {device} is off by {error:.2f} on average", fix)
    return Finding("ok", "bitsandbytes", f"NF4 works on {device}")
