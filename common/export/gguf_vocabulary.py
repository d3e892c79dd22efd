"""A Hugging Face tokenizer in llama.cpp's words: the opposite way of common/gguf/tokenizer.py, by its tables.

llama.cpp names by one word how text is cut. Here that word is found by building each rule it knows and comparing,
and what was found is built into a tokenizer again and held against the original on random texts: a vocabulary that is
nearly right is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import Tokenizer

from common.errors import UserError
from common.gguf.pre_tokenizers import PRE_TOKENIZERS, Rule
from common.gguf.tokenizer import build_tokenizer
from common.gguf.vocabulary import OTHER_ENDS, ROLES, read_vocabulary

SAMPLES, SAMPLE_TOKENS = 64, 12


def vocabulary_metadata(folder: Path, stops: Sequence[int], rows: int) -> dict[str, Any]:
    """Return a tokenizer's GGUF settings, with all tokens that end a turn, filled up to the `rows` of the embedding.

    Raises UserError for a tokenizer that llama.cpp's rules can't express.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: has no tokenizer.json, which a GGUF's vocabulary is made of; save the tokenizer there"
        )
    parsed = json.loads(path.read_text(encoding="utf-8"))
    if parsed["model"].get("type") not in ("BPE", None):
        raise _refusal(path, f"a {parsed['model']['type']} model")
    pieces = bool(parsed["model"].get("byte_fallback"))
    metadata = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        **_tokens(parsed, rows),
        **(_pieces(parsed, rows) if pieces else _bytes(parsed, path)),
        **_special(folder, stops, parsed),
    }
    _check(metadata, path, parsed)
    return metadata


def _tokens(parsed: dict[str, Any], rows: int) -> dict[str, Any]:
    by_id = {index: token for token, index in parsed["model"]["vocab"].items()}
    added = {token["id"]: token for token in parsed["added_tokens"]}
    by_id |= {index: token["content"] for index, token in added.items()}
    unknown = parsed["model"].get("unk_token")
    tokens, types = [], []
    for index in range(max(rows, max(by_id) + 1)):
        token = by_id.get(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            types.append(TokenType.UNUSED)
        elif token == unknown:
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.BYTE if _is_byte(token, parsed) else TokenType.NORMAL)
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [int(kind) for kind in types]}


def _is_byte(token: str, parsed: dict[str, Any]) -> bool:
    return bool(parsed["model"].get("byte_fallback")) and len(token) == 6 and token.startswith("<0x")


def _bytes(parsed: dict[str, Any], path: Path) -> dict[str, Any]:
    found = _plain(parsed["pre_tokenizer"]), bool(parsed["model"].get("ignore_merges"))
    pre = next((name for name, rule in PRE_TOKENIZERS.items() if (_cuts(rule), rule.ignore_merges) == found), None)
    if pre is None:
        raise _refusal(path, "a way of cutting words that no rule of llama.cpp known here has")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parsed["model"]["merges"]]
    return {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def _pieces(parsed: dict[str, Any], rows: int) -> dict[str, Any]:
    """Give each piece the score of its first merge's place, by which SentencePiece merges in the same order."""
    scores = [0.0] * max(rows, len(parsed["model"]["vocab"]))
    for place, merge in reversed(list(enumerate(parsed["model"]["merges"]))):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores[parsed["model"]["vocab"][left + right]] = -float(place + 1)
    prefixed = "Prepend" in json.dumps(parsed["normalizer"])
    return {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefixed}


def _special(folder: Path, stops: Sequence[int], parsed: dict[str, Any]) -> dict[str, Any]:
    config = _json(folder / "tokenizer_config.json")
    ids = parsed["model"]["vocab"] | {token["content"]: token["id"] for token in parsed["added_tokens"]}
    named = {role: config.get(f"{role}_token") for role in ROLES}
    texts = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
    found = {role: ids[text] for role, text in texts.items() if text in ids}
    encoded = Tokenizer.from_str(json.dumps(parsed)).encode("a").ids
    metadata = {f"tokenizer.ggml.{ROLES[role]}_token_id": index for role, index in found.items()}
    metadata["tokenizer.ggml.add_bos_token"] = "bos" in found and encoded[0] == found["bos"]
    metadata["tokenizer.ggml.add_eos_token"] = "eos" in found and encoded[-1] == found["eos"]
    others = [index for index in stops if index != found.get("eos")]
    metadata |= {f"tokenizer.ggml.{name}_token_id": index for name, index in zip(OTHER_ENDS, others, strict=False)}
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    return metadata | ({"tokenizer.chat_template": text} if isinstance(text, str) else {})


def _check(metadata: dict[str, Any], path: Path, parsed: dict[str, Any]) -> None:
    """Raise UserError where the tokenizer made of the settings reads random texts otherwise than the original."""
    ours, theirs = build_tokenizer(read_vocabulary(metadata, path)), Tokenizer.from_str(json.dumps(parsed))
    random = np.random.default_rng(0)
    for row in random.integers(0, len(parsed["model"]["vocab"]), (SAMPLES, SAMPLE_TOKENS)):
        text = theirs.decode(row.tolist(), skip_special_tokens=False)
        if ours.encode(text).ids != theirs.encode(text).ids:
            raise _refusal(path, f"tokens that llama.cpp's rules would not make of {text[:40]!r}")


def _cuts(rule: Rule) -> Any:
    return _plain(json.loads(rule.tokenizer({}, []).to_str())["pre_tokenizer"])


def _plain(rule: Any) -> Any:
    """Leave out of a rule what changes offsets alone, and the sequence around a single step."""
    if isinstance(rule, list):
        return [_plain(each) for each in rule]
    if not isinstance(rule, dict):
        return rule
    steps = rule.get("pretokenizers")
    if steps is not None and len(steps) == 1:
        return _plain(steps[0])
    return {key: _plain(value) for key, value in rule.items() if key != "trim_offsets"}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _refusal(path: Path, found: str) -> UserError:
    return UserError(
        f"{path}: has {found}, so its vocabulary can't be written as GGUF here; write --to merged, and convert that "
        "folder with llama.cpp's convert_hf_to_gguf.py"
    )
