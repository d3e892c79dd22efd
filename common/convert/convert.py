"""`twintune convert`: open the source, plan the target, write it shard by shard, read it back, compare logits.

config.json comes last, when all of that held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from common.base.weights import fingerprint
from common.convert.build import build, leaving_nothing_broken
from common.convert.checking import TensorCheck
from common.convert.from_mlx import refuse_own_layout
from common.convert.logits import LogitsCheck, affordable_dtype, chosen_engine, compare_logits, logits_of, prompt_tokens
from common.convert.record import read_record, save_record
from common.convert.request import Request, check_options
from common.convert.source import FolderSource, Source, open_source
from common.convert.target import FloatTarget, Target
from common.convert.writing import write_config
from common.engine import mlx_target
from common.errors import TwintuneError
from common.files import refuse_occupied
from common.view.display import say


def convert(request: Request, console: Console) -> dict[str, Any]:
    """Convert a model; returns what `--json` prints.

    Raises UserError for what can't be represented or came out wrong, DiskError for a full disk, Interrupted on Ctrl-C.
    """
    check_options(request)
    begun = read_record(request.output)
    if not begun or (request.output / "config.json").exists():
        refuse_occupied(request.output)
        begun = None
    source = open_source(request.model)
    target = plan_target(request, source)
    say(console, f"{source.path}: a {source.kind}, to {request.to} in {target.stored}")
    with leaving_nothing_broken(request, target):
        record, checked = build(request, source, target, begun, console)
        say(console, str(checked))
        with _as_a_model(request.output, target) as folder:
            logits = _compare(request, source, target, checked, folder, console)
            record["fingerprint"] = fingerprint(folder)
        record["checks"] = {"weights": vars(checked), "logits": vars(logits) if logits else None}
        save_record(request.output, record)
        write_config(request.output, target)
    say(console, f"{request.output} is ready")
    return {"output": str(request.output), "to": request.to, "stored": target.stored, **record["checks"]}


def plan_target(request: Request, source: Source) -> Target:
    """Plan the folder that was asked for; raises UserError where the source has no such form."""
    if request.to == "mlx":
        return mlx_target(source, request.quantization, request.dtype)
    if isinstance(source, FolderSource) and source.is_mlx:
        refuse_own_layout(source)
    if request.to == "hf":
        return FloatTarget(source, request.dtype)
    from common.convert.to_bitsandbytes import BitsandbytesTarget

    return BitsandbytesTarget(source, request.dtype, request.quant_type or "nf4", request.double_quant)


@contextmanager
def _as_a_model(output: Path, target: Target) -> Iterator[Path]:
    """Yield a folder of links to what was written, beside a config.json, for those who are to look at it first."""
    output = output.absolute()
    with TemporaryDirectory(prefix=".twintune-", dir=output.parent) as folder:
        for path in output.iterdir():
            (Path(folder) / path.name).symlink_to(path)
        write_config(Path(folder), target)
        yield Path(folder)


def _compare(
    request: Request, source: Source, target: Target, checked: TensorCheck, folder: Path, console: Console
) -> LogitsCheck | None:
    """Compare logits of the source and of what was written where that can be done, else say why not."""
    engine = chosen_engine(source, target) if request.check else None
    dtype = affordable_dtype(source, engine) if engine else None
    if not request.check:
        say(console, "logits not compared: --no-check")
    elif not engine:
        say(console, f"logits not compared: no engine here loads both a {source.kind} and the result")
    elif not dtype:
        say(console, "logits not compared: the model does not fit into free memory")
    else:
        try:
            token_ids = prompt_tokens(folder)
            expected = logits_of(source.path, engine, dtype, token_ids)
        except TwintuneError as error:
            say(console, f"logits not compared: {error}")
            return None
        found = logits_of(folder, engine, dtype, token_ids)
        stored = None if checked.equal == checked.weights else target.stored
        check = compare_logits(expected, found, engine, dtype, stored)
        say(console, str(check))
        return check
    return None
