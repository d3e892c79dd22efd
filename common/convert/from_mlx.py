"""A checkpoint in one of MLX's quantised formats, unpacked; and which models have the same names in MLX as elsewhere.

Unpacking is MLX's own, in float32 from the stored scales: the numbers that the packed model means, to be rounded once
to whatever they are stored as.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.base.tensors import default_dtype, row_blocks
from common.convert.source import FolderSource
from common.engine import Array, mlx_dequantize
from common.errors import UserError

SCALES, OFFSETS = ".scales", ".biases"
# Models whose tensors mlx-lm keeps as Hugging Face has them, name for name: tests/test_convert_mlx.py shows it of each.
SAME_LAYOUT = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"),
    *("olmo2", "olmo3", "granite", "cohere2", "glm4", "seed_oss"),
)


def refuse_own_layout(folder: FolderSource) -> None:
    """Raise UserError for an MLX folder whose tensors transformers' model would not find."""
    kind = folder.config["model_type"]
    if kind not in SAME_LAYOUT:
        raise UserError(
            f"{folder.path}: mlx-lm may name or stack the tensors of {kind} in its own way, and the way back isn't "
            f"known here; known are {', '.join(SAME_LAYOUT)}; take the model that it was made from"
        )


class MlxSource:
    """Give a checkpoint that mlx-lm, or convert, quantised."""

    def __init__(self, folder: FolderSource, config: Mapping[str, Any]) -> None:
        """Find the packed weights and their formats; raises UserError where sizes and formats don't fit."""
        refuse_own_layout(folder)
        self.path, self.files, self.inputs, self.config = folder.path, folder.files, folder.inputs, folder.config
        self.kind = "quantised MLX folder"
        self._tensors = folder.tensors
        stored = config.get("quantization") or config["quantization_config"]
        packed = [name.removesuffix(SCALES) for name in folder.tensors if name.endswith(SCALES)]
        self._formats = {f"{module}.weight": _format(stored, module) for module in packed}
        self.packed = self._formats.keys()
        self._check_parts(packed)
        parts = {module + part for module in packed for part in (SCALES, OFFSETS)}
        names = [name for name in folder.tensors if name not in parts]
        self.shapes = {name: self._shape(name) for name in names}
        self.dtypes = {name: self._dtype(name) for name in names}

    def blocks(self, name: str) -> Iterator[Array]:
        """Read a tensor as float32, a block of rows after the other."""
        form = self._formats.get(name)
        if form is None:
            yield from self._tensors.blocks(name)
            return
        module = name.removesuffix(".weight")
        parts = [part for part in (name, module + SCALES, module + OFFSETS) if part in self._tensors]
        for start, stop in row_blocks(self.shapes[name]):
            yield mlx_dequantize([self._tensors.rows(part, start, stop) for part in parts], form)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape, form = self._tensors.shape(name), self._formats.get(name)
        if form is None:
            return shape
        return shape[0], shape[1] * 32 // form["bits"]

    def _dtype(self, name: str) -> str:
        if name not in self._formats:
            return self._tensors.dtype(name)
        scales = name.removesuffix(".weight") + SCALES
        if self._tensors.is_float(scales):
            return self._tensors.dtype(scales)
        return default_dtype(self.config, self._tensors)

    def _check_parts(self, modules: Sequence[str]) -> None:
        """Raise UserError for a packed weight that lacks codes or offsets, or whose sizes don't fit its format."""
        for module in modules:
            form, names = self._formats[f"{module}.weight"], [module + part for part in (".weight", SCALES, OFFSETS)]
            shapes = [self._tensors.shape(name) for name in names if name in self._tensors]
            codes, scales, *offsets = shapes if names[0] in self._tensors else ((), *shapes)
            fits = len(codes) == 2 and scales == (codes[0], codes[1] * 32 // form["bits"] // form["group_size"])
            if not fits or offsets != [scales] * (form["mode"] == "affine"):
                raise UserError(
                    f"{self.path}: the weights of {module} have shapes {shapes}, which is not what config.json says, "
                    f"{form}; download the model again"
                )


def _format(stored: Mapping[str, Any], module: str) -> dict[str, Any]:
    own = stored.get(module)
    form = own if isinstance(own, dict) else stored
    return {"bits": form["bits"], "group_size": form["group_size"], "mode": form.get("mode", "affine")}
