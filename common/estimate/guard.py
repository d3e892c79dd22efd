"""Before a run that can't fit, a refusal with what would make it fit; after memory ran out all the same, what now.

The refusal is sure, or there is none: the estimate has to exceed what is free by a quarter. A tenth is what estimates
may be off; the rest is what other programs give back when pressed (a Mac lends its GPU a quarter more than it
recommends), and a model that isn't a plain dense decoder is let through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from common.config import TrainConfig
from common.engine import DeviceMemory, StepBatch, device_memory, is_out_of_memory
from common.errors import MachineError, UserError
from common.estimate.changes import Change, find_changes
from common.estimate.memory import estimate_memory, gigabytes
from common.estimate.shape import ModelShape, read_shape
from common.estimate.workload import Workload

MARGIN = 1.25
MENTIONED = 3  # settings named in an error


def refuse_hopeless(config: TrainConfig, name: str, model: str, workload: Workload) -> None:
    """Raise MachineError where a run is sure not to fit into the memory that is free, with the changes that help."""
    machine = device_memory(name, config.device)
    try:
        shape = read_shape(model)
        size = total_bytes(shape, workload, name, machine, config)
    except UserError:
        return  # a config or names of modules of an unknown kind are for the engine to judge
    if not shape.certain or size <= MARGIN * machine.free_bytes:
        return
    changes = advise(shape, config, workload, name, machine, machine.free_bytes)
    fits = bool(changes) and changes[-1].total_bytes <= machine.free_bytes
    helping = "\n".join(f"  {each}  # then {gigabytes(each.total_bytes)}" for each in changes)
    what = "it fits with" if fits else "no settings make it fit, take a smaller model; nearest comes"
    raise MachineError(
        f"this run needs about {gigabytes(size)} on {machine.device}, where {gigabytes(machine.free_bytes)} are free; "
        f"{what}:\n{helping}\n"
        "twintune estimate tells more and writes such a config with --fix; --force tries regardless"
    )


def advise(
    shape: ModelShape, config: TrainConfig, workload: Workload, name: str, machine: DeviceMemory, budget: int
) -> list[Change]:
    """Return the changes that bring a run within a budget."""
    total = partial(total_bytes, shape, workload, name, machine)
    return find_changes(config, name, machine.device_type, workload.longest, budget, total)


def total_bytes(shape: ModelShape, workload: Workload, name: str, machine: DeviceMemory, config: TrainConfig) -> int:
    """Estimate the peak of a config."""
    return estimate_memory(shape, config, workload.work(config), name, machine).total


def ran_out(config: TrainConfig, name: str, batch: StepBatch, free: int | None, kept: str) -> MachineError:
    """Explain that memory ran out in a step, with the settings that would have avoided it."""
    rows, length = max((micro.token_ids.shape for micro in batch.micro_batches), key=lambda shape: shape[0] * shape[1])
    there = f"; {gigabytes(free)} are free now" if free is not None else ""
    advice = "\n".join(f"  {line}" for line in _avoiding(config, name))
    return MachineError(
        f"step {batch.step}: memory ran out with {rows} x {length} tokens{there}; {kept}. What avoids it:\n{advice}\n"
        "twintune estimate says what each of them saves"
    )


def _avoiding(config: TrainConfig, name: str) -> list[str]:
    """Name the three least harmful settings that the config hasn't made yet."""
    rows, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    ways = [
        (not config.gradient_checkpointing, "gradient_checkpointing: true"),
        (rows > 1, f"per_device_train_batch_size: 1, gradient_accumulation_steps: {rows * steps}  # the same batch"),
        (
            not config.quantization.way,
            "quantization: {load_in_4bit: true}" if name == "torch" else "quantization: {bits: 4}",
        ),
        (config.max_seq_length > 1, f"max_seq_length: {max(1, config.max_seq_length // 2)}"),
        (config.lora.r > 1, f"lora: {{r: {max(1, config.lora.r // 2)}}}"),
        (True, "a smaller model"),
    ]
    return [text for applies, text in ways if applies][:MENTIONED]


@contextmanager
def explained(config: TrainConfig, name: str, batch: StepBatch, kept: Callable[[], str]) -> Iterator[None]:
    """Turn an engine's own error of memory into a MachineError about a step; `kept` says which checkpoint is good."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(name, error):
            raise
        free = device_memory(name, config.device).free_bytes
        raise ran_out(config, name, batch, free, kept()) from error
