"""The libraries behind an engine: which are installed, in which version, and whether that is new enough."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from common.doctor.finding import Finding
from common.engine import EXTRAS, LIBRARIES, installed


def examine_packages(engine: str, needed: bool) -> Iterator[Finding]:
    """Hold each library that an engine's extra asks for to its required version."""
    if not installed(engine):
        fix = f"install it with: pip install 'twintune[{EXTRAS[engine]}]'"
        yield Finding("wrong" if needed else "ok", engine, "not installed", fix if needed else "")
        return
    versions, problems = [], []
    for requirement in requirements(EXTRAS[engine]):
        version = _version(requirement.name)
        versions.append(f"{requirement.name} {version or 'missing'}")
        if version is None or not requirement.specifier.contains(Version(version), prereleases=True):
            problems.append(f"{requirement.name}{requirement.specifier}")
    found = ", ".join(versions) or f"{LIBRARIES[engine]} {_version(LIBRARIES[engine])}"
    if problems:
        wanted = " ".join(f"'{problem}'" for problem in problems)
        yield Finding("wrong", f"{engine} packages", found, f"pip install -U {wanted}")
    else:
        yield Finding("ok", f"{engine} packages", found)


def requirements(extra: str) -> list[Requirement]:
    """Return what the installed twintune asks for with an extra on this system; nothing where it isn't installed."""
    try:
        lines = importlib.metadata.requires("twintune") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    asked = [Requirement(line) for line in lines]
    return [each for each in asked if each.marker and not _holds(each, "") and _holds(each, extra)]


def _holds(requirement: Requirement, extra: str) -> bool:
    assert requirement.marker
    return requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
