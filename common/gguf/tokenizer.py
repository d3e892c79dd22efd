"""Rebuild a Hugging Face tokenizer from a GGUF's vocabulary, by its kind: byte-level BPE or SentencePiece's."""

from __future__ import annotations

import json

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from common.errors import UserError
from common.gguf.pre_tokenizers import PRE_TOKENIZERS
from common.gguf.vocabulary import Vocabulary, damaged

# SentencePiece's stand-in for a space.
SPACE = "▁"


def tokenizer_files(vocabulary: Vocabulary, context_length: int) -> dict[str, str]:
    """Render the tokenizer's files as {file name: text}.

    Raises `UserError` for a kind of vocabulary or a pre-tokenizer that we don't know, and for a damaged one.
    """
    ids = {"bos": vocabulary.bos, "eos": vocabulary.eos, "unk": vocabulary.unk, "pad": vocabulary.pad}
    special = {f"{name}_token": vocabulary.tokens[token] for name, token in ids.items() if token is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    files = {"tokenizer.json": build_tokenizer(vocabulary).to_str(pretty=True)}
    if template := vocabulary.metadata.get("tokenizer.chat_template"):
        # transformers 5 reads the file first; older ones and other tools read the key.
        files["chat_template.jinja"] = config["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False)
    files["special_tokens_map.json"] = json.dumps(special, indent=2, ensure_ascii=False)
    return files


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """Build the tokenizer.

    Raises `UserError`, as `tokenizer_files` does.
    """
    kind = vocabulary.setting("model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{vocabulary.where}: the tokenizer is of kind {kind!r}; expected gpt2 (byte-level BPE) or llama "
            "(SentencePiece); take this model's Hugging Face folder instead"
        )
    if kind == "llama" and vocabulary.metadata.get("general.architecture") == "phi3":
        raise UserError(
            f"{vocabulary.where}: the tokenizer is Phi 3's, which takes away spaces after some special tokens, and no "
            "GGUF says after which; expected Phi 4's; take this model's Hugging Face folder instead"
        )
    tokenizer = _byte_level(vocabulary) if kind == "gpt2" else _sentencepiece(vocabulary)
    tokenizer.add_tokens(_added_tokens(vocabulary))
    before = [vocabulary.bos] if vocabulary.bos is not None and vocabulary.adds_bos else []
    after = [vocabulary.eos] if vocabulary.eos is not None and vocabulary.adds_eos else []
    if before or after:
        names = {token: vocabulary.tokens[token] for token in before + after}
        single = [*(names[token] for token in before), "$A", *(names[token] for token in after)]
        special = [(name, token) for token, name in names.items()]
        tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=special)
    return tokenizer


def _added_tokens(vocabulary: Vocabulary) -> list[AddedToken]:
    # Some files type an end token as a plain one; a token with a role is special whatever its type.
    roles = {vocabulary.bos, vocabulary.pad, *vocabulary.stops}
    special_types = (TokenType.CONTROL, TokenType.UNKNOWN)
    added = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        special = index in roles or kind in special_types
        if special or kind == TokenType.USER_DEFINED:
            added.append(AddedToken(token, special=special, normalized=False))
    return added


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    pre = vocabulary.setting("pre")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{vocabulary.where}: tokenizer.ggml.pre is {pre!r}; expected {', '.join(PRE_TOKENIZERS)}; "
            "take this model's Hugging Face folder, or a GGUF that a current llama.cpp made"
        )
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = []
    for line in vocabulary.setting("merges", []):
        # "left right"; like llama.cpp, look for the space from the second character on.
        cut = line.find(" ", 1)
        merges.append((line[:cut], line[cut + 1 :]))
        if not {line[:cut], line[cut + 1 :], line[:cut] + line[cut + 1 :]} <= ids.keys():
            raise damaged(vocabulary.where, f"the merge {line!r} of texts that are not all tokens")
    return PRE_TOKENIZERS[pre].tokenizer(ids, merges)


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    scores = vocabulary.setting("scores", [])
    if len(scores) != len(vocabulary.tokens):
        raise damaged(vocabulary.where, f"{len(vocabulary.tokens)} tokens and {len(scores)} scores")
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    unknown = next((token for token, kind in kinds if kind == TokenType.UNKNOWN), None)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = _merges_by_score(vocabulary, ids, scores)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    decoded = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.setting("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        decoded.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decoded)
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """List every way to make each piece from two, best score first: SentencePiece's order as BPE merges."""
    merges = []
    for index, piece in enumerate(vocabulary.tokens):
        if vocabulary.types[index] == TokenType.NORMAL:
            # Longest left half first: where two places could give the piece, SentencePiece takes the left.
            halves = [(piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1)]
            merges += [(-scores[index], half) for half in halves if half[0] in ids and half[1] in ids]
    return [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
