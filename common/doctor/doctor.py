"""`twintune doctor`: looks at the machine and proves that it trains, or that both engines agree on a model.

Findings are printed as they come, the slow ones last. The exit code says one thing: 3 where nothing can train here, or
where a model that was asked about computes differently; every other shortcoming is a line with its remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from common.doctor.finding import Finding
from common.engine import LIBRARIES, choose_engine, examine_engine, installed
from common.errors import MachineError

COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


def examine(as_json: bool) -> None:
    """Print what there is to say about this machine; raises MachineError where no engine trains on it."""
    findings = list(_shown(_machine(), as_json))
    if not any(each.what == "ready to train" for each in findings):
        raise MachineError("nothing can train here yet: see the lines that say wrong, and what each advises")


def examine_model(name: str, as_json: bool) -> None:
    """Print whether both engines agree on a model; raises MachineError where they don't."""
    from common.base.hub import resolve_model
    from common.doctor import agreement

    findings = list(_shown(agreement.examine_model(resolve_model(name)), as_json))
    if any(each.state == "wrong" for each in findings):
        raise MachineError(f"{name}: the two engines do not agree on this model: see above")


def _machine() -> Iterator[Finding]:
    from common.doctor.machine import examine_machine
    from common.doctor.packages import examine_packages
    from common.doctor.selftest import self_test

    yield from examine_machine()
    there = [name for name in LIBRARIES if installed(name)]
    for name in LIBRARIES:
        yield from examine_packages(name, needed=not there)
    for name in there:
        yield from _engine(name)
    ready = []
    for name in there:
        for tested in self_test([name]):
            yield tested
            ready += [name] if tested.state == "ok" else []
    if ready:
        best = choose_engine("auto")
        chosen = best if best in ready else ready[0]
        yield Finding("ok", "ready to train", f"with {' and '.join(ready)}; engine: auto takes {chosen}")


def _engine(name: str) -> Iterator[Finding]:
    """Let an engine look at the machine, and say so where it can't even be loaded."""
    try:
        yield from examine_engine(name)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Finding("wrong", name, f"can't be loaded: {reason}", f"reinstall it: pip install -U {LIBRARIES[name]}")


def _shown(findings: Iterator[Finding], as_json: bool) -> Iterator[Finding]:
    """Print findings as they come, for people or one JSON object a line, and pass them on."""
    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        if as_json:
            print(json.dumps(asdict(finding)), flush=True)
        else:
            advice = f"; {finding.fix}" if finding.fix else ""
            state = (f"{finding.state:8}", COLOURS[finding.state])
            console.print(Text.assemble(state, (finding.what, "bold"), f": {finding.found}{advice}"))
        yield finding
