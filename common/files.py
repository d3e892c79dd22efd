"""Folders and files that appear whole or not at all: written beside their place, synced, renamed.

The cost is an fsync a file, some milliseconds on a laptop's disk; what it buys is that a crash, a full disk or
a kill -9 at any moment leaves the old state or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import DiskError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
LEFT = re.compile(r"\.(.+)\.(tmp|old)-\d+")  # what only a killed process leaves behind


@contextmanager
def new_folder(output: Path, num_bytes: int = 0, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that becomes it by one rename, or is removed.

    `num_bytes` is what will be written, checked against the room there is; with `replace` an older folder of
    that name makes way at the last moment. Raises DiskError when the disk is full or can't be written.
    """
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number, as in containers
        temporary.mkdir(parents=True)
        require_room(temporary, num_bytes)
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
        raise disk_error(output, temporary, num_bytes, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Return the folder of what can be made again: $TWINTUNE_CACHE, else `twintune` in $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("TWINTUNE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or f"{base}/twintune").expanduser()


def refuse_occupied(output: Path, instead: str = "another") -> None:
    """Raise UserError where something is at the place of a folder to write; `instead` says what to name."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already exists; expected a new or empty folder; remove it or name {instead}")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one rename; raises DiskError when the disk is full or can't be written."""
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
        raise DiskError(explain(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def append_text(path: Path, text: str) -> None:
    """Append to a text file, or leave it as it was and raise DiskError when the disk is full or can't be written."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise DiskError(explain(path, error)) from error


def remove_folder(path: Path) -> None:
    """Delete a folder that is whole or gone, never seen half deleted; one that can't be deleted stays."""
    doomed = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with contextlib.suppress(OSError):
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear away what killed processes left in a folder that nobody else writes into now; raises UserError.

    Half-written `.<name>.tmp-<pid>` go. An older folder that was about to be replaced, `.<name>.old-<pid>`, goes back
    to its place where the new one didn't get there.
    """
    left = [(path, match) for path in folder.glob(".*") if (match := LEFT.fullmatch(path.name))]
    try:
        for path, match in sorted(left, key=lambda each: each[0].stat().st_mtime, reverse=True):
            if match[2] == "old" and not (folder / match[1]).exists():
                path.rename(folder / match[1])
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    except OSError as error:
        raise UserError(explain(folder, error)) from error


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
    shutil.rmtree(old, ignore_errors=True)
    output.rename(old)
    try:
        temporary.rename(output)
    except BaseException:  # Ctrl-C as well; a kill -9 here is for sweep to mend
        if not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def require_room(folder: Path, num_bytes: int) -> None:
    """Raise the OSError of a full disk where a folder's disk has less room than that."""
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_error(output: Path, temporary: Path, num_bytes: int, error: OSError) -> DiskError:
    """Say why a folder of `num_bytes` in all, of which some lie in `temporary`, can't be written."""
    if error.errno not in FULL or not temporary.exists():
        return DiskError(explain(output, error))
    written = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    missing = max(1, num_bytes - written - shutil.disk_usage(temporary).free)
    return DiskError(
        f"{output}: the disk is full: {missing:,} bytes are missing; expected room for {num_bytes:,}; "
        "free some, or name a folder on another disk"
    )


def explain(path: Path, error: OSError) -> str:
    """Say in a message for a person why something can't be written."""
    if error.errno in FULL:
        return f"{path}: the disk is full; free some room, or name a folder on another disk"
    return f"{path}: can't be written ({error.strerror}); check the path and its permissions"
