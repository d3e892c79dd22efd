"""Whole model folders quantised to MLX's own format, by mlx-lm."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from mlx_lm.convert import convert

GROUP_SIZE = 64


def quantize_folder(source: Path, target: Path, bits: int) -> None:
    """Write the model in `source` with every linear layer and embedding in `bits` bits into the new folder `target`."""
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does, and JSON may be wanted there
        convert(str(source), str(target), quantize=True, q_group_size=GROUP_SIZE, q_bits=bits)
