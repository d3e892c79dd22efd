"""Bring an adapter into the form that one program loads, and tell a person what was done and why.

What can be adapted without changing what the adapter computes is: factors go into alpha and B, ranks and layers are
filled with zeros. What can't is merged into the base. An explicit `--to` is never overruled, but refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.engine import Engine
from common.errors import UserError
from common.export.adapt import one_alpha, one_rank, with_every_layer, with_zeros
from common.export.adapter import Adapter
from common.export.readers import Format, Reader


def choose_format(adapter: Adapter, reader: Reader, to: Format | None) -> tuple[Format, list[str]]:
    """Decide whether a program gets the adapter or the merged model, and why; raises UserError for another `to`."""
    obstacles, name = _obstacles(adapter, reader), reader.name
    if to is not None and to not in (reader.adapter, reader.merged):
        raise UserError(f"--to {to}: {name} loads --to {reader.adapter} or --to {reader.merged} ({reader.source})")
    if to == reader.adapter and obstacles:
        raise UserError(f"{name} can't load {' or '.join(obstacles)} ({reader.source}); write --to {reader.merged}")
    if obstacles and to is None:
        return reader.merged, [f"merged into the base, as {name} can't load {' or '.join(obstacles)}"]
    return to or reader.adapter, []


def fitted(adapter: Adapter, reader: Reader, modules: Sequence[str], engine: Engine) -> tuple[Adapter, list[str]]:
    """Return an adapter that a program loads and that computes the same, and what was done to it.

    `modules` names those that the base has. Zeros are put where the program wants a module that isn't adapted.
    """
    notes: list[str] = []
    if reader.every_layer:
        adapter = _told(notes, adapter, with_every_layer(adapter, modules, engine), "zeros for layers left out")
    if reader.together:
        wanted = _companions(adapter, reader, modules)
        adapter = _told(notes, adapter, with_zeros(adapter, wanted, engine), "zeros for modules it fuses with others")
    if not reader.patterns and len(adapter.ranks) > 1:
        adapter = _told(notes, adapter, one_rank(adapter), f"rank {max(adapter.ranks)} for all modules, zeros added")
    if adapter.lora.use_rslora and not reader.rslora:
        adapter = _told(notes, adapter, one_alpha(adapter), "rsLoRA's factor as a plain alpha")
    if not reader.patterns and _has_alphas(adapter):
        adapter = _told(notes, adapter, one_alpha(adapter), "one whole alpha, the differences within B")
    return adapter, notes


def usage(reader: Reader, adapter: Adapter, to: Format, folder: str, base: str) -> str:
    """Return what to set in a program to load what was written."""
    if to == reader.merged:
        return f"load {folder} as any model"
    rank = max(adapter.ranks)
    step = next((step for step in reader.rank_steps if step >= rank), rank)
    return reader.usage.format(folder=folder, base=base, rank=step)


def _obstacles(adapter: Adapter, reader: Reader) -> list[str]:
    found = []
    if adapter.is_dora and not reader.dora:
        found.append("DoRA")
    if adapter.saved and not reader.saved:
        found.append("modules_to_save")
    if reader.max_rank and max(adapter.ranks) > reader.max_rank:
        found.append(f"rank {max(adapter.ranks)} (at most {reader.max_rank})")
    return found


def _has_alphas(adapter: Adapter) -> bool:
    """Tell whether the settings have more than one alpha and rank, or an alpha that is no whole number."""
    lora = adapter.lora
    return bool(lora.rank_pattern or lora.alpha_pattern) or lora.lora_alpha != int(lora.lora_alpha)


def _companions(adapter: Adapter, reader: Reader, modules: Iterable[str]) -> list[str]:
    """List the base's modules that the program reads together with an adapted one."""
    wanted = []
    for module in modules:
        parent, _, name = module.rpartition(".")
        group = next((group for group in reader.together if name in group), ())
        if any(f"{parent}.{other}" in adapter.parts for other in group):
            wanted.append(module)
    return wanted


def _told(notes: list[str], before: Adapter, after: Adapter, what: str) -> Adapter:
    if after is not before:
        notes.append(what)
    return after
