"""Rebuild a Hugging Face tokenizer from the vocabulary inside a GGUF file.

A GGUF names by one word how text is cut before merging. Each word that we know is spelled out here as the
models' own `tokenizer.json` files have it, and any other is refused: a tokenizer that is nearly right trains
the model on the wrong tokens, and nothing ever says so.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from common.errors import UserError

# llama.cpp's names for Llama 3's rule.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("smollm", *_LLAMA3, "qwen2", "gpt-2", "default")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What Llama 3 and Qwen 2 share; they differ in how many digits make a token.
_MODERN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **{name: [_MODERN_WORDS.replace("DIGITS", "{1,3}")] for name in _LLAMA3},
    "qwen2": [_MODERN_WORDS.replace("DIGITS", "")],
    # What llama.cpp does for a file that names no rule of its own.
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
}
# SentencePiece's stand-in for a space.
_SPACE = "▁"
# Names that vocabularies give a token that only pads, most telling first.
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class Vocabulary:
    """Hold a GGUF's vocabulary: ids are positions in `tokens`; `stops` are all that end a turn, EOS first."""

    metadata: dict[str, Any]
    where: Path
    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    stops: tuple[int, ...]

    def setting(self, key: str, default: object = None) -> Any:
        """Read `tokenizer.ggml.<key>`."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    @property
    def adds_bos(self) -> bool:
        """Tell whether every text starts with BOS; where the file doesn't say, as llama.cpp decides."""
        usual = self.setting("model") == "llama" or self.setting("pre") in _LLAMA3
        return self.bos is not None and bool(self.setting("add_bos_token", usual))

    @property
    def adds_eos(self) -> bool:
        """Tell whether every text ends with EOS."""
        return self.eos is not None and bool(self.setting("add_eos_token", False))


def read_vocabulary(metadata: dict[str, Any], where: Path) -> Vocabulary:
    """Read the tokens and special ids of a GGUF's metadata, with a pad token that is not an end token.

    Raises `UserError` for a vocabulary that is missing or contradicts itself.
    """
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    if not tokens or len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise _damaged(where, f"{len(tokens)} tokens, {len(set(tokens))} of them different, and {len(types)} types")
    named = ("bos", "eos", "eot", "eom", "unknown", "padding")
    found = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in named}
    # Some files name an id past the vocabulary; llama.cpp takes it for none, and so do we.
    ids = {name: token for name, token in found.items() if token is not None and token < len(tokens)}
    stops = tuple(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    # Padding is masked out of the loss. A pad token that also ends a turn (SmolLM2 ships <|im_end|> as both)
    # would hide the end from training, and the model would never learn to stop.
    pads = [ids.get("padding"), *(tokens.index(name) for name in _PAD_NAMES if name in tokens)]
    pad = next((token for token in pads if token is not None and token not in stops), None)
    special = (ids.get("bos"), ids.get("eos"), ids.get("unknown"), pad, stops)
    return Vocabulary(metadata, where, tokens, types, *special)


def _damaged(where: Path, found: str) -> UserError:
    return UserError(f"{where}: the vocabulary has {found}; expected a whole one; download the file again")


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
            raise _damaged(vocabulary.where, f"the merge {line!r} of texts that are not all tokens")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre in _LLAMA3))
    tokenizer.pre_tokenizer = pre_tokenizer_of(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        # No GGUF says so and llama.cpp doesn't do it, but Qwen's models were trained on composed characters.
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def pre_tokenizer_of(pre: str) -> pre_tokenizers.PreTokenizer:
    """Build the rule that llama.cpp calls `pre`, one of PRE_TOKENIZERS."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return gpt2
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    scores = vocabulary.setting("scores", [])
    if len(scores) != len(vocabulary.tokens):
        raise _damaged(vocabulary.where, f"{len(vocabulary.tokens)} tokens and {len(scores)} scores")
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    unknown = next((token for token, kind in kinds if kind == TokenType.UNKNOWN), None)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = _merges_by_score(vocabulary, ids, scores)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    decoded = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.setting("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
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
