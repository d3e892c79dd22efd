"""Make the README's pictures from a real run: the quickstart in a terminal, and the report on it in Chromium.

    python tests/peers/screens.py mlx|torch [FOLDER]      # FOLDER: configs/quickstart

Trains the quickstart as `make train-...` does, in a terminal of 100 columns that pyte (pip install pyte) draws, and
writes the terminal after step 40 as progress.svg, then the page as Chromium shows it, report.png.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

from common.report.write import write_report

COLUMNS, LINES = 100, 16
AFTER_STEP = 40


def train_on_screen(engine: str, output: Path) -> list[Text]:
    """Train to the end in a terminal; returns the lines of its screen as they stood after a step."""
    master, slave = pty.openpty()
    settings = ["--set", f"output_dir={output}", "--engine", engine]
    command = [sys.executable, "-m", "common.cli", "train", "--config", "configs/quickstart.yaml", *settings]
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
    screen, kept = pyte.Screen(COLUMNS, LINES), None
    stream = pyte.ByteStream(screen)
    with subprocess.Popen(command, env=environment, stdout=slave, stderr=slave) as process:
        os.close(slave)
        while part := read(master):
            stream.feed(part)
            at = [int(found[1]) for line in screen.display if (found := re.match(r"step (\d+)/\d+  epoch", line))]
            if kept is None and at and at[-1] > AFTER_STEP:
                kept = lines_of(screen)
    assert process.returncode == 0 and kept is not None, "\n".join(screen.display)
    return kept


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the last one who wrote there is gone
        return b""


def lines_of(screen: pyte.Screen) -> list[Text]:
    """Copy a screen with its colours, without empty lines at its end."""
    lines = []
    for row in range(LINES):
        line = Text()
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            color = "" if cell.fg == "default" else f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else cell.fg
            names = {"brightblack": "bright_black", "brightred": "bright_red", "brown": "yellow"}
            line.append(cell.data, f"{'bold ' if cell.bold else ''}{names.get(color, color)}".strip())
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def save_svg(lines: list[Text], path: Path) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in lines:
            console.print(line, soft_wrap=True)
        svg = console.export_svg(title="twintune train")
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
    engine, folder = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "configs/quickstart")
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / f"quickstart-{engine}"
        save_svg(train_on_screen(engine, output), folder / "progress.svg")
        photograph(write_report([output], None).resolve(), folder / "report.png")


if __name__ == "__main__":
    main()
