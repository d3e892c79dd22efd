"""How a text is cut before its bytes are merged: llama.cpp names each rule by one word, spelled out here.

Each is as the models' own `tokenizer.json` files have it, and any other is refused: a tokenizer that is nearly right
trains the model on the wrong tokens, and nothing ever says so.
"""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

# llama.cpp's names for Llama 3's rule.
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("smollm", *LLAMA3, "qwen2", "gpt-2", "default")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What Llama 3 and Qwen 2 share; they differ in how many digits make a token.
_MODERN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **{name: [_MODERN_WORDS.replace("DIGITS", "{1,3}")] for name in LLAMA3},
    "qwen2": [_MODERN_WORDS.replace("DIGITS", "")],
    # What llama.cpp does for a file that names no rule of its own.
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
}


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
