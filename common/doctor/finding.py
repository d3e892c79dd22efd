"""What an examination says: one line for a thing looked at, and what to do where it isn't well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Say of one thing what was found, how that is, and what mends it."""

    state: Literal["ok", "warning", "wrong"]
    what: str
    found: str
    fix: str = ""
