"""`twintune estimate`: the table and the JSON a person asks for, and the config that `--fix` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import TrainConfig, require_trainable
from common.config.file import read_config_file
from common.engine import LIBRARIES, DeviceMemory, choose_engine, device_memory, installed, matmul_rate
from common.errors import MachineError, UserError
from common.estimate.changes import Change
from common.estimate.duration import seconds_per_epoch
from common.estimate.guard import advise
from common.estimate.memory import PARTS, Memory, estimate_memory, gigabytes
from common.estimate.shape import ModelShape, read_shape
from common.estimate.workload import Workload, read_workload
from common.files import write_text
from common.view.display import say
from common.view.progress import clock


@dataclass(frozen=True)
class Estimate:
    """Hold what is said of a run on one engine of this machine."""

    engine: str
    machine: DeviceMemory
    memory: Memory
    seconds: float | None
    changes: list[Change]

    @property
    def fits(self) -> bool:
        """Tell whether the run is within what is free."""
        return self.memory.total <= self.machine.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the form of `--json`."""
        return {
            "engine": self.engine,
            "device": self.machine.device,
            "memory_bytes": {**self.memory.parts, "total": self.memory.total},
            "budget_bytes": self.machine.free_bytes,
            "fits": self.fits,
            "seconds_per_epoch": self.seconds,
            "changes": [change.to_dict() for change in self.changes],
        }


def estimate(config: TrainConfig, source: Path, as_json: bool, fix: bool) -> None:
    """Print the estimate for each engine here; raises MachineError where the one that `train` takes won't do."""
    chosen = choose_engine(config.engine)
    shape = read_shape(require_trainable(config, source), config.revision)
    workload = read_workload(config)
    names = [chosen, *(name for name in LIBRARIES if name != chosen and installed(name) and config.engine == "auto")]
    estimates = [each for name in names if (each := _estimate(shape, config, workload, name, name == chosen))]
    if as_json:
        print("\n".join(json.dumps(each.to_dict()) for each in estimates[:1]))
    else:
        _print_text(estimates, shape, workload)
    first = estimates[0]
    if fix and first.changes:
        written = write_fixed(source, first.changes)
        say(Console(stderr=as_json), f"{written} is ready; train with: twintune train --config {written}")
    if not first.fits and not (fix and first.changes and _fits_after(first)):
        advice = (
            "write the settings above into the config, or let --fix do it"
            if _fits_after(first)
            else ("no settings make it fit: take a smaller model or another machine")
        )
        raise MachineError(
            f"this run needs about {gigabytes(first.memory.total)}; {first.machine.device} has "
            f"{gigabytes(first.machine.free_bytes)} free; {advice}"
        )


def write_fixed(source: Path, changes: list[Change]) -> Path:
    """Write a config with the changes beside the old one; raises UserError where a file of that name is there."""
    target = source.with_name(f"{source.stem}.fits{source.suffix}")
    if target.exists():
        raise UserError(f"--fix: {target} is there already; delete or rename it")
    values = read_config_file(source)
    for change in changes:
        for key, value in change.settings.items():
            group, _, name = key.rpartition(".")
            inside = values.setdefault(group, {}) if group else values
            inside[name] = value
    write_text(target, _as_text(values, source))
    return target


def _as_text(values: dict[str, Any], source: Path) -> str:
    if source.suffix.lower() == ".json":
        return json.dumps(values, indent=2) + "\n"
    import yaml

    note = f"# {source.name} with the changes that `twintune estimate --fix` found; its comments are in the original.\n"
    return note + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _estimate(
    shape: ModelShape, config: TrainConfig, workload: Workload, name: str, is_chosen: bool
) -> Estimate | None:
    """Estimate one engine; None for another than the chosen one that can't run this config."""
    quantization = config.quantization
    foreign = quantization.mlx_format if name == "torch" else quantization.load_in_8bit
    if foreign and not is_chosen:
        return None
    machine = device_memory(name, config.device)
    memory = estimate_memory(shape, config, workload.work(config), name, machine)
    seconds = None
    if workload.positions_per_epoch:
        rate = matmul_rate(name, config.device)
        seconds = seconds_per_epoch(shape, config, name, machine.device_type, workload.positions_per_epoch, rate)
    changes = []
    if memory.total > machine.free_bytes:
        changes = advise(shape, config, workload, name, machine, machine.free_bytes)
    return Estimate(name, machine, memory, seconds, changes)


def _fits_after(each: Estimate) -> bool:
    return bool(each.changes) and each.changes[-1].total_bytes <= each.machine.free_bytes


def _print_text(estimates: list[Estimate], shape: ModelShape, workload: Workload) -> None:
    console = Console()
    table = Table("memory", *(f"{each.engine}, {each.machine.device}" for each in estimates))
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        table.add_row(part, *(gigabytes(each.memory.parts[part]) for each in estimates))
    table.add_section()
    table.add_row("peak, about", *(gigabytes(each.memory.total) for each in estimates))
    table.add_row("free here", *(gigabytes(each.machine.free_bytes) for each in estimates))
    table.add_row("", *("fits" if each.fits else "does not fit" for each in estimates))
    table.add_row("an epoch, about", *(clock(each.seconds) if each.seconds else "?" for each in estimates))
    console.print(table)
    if workload.note:
        say(console, f"Lengths are the longest that max_seq_length allows: {workload.note}")
    else:
        say(console, "The time is from a probe of this machine's matrix products, a second each")
    if not shape.certain:
        say(
            console,
            "This is no plain dense decoder in full precision: the figures are rough, and train refuses nothing",
        )
    for each in estimates:
        if each.changes:
            say(
                console,
                f"What makes it fit with {each.engine}, least harmful first:"
                if _fits_after(each)
                else f"What helps with {each.engine}, though not enough:",
            )
        for change in each.changes:
            say(console, f"  {change}  # then {gigabytes(change.total_bytes)}")
