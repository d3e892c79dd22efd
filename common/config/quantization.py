"""The config's `quantization` group: the frozen base in fewer bits, in bitsandbytes' formats or MLX's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from common.config.errors import found_text
from common.config.group import Dtype, Group, Name

# Group sizes and bits of each mode of MLX's quantize.
MLX_MODES = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


def as_overrides(value: Any) -> Any:
    """Turn false, a module's way to be left as it is, into null; pydantic checks the formats."""
    if not isinstance(value, dict) or not all(isinstance(own, dict) or not own for own in value.values()):
        raise ValueError("expected modules with a format or false, e.g. {lm_head: {bits: 8}, embed_tokens: false}")
    known: dict[str, list[Any]] = {
        "mode": [*MLX_MODES],
        "group_size": sorted({group for groups, _ in MLX_MODES.values() for group in groups}),
        "bits": sorted({number for _, bits in MLX_MODES.values() for number in bits}),
    }
    for module, own in value.items():
        for name, found in (own or {}).items():
            if found is not None and found not in known.get(name, [found]):
                allowed = ", ".join(map(str, known[name]))
                raise ValueError(f"expected in {module} as {name}, where there is {found_text(found)}: {allowed}")
    return {key: own or None for key, own in value.items()}


def also_false(schema: dict[str, Any]) -> None:
    """Say in the JSON schema of a field of modules that false is as good as null."""
    schema["additionalProperties"]["anyOf"].append({"const": False})


class LayerFormat(Group):
    """Say how MLX packs weights: `mode` decides which `bits` and `group_size` there are."""

    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    """Bits a weight: any of these in the affine mode, 4 in mxfp4 and nvfp4, 8 in mxfp8; null for the mode's own."""

    group_size: Literal[16, 32, 64, 128] | None = None
    """Weights that share a scale: 32, 64 or 128 in the affine mode, else the mode's own; null for its default."""

    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] | None = None
    """How MLX rounds: affine (a scale and an offset a group), or small floats with a scale a group."""


class QuantizationConfig(LayerFormat):
    """Hold the frozen base weights in fewer bits: bitsandbytes' 4 and 8 bits, or MLX's own formats."""

    load_in_4bit: bool = False
    """Quantise the base to 4 bits of `quant_type` (QLoRA, arXiv:2305.14314), the same weights on both engines."""

    load_in_8bit: bool = False
    """Quantise the base to 8 bits (LLM.int8); torch only."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code book of `load_in_4bit`."""

    use_double_quant: bool = False
    """Quantise the scales of `load_in_4bit` too: about 0.4 bits a weight less."""

    compute_dtype: Dtype | None = None
    """Dtype of the run with `load_in_4bit`; the same as `dtype`, under bitsandbytes' name."""

    overrides: Annotated[dict[Name, LayerFormat | None], BeforeValidator(as_overrides)] = Field(
        default={}, examples=[{"lm_head": {"bits": 8}}], json_schema_extra=also_false
    )
    """MLX's own formats, for some modules: by a path or a part of it at dots; false leaves those as they are."""

    @property
    def way(self) -> str | None:
        """Name the key that asks for a quantised base; None where none does."""
        ways = {"load_in_4bit": self.load_in_4bit, "load_in_8bit": self.load_in_8bit}
        ways |= {"bits": self.bits is not None, "mode": self.mode is not None}
        return next((f"quantization.{key}" for key, asked in ways.items() if asked), None)

    @property
    def mlx_format(self) -> dict[str, Any] | None:
        """Give `group_size`, `bits` and `mode` as MLX's quantize takes them; None where the base is not to be so."""
        return None if self.bits is None and self.mode is None else complete_format(self)

    def mlx_format_of(self, path: str, by_default: bool) -> dict[str, Any] | None:
        """Give the same for the module at a path: the first override that names it, else this if `by_default`."""
        for key, own in self.overrides.items():
            if f".{key}." in f".{path}.":
                return complete_format(own, self) if own else None
        return self.mlx_format if by_default else None


def complete_format(own: LayerFormat, above: LayerFormat | None = None) -> dict[str, Any]:
    """Return MLX's `group_size`, `bits` and `mode`: as written, else as above it in the same mode, else MLX's own."""
    mode = own.mode or (above and above.mode) or "affine"
    inherited = above if above and (above.mode or "affine") == mode else own
    groups, bits = MLX_MODES[mode]
    return {
        "group_size": own.group_size or inherited.group_size or (64 if 64 in groups else groups[0]),
        "bits": own.bits or inherited.bits or (4 if 4 in bits else bits[0]),
        "mode": mode,
    }


# Group sizes and bits of each mode of MLX's quantize.
