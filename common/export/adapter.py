"""An adapter as arithmetic: for each module the matrices, their one factor, the magnitude; no file's conventions.

Every format read becomes this and every format written comes from it, so that alpha, rsLoRA and patterns are
understood in one place. What an engine opens is made from it too (`loadable`), with every factor folded into B: a
file that was misunderstood can't be misunderstood the same way twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.adapters.adapter import lora_of, read_adapter
from common.adapters.checks import without_base_copies
from common.config import LoraConfig
from common.engine import Array
from common.lora import lora_a_key, lora_b_key, magnitude_key, module_of_key, module_scaling, saved_key


@dataclass(frozen=True)
class Part:
    """Hold what a linear module learned: W becomes W + scale B A; DoRA sets the norm of each row to `magnitude`."""

    a: Array  # float32 (r, in)
    b: Array  # float32 (out, r)
    scale: float
    magnitude: Array | None = None  # float32 (out,)

    @property
    def rank(self) -> int:
        """Give r."""
        return int(self.a.shape[0])

    def with_scale(self, scale: float) -> Part:
        """Return the same change of W under another factor, the ratio of the two going into B."""
        if scale == self.scale:
            return self
        return Part(self.a, self.b * np.float32(self.scale / scale), scale, self.magnitude)

    def with_rank(self, rank: int) -> Part:
        """Return the same change of W with rows and columns of zeros up to `rank`."""
        more = rank - self.rank
        assert more >= 0, f"rank {self.rank} can't become {rank}"
        a, b = np.pad(self.a, ((0, more), (0, 0))), np.pad(self.b, ((0, 0), (0, more)))
        return Part(a, b, self.scale, self.magnitude)


@dataclass(frozen=True)
class Adapter:
    """Hold an adapter's parts by module, the modules trained whole, and its settings in PEFT's terms."""

    lora: LoraConfig
    parts: Mapping[str, Part]
    saved: Mapping[str, Array]  # module -> weight, float32 (modules_to_save)

    @property
    def is_dora(self) -> bool:
        """Tell whether parts have magnitudes."""
        return any(part.magnitude is not None for part in self.parts.values())

    @property
    def ranks(self) -> set[int]:
        """Collect the ranks of the parts."""
        return {part.rank for part in self.parts.values()}


def read_tuned(directory: Path) -> Adapter:
    """Read an adapter folder of PEFT's layout or of mlx-lm's; raises UserError where it is none."""
    tensors, settings = read_adapter(directory)
    return from_tensors(without_base_copies(tensors), lora_of(settings, directory))


def from_tensors(tensors: Mapping[str, Array], lora: LoraConfig) -> Adapter:
    """Make an adapter of the tensors of a PEFT file and its settings."""
    modules = sorted({module_of_key(key) for key in tensors if ".lora_" in key}, key=by_layer)
    parts = {
        module: Part(
            tensors[lora_a_key(module)],
            tensors[lora_b_key(module)],
            module_scaling(module, lora),
            tensors.get(magnitude_key(module)),
        )
        for module in modules
    }
    saved = {module_of_key(key): value for key, value in tensors.items() if ".lora_" not in key}
    return Adapter(lora, parts, saved)


def to_tensors(adapter: Adapter) -> dict[str, Array]:
    """Return the tensors of an adapter by PEFT key; their factors are for the settings to tell."""
    tensors = {saved_key(module): weight for module, weight in adapter.saved.items()}
    for module, part in adapter.parts.items():
        tensors[lora_a_key(module)], tensors[lora_b_key(module)] = part.a, part.b
        if part.magnitude is not None:
            tensors[magnitude_key(module)] = part.magnitude
    return tensors


def loadable(adapter: Adapter) -> tuple[LoraConfig, dict[str, Array]]:
    """Return settings and tensors that mean the same to an engine by a factor of 1, one rank and full names alone."""
    rank = max(adapter.ranks)
    parts = {module: part.with_rank(rank).with_scale(1.0) for module, part in adapter.parts.items()}
    plain = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=tuple(parts),
        modules_to_save=tuple(adapter.saved) or None,
        use_dora=adapter.is_dora,
    )
    return plain, to_tensors(Adapter(plain, parts, adapter.saved))


def by_layer(name: str) -> list[tuple[bool, int | str]]:
    """Give the key that sorts names so that layer 10 follows layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"\.", name)]
