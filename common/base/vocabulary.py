"""A base with more tokens: tokenizer, embeddings and head grown together, into a model folder of its own.

New tokens belong to the base, not to a run: every tool then loads base and adapter as usual, and both engines train
the grown matrices with `lora.modules_to_save: [embed_tokens, lm_head]`. A new row starts as the mean of all rows,
which no token's logit stands out by (Hewitt 2021, "Initializing new word embeddings"; transformers resizes so too, with
noise). The cost is the disk: files that hold no embedding are hard links where the file system has them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import AddedToken, Tokenizer

from common.base.tensor_files import decode, encode, header_of
from common.base.weights import (
    check_model_folder,
    data_start,
    read_header,
    read_model_config,
    vocabulary_size,
    weight_files,
)
from common.engine import Array
from common.errors import UserError
from common.files import new_folder, refuse_occupied

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
VOCABULARY_TENSORS = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Growth:
    """Hold which token ids are new, and how many rows embeddings and head have then."""

    new_ids: Sequence[int]
    old_tokens: int
    rows: int


def add_tokens(source: Path, output: Path, tokens: Sequence[str]) -> Growth:
    """Write the model in `source` with further tokens into the new folder `output`.

    Raises UserError for a token that is there already, for weights that can't grow (quantised, or of an unknown
    layout), for an `output` that holds files, and for a full disk.
    """
    check_model_folder(source)
    refuse_occupied(output)
    tokenizer, growth = _grown_tokenizer(source, tokens)
    headers = {path: read_header(path) for path in weight_files(source)}
    size = sum(path.stat().st_size for path in headers) + 100_000_000
    with new_folder(output, size) as folder:
        for path in sorted(source.iterdir()):
            if path.is_file() and path not in headers:
                shutil.copy(path, folder / path.name)
        for path, header in headers.items():
            _copy_weights(path, header, folder / path.name, growth, source)
        tokenizer.save(str(folder / "tokenizer.json"))
        _update_json(folder / "config.json", lambda config: _with_rows(config, growth.rows))
        _update_json(folder / "tokenizer_config.json", lambda config: _with_tokens(config, tokens, growth))
        _update_json(folder / "model.safetensors.index.json", lambda index: _with_size(index, folder))
        _check(folder, tokens, growth)
    return growth


def _grown_tokenizer(source: Path, tokens: Sequence[str]) -> tuple[Tokenizer, Growth]:
    path = source / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{source}: has no tokenizer.json; expected a folder with a fast tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    old = tokenizer.get_vocab_size()
    for token in tokens:
        if not token.strip() or tokenizer.token_to_id(token) is not None:
            problem = "is a token of this model already" if token.strip() else "is empty"
            raise UserError(f"--add-tokens {token!r}: {problem}; expected a text that is no token yet")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    new_ids = [tokenizer.encode(token, add_special_tokens=False).ids[0] for token in tokens]
    for token, token_id in zip(tokens, new_ids, strict=True):
        if tokenizer.decode([token_id]) != token:  # a byte-level decoder reads the letter \u00fc as the byte 0xFC
            raise UserError(
                f"--add-tokens {token!r}: this model's tokenizer writes it as {tokenizer.decode([token_id])!r}; "
                "expected a text that it can write, such as one of ASCII letters and signs"
            )
    return tokenizer, Growth(new_ids, old, max(max(new_ids) + 1, vocabulary_size(source) or 0))


def _copy_weights(path: Path, header: Mapping[str, Any], target: Path, growth: Growth, source: Path) -> None:
    """Copy a safetensors file with its vocabulary matrices grown; one without any becomes a hard link."""
    rows = vocabulary_size(source)
    for name, entry in header.items():
        if entry["shape"][:1] == [rows] and not name.endswith(VOCABULARY_TENSORS) and len(entry["shape"]) > 1:
            raise UserError(
                f"{path}: {name} has a row a token, and how it would grow isn't known; expected only "
                f"{', '.join(VOCABULARY_TENSORS)}"
            )
    grown = {name for name in header if name.endswith(VOCABULARY_TENSORS)}
    if not grown:
        _link(path.resolve(), target)
        return
    start = data_start(path)
    with path.open("rb") as old, target.open("wb") as new:
        places = (_place(name, entry, growth.rows if name in grown else None) for name, entry in header.items())
        new.write(header_of(places))
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            _copy_range(old, new, start + begin, end - begin)
            if name in grown:
                _write_rows(new, path, start + begin, entry, name, growth)


def _write_rows(new: BinaryIO, path: Path, offset: int, entry: Mapping[str, Any], name: str, growth: Growth) -> None:
    """Write the mean over new ids: behind the old rows, and back over rows that stood unused."""
    if entry["dtype"] not in NAMES:
        raise UserError(f"{path}: {name} is stored as {entry['dtype']}; expected floats: grow the base, then quantise")
    old_rows, width = entry["shape"]
    stored = np.memmap(path, np.uint8, "r", offset, (old_rows * width * _item(entry),))
    row = encode(_mean(stored, entry, growth.old_tokens), NAMES[entry["dtype"]])
    new.write(row * (growth.rows - old_rows))
    end = new.tell()
    for token_id in growth.new_ids:
        if token_id < old_rows:
            new.seek(end - (growth.rows - token_id) * len(row))
            new.write(row)
    new.seek(end)


def _mean(stored: Array, entry: Mapping[str, Any], tokens: int) -> Array:
    """Average the rows of the old tokens in float64: (width,) float32."""
    rows, width = entry["shape"]
    block = max(1, CHUNK_BYTES // (width * 8))
    raw = stored.reshape(rows, -1)
    total = np.zeros(width)
    for begin in range(0, tokens, block):
        part = decode(raw[begin : min(begin + block, tokens)].tobytes(), entry["dtype"])
        total += part.reshape(-1, width).sum(axis=0, dtype=np.float64)
    return (total / tokens).astype(np.float32)


def _item(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return (end - begin) // math.prod(entry["shape"])


def _place(name: str, entry: Mapping[str, Any], rows: int | None) -> tuple[str, str, Sequence[int], int]:
    """Say of a tensor what a header tells, with another number of rows where one is given."""
    if rows is not None:
        width = entry["shape"][1]
        return name, entry["dtype"], [rows, width], rows * width * _item(entry)
    begin, end = entry["data_offsets"]
    return name, entry["dtype"], entry["shape"], end - begin


def _copy_range(old: BinaryIO, new: BinaryIO, offset: int, num_bytes: int) -> None:
    old.seek(offset)
    while num_bytes:
        data = old.read(min(num_bytes, CHUNK_BYTES))
        new.write(data)
        num_bytes -= len(data)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy(path, target)


def _update_json(path: Path, change: Any) -> None:
    if path.is_file():
        path.write_text(json.dumps(change(json.loads(path.read_text("utf-8"))), indent=2, ensure_ascii=False), "utf-8")


def _with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    inner = config.get("text_config")
    return config | ({"text_config": inner | {"vocab_size": rows}} if inner else {"vocab_size": rows})


def _with_tokens(config: dict[str, Any], tokens: Sequence[str], growth: Growth) -> dict[str, Any]:
    """Name new tokens where transformers 4 looks for them; where it has no such list, tokenizer.json is enough."""
    if "added_tokens_decoder" not in config:
        return config
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    added = {str(token_id): {"content": token, **entry} for token, token_id in zip(tokens, growth.new_ids, strict=True)}
    return config | {"added_tokens_decoder": config["added_tokens_decoder"] | added}


def _with_size(index: dict[str, Any], folder: Path) -> dict[str, Any]:
    entries = [entry for path in folder.glob("model*.safetensors") for entry in read_header(path).values()]
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
    return index | {"metadata": index.get("metadata", {}) | {"total_size": total}}


def _check(folder: Path, tokens: Sequence[str], growth: Growth) -> None:
    """Read the new folder back: whole files, as many rows as the config says, each new text one token."""
    check_model_folder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = [tokenizer.encode(f"a{token}b", add_special_tokens=False).ids for token in tokens]
    assert all(token_id in ids for token_id, ids in zip(growth.new_ids, found, strict=True)), "a new token is split"
    matrices = [
        entry["shape"]
        for path in weight_files(folder)
        for name, entry in read_header(path).items()
        if name.endswith(VOCABULARY_TENSORS)
    ]
    assert read_model_config(folder) and vocabulary_size(folder) == growth.rows
    if not matrices or any(shape[0] != growth.rows for shape in matrices):
        raise UserError(
            f"{folder}: found no embeddings of {growth.rows} rows; expected {', '.join(VOCABULARY_TENSORS)}"
        )
