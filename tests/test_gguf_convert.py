"""The folder of a converted GGUF: whole or not there at all."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf_files import tiny_llama, write_gguf

from common.errors import UserError
from common.gguf.convert import convert_gguf


def test_a_folder_with_files_is_left_alone_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())
    output = tmp_path / "folder"
    output.mkdir()
    convert_gguf(source, output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(UserError, match="folder: already exists"):
        convert_gguf(source, output)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    size = 2 * sum(parameter.numel() for parameter in tiny_llama().parameters())
    with pytest.raises(UserError, match=f"the disk is full: {size - 1000:,} bytes are missing"):
        convert_gguf(source, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (OSError(errno.EIO, "Input/output error"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, seen: type[BaseException]
) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())

    def fail(handle: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(seen):
        convert_gguf(source, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_converting_imports_no_framework() -> None:
    code = "import sys, common.gguf.convert; print({'torch', 'transformers', 'mlx'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
