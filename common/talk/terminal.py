"""Lines from a person at a terminal, with one key that does something: Tab, bound through the standard readline.

The key types a mark into the line and ends it, which both GNU readline and libedit (macOS) can be told; the echo of it
is wiped away. What was half typed stands in the next line again; libedit can't do that, and has it one key up. Where
there is no readline the key does nothing, and the command does the same. No library more is needed for this.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

from rich.cells import cell_len

MARK = "//switch//"
BINDINGS = {
    False: (rf'"\t": "{MARK}\C-m"', "set enable-bracketed-paste on"),  # so that a Tab in a pasted text is none
    True: (rf'bind -s "^I" "{MARK}^M"',),
}


class Terminal:
    """Ask a person for lines."""

    def __init__(self, colored: bool) -> None:
        """Bind the key; `colored` says whether the terminal has bold letters."""
        self._readline = _readline()
        self._is_libedit = bool(self._readline) and "libedit" in str(getattr(self._readline, "__doc__", ""))
        self._bold = colored and bool(self._readline) and not self._is_libedit
        if self._readline:
            self._readline.set_auto_history(False)
            for binding in BINDINGS[self._is_libedit]:
                self._readline.parse_and_bind(binding)

    def ask(self, prompt: Callable[[], str], switch: Callable[[], None]) -> str | None:
        """Return a line, None at the end of input; the key calls `switch` and asks again. Ctrl-C raises."""
        typed = ""
        while True:
            try:
                line = self._input(f"{prompt()}> ", typed)
            except EOFError:
                print()  # the shell's prompt belongs on a line of its own
                return None
            if MARK not in line:
                return line
            self._wipe(f"{prompt()}> {line}")
            typed = line.replace(MARK, "", 1)
            switch()

    def remember(self, line: str) -> None:
        """Let the arrow keys bring a line back."""
        if self._readline:
            self._readline.add_history(line)

    def _input(self, prompt: str, typed: str) -> str:
        if self._bold:  # what readline is not to count as columns stands between 1 and 2
            prompt = f"\x01\x1b[1m\x02{prompt.rstrip()}\x01\x1b[0m\x02 "
        if not typed or not self._readline:
            return input(prompt)
        if self._is_libedit:
            self.remember(typed)
            return input(prompt)
        insert = self._readline.insert_text
        self._readline.set_startup_hook(lambda: insert(typed))
        try:
            return input(prompt)
        finally:
            self._readline.set_startup_hook()

    def _wipe(self, echoed: str) -> None:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80
        rows = (cell_len(echoed) - 1) // columns + 1
        print(f"\x1b[{rows}A\r\x1b[J", end="", flush=True)


def _readline() -> ModuleType | None:
    with contextlib.suppress(ImportError):
        import readline

        return readline
    return None
