"""How a text is cut before its bytes are merged: llama.cpp names each rule by one word, spelled out here.

Each is as the models' own `tokenizer.json` files have it, and any other is refused: a tokenizer that is nearly right
trains the model on the wrong tokens, and nothing ever says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What Llama 3 and Qwen 2 share; they differ in how many digits make a token.
_MODERN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Words that end where lower case turns to upper; GPT-4o's end with a contraction.
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+SUFFIX|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*SUFFIX"
    r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rule:
    """Hold the patterns that cut a text, one after another, and what else their models do to it."""

    patterns: tuple[str, ...] = ()
    digits: bool = False  # every digit by itself, then GPT-2's own cut
    ignore_merges: bool = False  # a whole word of the vocabulary is taken before any merge
    adds_bos: bool = False  # where the file doesn't say
    composes: bool = False  # characters first: no GGUF says so and llama.cpp doesn't do it, but the models expect it

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Build the rule as `tokenizer.json` has it."""
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns)
        first: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        first += [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        return pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level

    def tokenizer(self, ids: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        """Build a byte-level tokenizer that cuts by this rule."""
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=self.ignore_merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = self.pre_tokenizer(), decoders.ByteLevel()
        if self.composes:
            tokenizer.normalizer = normalizers.NFC()
        return tokenizer


_LLAMA3 = Rule((_MODERN_WORDS.replace("DIGITS", "{1,3}"),), ignore_merges=True, adds_bos=True)
_QWEN2 = Rule((_MODERN_WORDS.replace("DIGITS", ""),), composes=True)
PRE_TOKENIZERS = {
    "smollm": Rule(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": Rule(_LLAMA3.patterns),
    "dbrx": Rule(_LLAMA3.patterns),  # Phi 4
    "gpt-4o": Rule((_CASED_WORDS.replace("SUFFIX", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}"),)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,  # DeepSeek R1's distilled models
    "tekken": Rule(  # Mistral Nemo and later
        (_CASED_WORDS.replace("SUFFIX", "").replace("DIGITS", ""),), ignore_merges=True, adds_bos=True
    ),
    "gpt-2": Rule(),
    # What llama.cpp does for a file that names no rule of its own.
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}
