"""The machine as training will find it: chip, memory, disk, power, heat, and whether the Hub answers.

Every function asks one thing and returns at most a finding about it; nothing here needs an engine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from common.cpus import available_cpus
from common.doctor.finding import Finding

LITTLE_MEMORY, LITTLE_DISK, NO_DISK = 4e9, 10e9, 1e9  # bytes
HUB_SECONDS = 3.0
COMMAND_SECONDS = 5.0


def examine_machine() -> Iterator[Finding]:
    """Look at everything but the engines, one finding at a time."""
    yield Finding("ok", "system", f"{_system()}, Python {platform.python_version()}")
    yield Finding("ok", "chip", f"{_chip()}, {available_cpus()} cores usable")
    yield memory()
    yield disk(Path.cwd(), "disk here")
    yield disk(_hub_cache(), "disk of the Hub's cache")
    yield hub()
    yield from power()


def about_machine() -> str:
    """Describe the machine in one line, to stand beside figures measured on it."""
    gigabytes = round(psutil.virtual_memory().total / 2**30)  # as machines are sold
    return f"{_chip()}, {gigabytes} GB, {_system()}, Python {platform.python_version()}"


def memory() -> Finding:
    """Say how much memory there is and how much of it is free."""
    use = psutil.virtual_memory()
    found = f"{use.available / 1e9:.1f} of {use.total / 1e9:.1f} GB free"
    if use.available < LITTLE_MEMORY:
        return Finding("warning", "memory", found, "close other programs, or take a small model with load_in_4bit")
    return Finding("ok", "memory", found)


def disk(path: Path, what: str) -> Finding:
    """Say how much room there is where `path` is or would be made."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / 1e9:.1f} GB free in {there}"
    fix = "free some: a 7B model takes 15 GB, a checkpoint of its adapter 0.5 GB"
    if free < NO_DISK:
        return Finding("wrong", what, found, fix)
    return Finding("warning", what, found, fix) if free < LITTLE_DISK else Finding("ok", what, found)


def hub(seconds: float = HUB_SECONDS) -> Finding:
    """Ask the Hugging Face Hub, or the mirror that HF_ENDPOINT names, for a sign of life."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding("warning", "Hub", "HF_HUB_OFFLINE is set", "models come from local folders and the cache only")
    try:
        request = urllib.request.Request(f"{endpoint}/api/models?limit=1", headers={"User-Agent": "twintune"})
        with urllib.request.urlopen(request, timeout=seconds):
            return Finding("ok", "Hub", f"{endpoint} answers")
    except urllib.error.HTTPError as error:
        return Finding("ok", "Hub", f"{endpoint} answers (HTTP {error.code})")
    except (OSError, ValueError) as error:
        fix = "download models elsewhere and give the path of the folder, or set HF_ENDPOINT or HTTPS_PROXY"
        return Finding("warning", "Hub", f"no answer from {endpoint} in {seconds:g} s ({_short(error)})", fix)


def power() -> Iterator[Finding]:
    """Say whether a battery is in use and whether a Mac is slowed down by heat."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None  # not every system has it
    if battery is not None:
        found = f"{battery.percent:.0f}%"
        if battery.power_plugged is False:
            yield Finding("warning", "battery", f"{found}, not plugged in", "plug it in: training drains it in an hour")
        else:
            yield Finding("ok", "battery", f"{found}, plugged in")
    if sys.platform == "darwin":
        limit = speed_limit(_output("pmset", "-g", "therm"))
        if limit < 100:
            fix = "let it cool, or train with longer pauses between runs"
            yield Finding("warning", "heat", f"the CPU is held to {limit}% of its speed", fix)
        else:
            yield Finding("ok", "heat", "no thermal limit")


def speed_limit(therm: str) -> int:
    """Read the per cent of its speed that macOS leaves the CPU out of what `pmset -g therm` prints."""
    found = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", therm)
    return int(found[1]) if found else 100


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} ({platform.machine()})"
    return f"{platform.system()} {platform.release()} ({platform.machine()})"


def _chip() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def _hub_cache() -> Path:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def _output(*command: str) -> str:
    """Return what a command prints, nothing where it isn't there or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _short(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:80] or type(error).__name__
