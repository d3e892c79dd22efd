"""A folder in the making: shard by shard, with a record of how far it came, so that it can go on from there.

All goes into the output folder itself, all but config.json: until that is there nothing takes the folder for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from common.base.shards import dealt
from common.convert.checking import TensorCheck, check_weights
from common.convert.record import changes, fingerprint_files, new_record, save_record
from common.convert.request import Request
from common.convert.source import Source
from common.convert.target import Target
from common.convert.writing import write_weights
from common.errors import DiskError, Interrupted, UserError
from common.files import disk_error, remove_folder, require_room, sweep
from common.runs.signals import stop_on_signals
from common.view.display import byte_counter, say

OTHER_BYTES = 1_000_000  # of config, index and record


def build(
    request: Request,
    source: Source,
    target: Target,
    begun: Mapping[str, Any] | None,
    console: Console,
) -> tuple[dict[str, Any], TensorCheck]:
    """Write what is missing of a folder that was `begun`, all but config.json; returns its record and the check.

    Raises UserError for a number that doesn't fit its dtype or came out wrong, Interrupted on Ctrl-C.
    """
    output, shards = request.output, dealt(target.groups, request.max_shard_bytes)
    size = sum(group.num_bytes for group in target.groups)
    output.mkdir(parents=True, exist_ok=True)
    sweep(output)
    total = 2 * size + sum(path.stat().st_size for path in source.inputs)
    with byte_counter("converting", total, console) as show, _stopping(request, show) as advance:
        files = fingerprint_files(source.inputs, begun["source"]["files"] if begun else {}, advance)
        record = new_record(source, files, request.options())
        if begun:
            record["shards"] = _taken_over(output, begun, record, shards, console)
        finished = list(record["shards"])
        done = sum(group.num_bytes for name in finished for group in shards[name])
        require_room(output, size - done + OTHER_BYTES)
        save_record(output, record)
        advance(done)

        def note(name: str) -> None:
            record["shards"].append(name)
            save_record(output, record)

        write_weights(output, target, shards, finished, note, advance)
        for name, content in source.files.items():
            (output / name).write_bytes(content)
        return record, check_weights(output, shards, target, advance)


def _taken_over(
    output: Path, begun: Mapping[str, Any], record: Mapping[str, Any], shards: Mapping[str, object], console: Console
) -> list[str]:
    """List the shards that are finished; none, and none left there, where source or options were others."""
    if changed := changes(begun, record):
        say(console, f"{output}: began as another conversion ({'; '.join(changed)}); beginning anew")
        for path in output.glob("model*.safetensors*"):
            path.unlink()
        return []
    finished = [name for name in begun["shards"] if name in shards and (output / name).is_file()]
    say(console, f"{output}: going on; {len(finished)} of {len(shards)} files are there")
    return finished


@contextmanager
def _stopping(request: Request, show: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Yield the function to tell of further bytes; it raises Interrupted once somebody asked to stop."""
    done = 0
    with stop_on_signals() as stop:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            show(done)
            if stop.signal_name:
                raise Interrupted(f"interrupted; finished files are kept; go on with: {request.command}")

        yield advance


@contextmanager
def leaving_nothing_broken(request: Request, target: Target) -> Iterator[None]:
    """Say why the disk can't be written; remove a folder that came out wrong, or that no shard is in yet."""
    output = request.output
    try:
        yield
    except OSError as error:
        size = sum(group.num_bytes for group in target.groups) + OTHER_BYTES
        raise disk_error(output, output, size, error) from error
    except (Interrupted, DiskError):
        raise
    except UserError as error:
        remove_folder(output)
        raise UserError(f"{error}; {output} was removed") from None
    finally:
        if output.is_dir() and not any(output.glob("model*.safetensors")):
            remove_folder(output)
