"""What tests of conversions share: conversions run in this process, and tensors of a folder as float32."""

from pathlib import Path

import numpy as np
from rich.console import Console

from common.base.tensors import model_tensors
from common.convert.convert import convert
from common.convert.request import Request, quantization_of


def run_convert(
    model: Path,
    output: Path,
    to: str = "hf",
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    overrides: tuple[str, ...] = (),
    check: bool = False,
    console: Console | None = None,
    **options: object,
) -> dict:
    """Convert a model; returns what `--json` prints. Logits are compared where a test asks for it."""
    quantization = quantization_of(bits, group_size, mode, overrides)
    request = Request(str(model), output, to, quantization=quantization, check=check, **options)
    return convert(request, console or Console(quiet=True))


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Read all tensors: floats as float32, codes as they are."""
    tensors = model_tensors(folder)
    return {name: tensors.read(name) for name in tensors}


def assert_same_files(found: Path, expected: Path) -> None:
    """Check that two folders hold the same tensors, in dtype and in every bit."""
    ours, theirs = model_tensors(found), model_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name]["dtype"], ours.shape(name)) == (theirs[name]["dtype"], theirs.shape(name)), name
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)


def convert_gguf(source: Path, output: Path, dtype: str | None = None) -> None:
    """Convert a GGUF file into a Hugging Face folder."""
    run_convert(source, output, dtype=dtype)
