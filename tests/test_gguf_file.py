"""Reading GGUF files, whole and damaged."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from conversions import convert_gguf
from gguf import GGUFReader
from gguf_files import tiny_llama, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.gguf.file import read_gguf
from common.gguf.source import open_gguf_model


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny_llama()).read_bytes()


@given(changes=st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_file_with_flipped_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(whole)
    for place, value in changes:
        damaged[place] = value
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(UserError):
        open_gguf_model(path)


def test_it_is_read_as_ggufs_own_reader_reads_it(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    ours, theirs = read_gguf(path), GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensors[tensor.name].read(), tensor.data)
