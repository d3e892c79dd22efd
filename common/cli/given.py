"""The command as it was given, and as it is to be given again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def resume_command(arguments: list[str]) -> str:
    """Return the command that was given, asking for the newest checkpoint."""
    completed = with_bare_resume(arguments)
    if "--resume" in completed:
        at = completed.index("--resume")
        del completed[at : at + 2]
    return same_command([*completed, "--resume"])


def same_command(arguments: list[str]) -> str:
    """Return a command line of the program as it was called: it may not be on the PATH."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "twintune" else "twintune"
    return shlex.join([program, *arguments])


def with_bare_resume(arguments: list[str]) -> list[str]:
    """Complete a `--resume` without a value to `--resume auto`, which typer can't do by itself."""
    completed: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        completed.append(argument)
        if argument == "--resume" and following.startswith("-"):
            completed.append("auto")
    return completed
