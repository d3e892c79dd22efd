"""`twintune export`: read the adapter, write what was asked for, read that back, and let an engine compare.

The folder appears by one rename after the comparison held; what failed it is gone. The base is loaded twice, once
with the adapter and once for what was written, never both at a time.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from common.adapters.adapter import lora_of, read_adapter
from common.adapters.checks import without_base_copies
from common.base.hub import resolve_model
from common.config import TrainConfig
from common.engine import choose_engine
from common.errors import UserError
from common.export.adapt import one_alpha
from common.export.adapter import Adapter, from_tensors
from common.export.card import export_card
from common.export.fit import choose_format, fitted, usage
from common.export.formats import Written, check_dtype, quantise, write
from common.export.mlx_folder import FOLDER
from common.export.proof import Proof, Reference, prove, take_reference
from common.export.push import check_push, push
from common.export.readers import Format, Reader, find_reader
from common.export.source import RUN_CONFIG, Source
from common.files import new_folder, refuse_occupied
from common.view.display import say

QUANTISED = (4, 5, 6, 8)  # bits of MLX's format


@dataclass(frozen=True)
class Request:
    """Say what `twintune export` was asked for."""

    adapter: Path
    output: Path
    to: Format | None
    reader: str | None = None
    model: str | None = None
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None
    fold_rslora: bool = False
    quantize: int | None = None
    push_to_hub: str | None = None
    private: bool = False


@dataclass(frozen=True)
class Outcome:
    """Hold what was written: the adapter as it went out, what was done to it, its dtype, and the proof."""

    adapter: Adapter
    notes: list[str]
    stored: str
    proof: Proof
    computed_by: str  # an engine and its libraries


def export(request: Request, console: Console) -> dict[str, Any]:
    """Write and prove an export; returns what `--json` prints. Raises UserError where it can't be written or proven."""
    reader = find_reader(request.reader) if request.reader else None
    source = open_source(request)
    to, notes = choose_format(source.adapter, reader, request.to) if reader else (request.to, [])
    if to is None:
        raise UserError("--to: missing; expected peft, mlx, gguf, merged or merged-gguf, or a program by --for")
    check_dtype(to, request.dtype)
    if request.quantize and (to != "merged" or request.quantize not in QUANTISED):
        raise UserError(
            f"--quantize {request.quantize}: with --to {to}; expected 4, 5, 6 or 8 bits of MLX's and --to merged"
        )
    target = request.output / FOLDER if to == "mlx" else request.output
    refuse_occupied(target, "another --output")
    if request.push_to_hub:
        check_push(request.push_to_hub)
    say(console, f"Loading {source.base} with the {source.engine} engine ...")
    with new_folder(target) as folder:
        outcome = write_and_prove(folder, to, request, source, reader)
        notes = [*notes, *outcome.notes]
        card = export_card(source, to, outcome.stored, notes, outcome.proof, outcome.computed_by)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if reader:
        notes.append(f"to load it: {usage(reader, outcome.adapter, to, str(target), source.base_name)}")
    for note in notes:
        say(console, note)
    say(console, f"{target} is ready: {outcome.proof}")
    result = {"output": str(target), "to": to, "notes": notes} | outcome.proof.figures()
    if request.push_to_hub:
        result["url"] = push(request.output if to == "mlx" else target, request.push_to_hub, request.private)
        say(console, f"uploaded to {result['url']}")
    return result


def open_source(request: Request) -> Source:
    """Read the adapter and find its base; raises UserError where either is not there or not whole."""
    tensors, settings = read_adapter(request.adapter)
    lora = lora_of(settings, request.adapter)
    if lora.target_parameters:
        raise UserError(
            f"{request.adapter}: adapts stacks of experts (target_parameters), which PEFT alone loads; it can read the "
            "folder as it stands, and no other format has a place for them"
        )
    adapter = from_tensors(without_base_copies(tensors), lora)
    base = request.model or settings.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{request.adapter}: names no base; name its folder or Hub name with --model")
    values = {"model_name_or_path": base, "engine": request.engine, "device": request.device}
    config = TrainConfig.from_dict(values | _trained_with(request.adapter), "command line")
    directory = resolve_model(base, None if request.model else settings.get("revision"))
    return Source(adapter, tensors, settings, request.adapter, directory, choose_engine(config.engine), config)


def write_and_prove(folder: Path, to: Format, request: Request, source: Source, reader: Reader | None) -> Outcome:
    """Write an export into a folder and compare its logits with the adapter's; raises UserError where they differ."""
    with closing(source.open_own()) as engine:
        reference = take_reference(engine, source.adapter, source.vocabulary())
        adapter = one_alpha(source.adapter) if request.fold_rslora else source.adapter
        notes: list[str] = []
        if reader and to == reader.adapter:
            adapter, notes = fitted(adapter, reader, source.matrices(), engine)
        try:
            written = write(folder, to, adapter, source, engine, request.dtype)
        except OverflowError as error:
            raise UserError(f"{request.adapter}: a weight {error}") from None
    proof, computed_by = _proven(written, reference)
    if request.quantize:  # of what is proven to be the adapter's
        written = quantise(folder, request.quantize, source)
        proof, computed_by = _proven(written, reference)
    return Outcome(adapter, notes, written.stored, proof, computed_by)


def _proven(written: Written, reference: Reference) -> tuple[Proof, str]:
    with closing(written.open()) as engine:
        proof = prove(reference, engine.logits(reference.token_ids), written.stored, written.what)
        versions = ", ".join(f"{library} {version}" for library, version in engine.versions.items())
        return proof, f"the {engine.name} engine ({versions})"


def _trained_with(adapter: Path) -> dict[str, Any]:
    """Return how the run held its base, so that the adapter meets the weights it was trained on."""
    path = adapter / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {"quantization": config["quantization"]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read ({error}); remove it, or copy the adapter again") from None
