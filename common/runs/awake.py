"""Keep a Mac from falling asleep while it trains, with the system's own `caffeinate`; other systems are left alone."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def kept_awake(say: Callable[[str], None]) -> Iterator[None]:
    """Run `caffeinate` beside this process on macOS; it ends with us, even if we are killed."""
    program = shutil.which("caffeinate") if platform.system() == "Darwin" else None
    if program is None:
        yield
        return
    quiet = subprocess.DEVNULL
    command = [program, "-i", "-w", str(os.getpid())]
    try:  # a session of its own: Ctrl-C at the terminal is for us alone
        process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError as error:
        say(f"This Mac may fall asleep while it trains: {program} can't be started ({error.strerror})")
        yield
        return
    say("This Mac stays awake while it trains (caffeinate); closing its lid still puts it to sleep")
    try:
        yield
    finally:
        process.terminate()
        process.wait()
