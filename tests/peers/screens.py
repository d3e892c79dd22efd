"""Make the README's pictures from a real run: the quickstart in a terminal, a chat with it, and the report on it.

    python tests/peers/screens.py mlx|torch [FOLDER [RUN]]      # FOLDER: configs/quickstart

Trains the quickstart as `make train-...` does, in a terminal of 100 columns that pyte (pip install pyte) draws, and
writes the terminal after step 40 as progress.svg, a chat with base and adapter in turn as chat.svg, and the page as
Chromium shows it, report.png. With RUN, the folder of a finished run, nothing is trained, and progress.svg stays.
"""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

from common.report.write import write_report

COLUMNS, LINES = 100, 24
AFTER_STEP = 40
TYPED = ("\t", "turn on the lamp in the kitchen\r", "\t", "/retry\r", "close the garage door\r")


class Terminal:
    """Run the program in a terminal whose screen can be looked at."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
        command = [sys.executable, "-m", "common.cli", *arguments]
        self.process = subprocess.Popen(
            command, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self.screen)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def looks(self) -> Iterator[list[str]]:
        """Give the lines of the screen each time they have changed, until the program ends."""
        with contextlib.suppress(OSError):  # the last one who wrote there is gone
            while part := os.read(self._master, 65536):
                self._stream.feed(part)
                yield [line.rstrip() for line in self.screen.display]

    def wait_for(self, seen: Callable[[list[str]], bool]) -> None:
        assert any(map(seen, self.looks())), "\n".join(self.screen.display)

    def lines(self) -> list[Text]:
        """Copy the screen with its colours, without empty lines at its end."""
        lines = [self._line(row) for row in range(LINES)]
        while lines and not lines[-1].plain:
            lines.pop()
        return lines

    def _line(self, row: int) -> Text:
        line = Text()
        for column in range(COLUMNS):
            cell = self.screen.buffer[row][column]
            color = "" if cell.fg == "default" else f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else cell.fg
            names = {"brightblack": "bright_black", "brightred": "bright_red", "brown": "yellow"}
            line.append(cell.data, f"{'bold ' if cell.bold else ''}{names.get(color, color)}".strip())
        line.rstrip()
        return line


def train_on_screen(engine: str, output: Path) -> list[Text]:
    """Train to the end in a terminal; returns the lines of its screen as they stood after a step."""
    settings = ["--set", f"output_dir={output}", "--engine", engine]
    terminal, kept = Terminal("train", "--config", "configs/quickstart.yaml", *settings), None
    for lines in terminal.looks():
        at = [int(found[1]) for line in lines if (found := re.match(r"step (\d+)/\d+  epoch", line))]
        if kept is None and at and at[-1] > AFTER_STEP:
            kept = terminal.lines()
    assert terminal.process.wait() == 0 and kept is not None, "\n".join(terminal.screen.display)
    return kept


def chat_on_screen(engine: str, adapter: Path) -> list[Text]:
    """Ask the base, then the adapter; returns the lines of the screen before the end."""
    terminal = Terminal("chat", "--adapter", str(adapter), "--engine", engine, "--max-new-tokens", "60")
    for number, keys in enumerate([*TYPED, ""]):
        before = TYPED[:number]
        who, answers = ("adapter>", "base>")[before.count("\t") % 2], sum("\r" in each for each in before)
        terminal.wait_for(lambda lines, last=(who, answers): (prompt(lines), str(lines).count("tokens/s")) == last)
        terminal.type(keys)
    kept = terminal.lines()
    terminal.type("\x04")
    assert terminal.process.wait() == 0
    return kept


def prompt(lines: list[str]) -> str:
    """Return the last line that isn't empty."""
    return next((line for line in reversed(lines) if line), "")


def save_svg(verb: str, lines: list[Text], path: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in lines:
            console.print(line, soft_wrap=True)
        svg = console.export_svg(title=f"twintune {verb}")
    path.write_text(re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL), encoding="utf-8")  # from elsewhere


def photograph(page: Path, picture: Path) -> None:
    """Take the top of a page as a desk shows it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": 1180, "height": 900}, offline=True).new_page()
        tab.goto(page.as_uri())
        tab.screenshot(path=picture)
        browser.close()


def main() -> None:
    given = sys.argv[1:]
    engine, folder, run = given + ["configs/quickstart", ""][len(given) - 1 :]
    pictures = Path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(run or Path(temporary) / f"quickstart-{engine}")
        if not run:
            save_svg("train", train_on_screen(engine, output), pictures / "progress.svg")
        save_svg("chat", chat_on_screen(engine, output / "final"), pictures / "chat.svg")
        photograph(write_report([output], Path(temporary) / "report.html").resolve(), pictures / "report.png")


if __name__ == "__main__":
    main()
