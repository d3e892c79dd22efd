"""What the torch engine sets before torch is imported and reads it, never against a user's own setting."""

import os
import platform
import sys

import pytest

import torch_backend


def environment_after(monkeypatch: pytest.MonkeyPatch, system: str, release: str, **own: str) -> dict[str, str]:
    """Set the environment on some machine; returns it."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(os, "environ", dict(own))
    torch_backend._set_environment()
    return os.environ


def test_the_allocators_segments_grow_where_they_can(monkeypatch):
    found = environment_after(monkeypatch, "linux", "6.8.0-45-generic")
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("system", "release"), [("linux", "5.15.90.1-microsoft-standard-WSL2"), ("win32", "11"), ("darwin", "24.1.0")]
)
def test_nothing_is_said_to_it_where_they_fail(monkeypatch, system, release):
    assert "PYTORCH_ALLOC_CONF" not in environment_after(monkeypatch, system, release)


@pytest.mark.parametrize("name", sorted(torch_backend.ALLOCATOR))
def test_a_users_own_setting_stays_the_only_one(monkeypatch, name):
    found = environment_after(monkeypatch, "linux", "6.8.0", **{name: "max_split_size_mb:128"})
    assert {key: value for key, value in found.items() if "ALLOC" in key} == {name: "max_split_size_mb:128"}
