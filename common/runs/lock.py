"""One process at a time in an output folder: a lock of the operating system, on `<output_dir>/.lock`.

The kernel gives it back when the process ends, however it ends, so no crash leaves a folder locked; the file's text
only says who holds it. Where a file system knows no locks (some network disks), a run goes on without one and says so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from common.errors import UserError
from common.files import explain

LOCK_NAME = ".lock"
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
FAR = 1 << 30  # Windows locks bytes against reading too: one that is not there hides none of the text


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold a folder, made where it is missing, against every other process; yields False where it can't be locked.

    The lock's file goes with the lock, and a folder made for it that stayed empty too. Raises UserError that names the
    process which holds the folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, held = _open(path, folder)
    except OSError as error:
        raise UserError(explain(folder, error)) from error
    if not held:
        say(f"{folder}: its file system has no locks; don't start a second run there")
    try:
        yield held
    finally:
        if sys.platform == "win32":
            os.close(handle)  # which removes no file that is open
        with contextlib.suppress(OSError):
            path.unlink()
        if sys.platform != "win32":
            os.close(handle)  # last: whoever waits for the lock finds its file gone, and makes another
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()


@dataclass(frozen=True)
class Holder:
    """Name the process that has a folder; what it had no time to write yet is None."""

    pid: int | None = None
    host: str | None = None
    since: str | None = None


def holder(folder: Path) -> Holder | None:
    """Tell which process has a folder, None where nobody has; changes nothing.

    To find out it takes the lock of a dead process for microseconds, in which a run that starts is refused. Where the
    file system knows no locks, it goes by whether the process that is named there lives.
    """
    path = folder / LOCK_NAME
    named = _read_holder(path)
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if _lock(handle):
            return None
    except BlockingIOError:
        return named
    finally:
        os.close(handle)
    lives = named.pid is not None and named.host == platform.node() and psutil.pid_exists(named.pid)
    return named if lives else None


def _read_holder(path: Path) -> Holder:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return Holder(int(written["pid"]), str(written["host"]), str(written["since"]))
    except (OSError, ValueError, TypeError, KeyError):  # it has the lock and has not written yet, or is going
        return Holder()


def _open(path: Path, folder: Path) -> tuple[int, bool]:
    """Open and lock the file, and write into it who we are."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _lock(handle)
            if held and not _is_still(path, handle):  # its holder removed it between our two calls
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(_ourselves()).encode())
            return handle, held
        except BlockingIOError:
            os.close(handle)
            raise UserError(_refusal(path, folder)) from None
        except BaseException:
            os.close(handle)
            raise


def _lock(handle: int) -> bool:
    """Take the lock, or return False where there are none; raises BlockingIOError where another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno in HELD:
            raise BlockingIOError(*error.args) from None
        raise
    return True


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _ourselves() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": platform.node(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}


def _refusal(path: Path, folder: Path) -> str:
    named = _read_holder(path)
    known = named.pid is not None
    who = f"process {named.pid} on {named.host}, since {named.since}" if known else "another process"
    stop = f"stop it (kill {named.pid})" if known else "stop it"
    return (
        f"output_dir: {folder}: another run writes there: {who}; wait for it, {stop}, or use another output_dir "
        "(--set output_dir=...)"
    )
