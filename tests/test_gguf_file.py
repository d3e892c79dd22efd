"""Reading GGUF files, whole and damaged."""

from pathlib import Path

import pytest
from gguf_files import tiny_llama, write_gguf

from common.errors import UserError
from common.gguf.convert import convert_gguf


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "model.gguf", tiny_llama()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (9, 20, 60, 1000, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"cut.gguf: the file ends early .* {length:,} bytes"):
            convert_gguf(cut, tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with b''"),
        (b"PK\x03\x04....", "expected b'GGUF'"),
        (b"GGUF\0\0\0\3", "version 50331648"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "folder")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.gguf: No such file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "folder")
