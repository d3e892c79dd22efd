"""A Mac is kept awake while it trains, with its own caffeinate; no other system is touched."""

import os
import time
from pathlib import Path

import pytest
from patience import PATIENCE

from common.runs.awake import kept_awake


@pytest.fixture
def caffeinate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a caffeinate on the PATH that notes its number and arguments and stays until it is ended."""
    notes = tmp_path / "notes"
    program = tmp_path / "caffeinate"
    program.write_text(f'#!/bin/sh\necho "$$ $@" > {notes}.tmp && mv {notes}.tmp {notes}\nexec sleep {PATIENCE}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return notes


def noted(notes: Path) -> list[str]:
    deadline = time.monotonic() + PATIENCE
    while not notes.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return notes.read_text().split()


def test_a_mac_stays_awake_for_the_length_of_the_run(caffeinate, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    said: list[str] = []
    with kept_awake(said.append):
        number, *arguments = noted(caffeinate)
        assert arguments == ["-i", "-w", str(os.getpid())]
        os.kill(int(number), 0)  # it is there
    with pytest.raises(ProcessLookupError):
        os.kill(int(number), 0)
    assert said == ["This Mac stays awake while it trains (caffeinate); closing its lid still puts it to sleep"]


def test_another_system_is_left_alone(caffeinate):
    said: list[str] = []
    with kept_awake(said.append):
        time.sleep(0.1)
    assert said == [] and not caffeinate.exists()


def test_a_mac_without_caffeinate_trains_all_the_same(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setenv("PATH", "")
    said: list[str] = []
    with kept_awake(said.append):
        pass
    assert said == []


def test_a_caffeinate_that_cannot_be_started_is_told(caffeinate, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    (caffeinate.parent / "caffeinate").write_bytes(b"\x7fELF no program")
    said: list[str] = []
    with kept_awake(said.append):
        pass
    assert len(said) == 1 and said[0].startswith("This Mac may fall asleep while it trains: ")
