"""What may come to a run from outside: Ctrl-C, SIGTERM, and a terminal that is closed.

The first Ctrl-C or SIGTERM asks the run to stop after its step, the second stops it at once; what was saved stays whole
either way. A closed terminal stops nothing: its SIGHUP is ignored and what would be shown there is dropped.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TextIO


@dataclass
class StopRequest:
    """Say whether somebody asked the run to stop."""

    signal_name: str | None = None


@contextmanager
def stop_on_signals(*numbers: int) -> Iterator[StopRequest]:
    """Catch signals, SIGINT and SIGTERM unless told which, for the length of a run, and put the handlers back."""
    request = StopRequest()

    def handle(number: int, _: FrameType | None) -> None:
        if request.signal_name is not None:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield request  # Python allows handlers in the main thread only
        return
    old = {number: signal.signal(number, handle) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def outlive_terminal() -> Iterator[None]:
    """Go on when the terminal is closed, or whoever reads our output goes away; it can't be undone for the process.

    Programs that we start inherit it.
    """
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.redirect_stdout(LastingStream(sys.stdout)), contextlib.redirect_stderr(LastingStream(sys.stderr)):
        yield


class LastingStream(io.TextIOBase):
    """Write to a text stream for as long as it takes anything, then to nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has it as an attribute
        """Name how text becomes bytes."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write, or drop the text where nobody takes it any more."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Write out what is buffered, or drop it."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def writable(self) -> bool:
        """Tell that it can be written to, always."""
        return True

    def isatty(self) -> bool:
        """Tell whether a person looks on."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Give the number of the file below."""
        return self._stream.fileno()

    def _give_up(self) -> None:
        """Lead the file below to nowhere: its buffer empties there, and libraries that write to it go on as well."""
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
