"""Folders and files that appear whole or not at all: written beside their place, synced, renamed.

The cost is an fsync a file, some milliseconds on a laptop's disk; what it buys is that a crash, a full disk or
a kill -9 at any moment leaves the old state or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_folder(output: Path, num_bytes: int = 0, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that becomes it by one rename, or is removed.

    `num_bytes` is what will be written, checked against the room there is; with `replace` an older folder of
    that name makes way at the last moment. Raises UserError when the disk is full or can't be written.
    """
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number, as in containers
        temporary.mkdir(parents=True)
        if shutil.disk_usage(temporary).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if replace and output.exists():
            _exchange(temporary, output)
        else:
            temporary.rename(output)
        sync(output.parent)
    except OSError as error:
        raise _disk_error(output, temporary, num_bytes, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one rename; raises UserError when the disk is full or can't be written."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(_explain(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder, and writes a rename through by itself.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(temporary: Path, output: Path) -> None:
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    output.rename(old)
    temporary.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _disk_error(output: Path, temporary: Path, num_bytes: int, error: OSError) -> UserError:
    if error.errno not in FULL or not temporary.exists():
        return UserError(_explain(output, error))
    written = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    missing = max(1, num_bytes - written - shutil.disk_usage(temporary).free)
    return UserError(
        f"{output}: the disk is full: {missing:,} bytes are missing; expected room for {num_bytes:,}; "
        "free some, or name a folder on another disk"
    )


def _explain(path: Path, error: OSError) -> str:
    if error.errno in FULL:
        return f"{path}: the disk is full; free some room, or name a folder on another disk"
    return f"{path}: can't be written ({error.strerror}); check the path and its permissions"
