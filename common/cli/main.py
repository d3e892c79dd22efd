"""Run the command line: one message and an exit code for whatever a user can cause, and no traceback."""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer

from common.cli import asking, looking, training, writing
from common.cli.given import with_bare_resume
from common.errors import TwintuneError
from common.runs.signals import LastingStream

VERBS: tuple[Any, ...] = (
    *(training.train, asking.evaluate, asking.generate, asking.chat),
    *(training.preview, training.estimate, training.bench),
    *(looking.doctor, looking.status, looking.report),
    *(writing.init, writing.schema, writing.convert, writing.export),
)

app = typer.Typer(
    name="twintune",
    help="Fine-tune with one config on MLX or torch; out comes a standard PEFT adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in VERBS:
    app.command(epilog=f"Example: {verb.example}")(verb)


def main() -> None:
    """Run the command line; what a user can cause ends in one message and an exit code, without a traceback."""
    try:
        app(args=with_bare_resume(sys.argv[1:]), prog_name="twintune")
    except TwintuneError as error:
        _leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        where = error.filename or "a file"
        _leave(
            f"{where}: {error.strerror}; free some room or check the permissions; what was saved before is intact",
            2,
        )


def _leave(message: str, code: int) -> None:
    errors = LastingStream(sys.stderr)  # whoever read our output may be gone: the exit code is the same
    LastingStream(sys.stdout).flush()
    print(message if code == 130 else f"error: {message}", file=errors, flush=True)
    sys.exit(code)
