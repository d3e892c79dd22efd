"""A function of the user's that judges answers: found, called, and blamed by file and line for what it raises.

It is code that the person named, run in this process with this person's rights, like any script of theirs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from common.errors import OwnCodeError, UserError
from common.evaluate.questions import Question

EXPECTED = "expected a function of (answer, expected, record) that returns a number or a dict of numbers"


class OwnFunction:
    """Call `path/to/file.py:function` or `package.module:function`."""

    def __init__(self, place: str) -> None:
        """Import the file or module; raises UserError where there is no such function, OwnCodeError if it raises."""
        self._place = place
        where, _, name = place.rpartition(":")
        module = _import(where, place)
        self._file = getattr(module, "__file__", None)
        self._function = _function(module, name, place)

    def __call__(self, question: Question, answer: str) -> dict[str, float]:
        """Return the numbers by name, a lone one under the empty name; raises OwnCodeError that names the example."""
        try:
            value = self._function(answer, question.expected, dict(question.record))
        except Exception as error:
            raise _blamed(error, self._file, self._place, f", on the answer to {question.source}") from None
        values = value if isinstance(value, dict) else {"": value}
        if not all(isinstance(name, str) and _is_number(number) for name, number in values.items()):
            raise OwnCodeError(
                f"evaluation.metrics: python:{self._place}: returned {value!r:.80} on the answer to {question.source}; "
                "expected a number, true or false, or a dict of these by name, none of them NaN or infinite"
            )
        return {name: float(number) for name, number in values.items()}


def _import(where: str, place: str) -> ModuleType:
    is_file = where.endswith(".py")
    path = Path(where)
    if is_file and not path.is_file():
        raise UserError(f"evaluation.metrics: python:{place}: no such file (looked from {Path.cwd()})")
    folder = str(path.parent.absolute() if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script: its neighbours can be imported
    try:
        return _import_file(path) if is_file else importlib.import_module(where)
    except ModuleNotFoundError as error:
        if is_file or not f"{where}.".startswith(f"{error.name}."):
            raise _blamed(error, str(path) if is_file else None, place, "") from None
        raise UserError(f"evaluation.metrics: python:{place}: no module {where} (looked from {folder})") from None
    except Exception as error:
        raise _blamed(error, str(path) if is_file else None, place, "") from None


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, name: str, place: str) -> Callable[[str, str, dict[str, Any]], Any]:
    function = vars(module).get(name)
    if not callable(function):
        found = "is no function" if name in vars(module) else f"has no {name}"
        raise UserError(f"evaluation.metrics: python:{place}: {found}; {EXPECTED}")
    try:
        inspect.signature(function).bind("answer", "expected", {})
    except TypeError as error:
        raise UserError(f"evaluation.metrics: python:{place}: {error}; {EXPECTED}") from None
    return function


def _blamed(error: Exception, file: str | None, place: str, when: str) -> OwnCodeError:
    """Say what was raised, and in which line of the user's file, or where nothing is known of it, of any."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file and Path(frame.filename).absolute() == Path(file).absolute()]
    last = (own or frames)[-1]
    line = f"{last.filename}:{last.lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        line = f"{error.filename}:{error.lineno}"
    return OwnCodeError(f"evaluation.metrics: python:{place}: {line}: {type(error).__name__}: {error}{when}")


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value)
