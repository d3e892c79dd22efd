"""What a process holds is told as the system has it, and of this process alone."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import common.memory
from common.engine import MemoryUse

ROOT = Path(__file__).parent.parent


def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    held = np.ones(400_000_000, np.uint8)
    assert common.memory.process_memory().peak_bytes > held.nbytes
    asked = "from common.memory import process_memory; print(process_memory().peak_bytes)"
    printed = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 5_000_000 < int(printed.stdout) < held.nbytes / 2


def test_on_windows_the_peak_is_the_working_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    held = SimpleNamespace(rss=5, peak_wset=7)
    monkeypatch.setattr(common.memory, "_process", lambda _: SimpleNamespace(memory_info=lambda: held))
    monkeypatch.setattr(common.memory.sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
    assert common.memory.process_memory() == MemoryUse(5, 7)
