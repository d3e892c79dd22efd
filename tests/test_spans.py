"""Tokens of spans by counting bytes, against the offsets that tokenizers itself tells."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, LLAMA3_WORDS, write_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common.data.chat import ChatTokenizer
from common.data.records import Example
from common.data.spans import SpanEncoder, SpanTokens

OPENER, END = "<|im_start|>", "<|im_end|>"
WORDS = [
    "the cat sat",
    " on",
    "  the mat\n\n",
    "e\u0301",
    "é",
    "ﬁ",
    "😀",
    "日本",
    "\t",
    "it's 1234",
    "<|im",
    "_start|>",
]
TEXT = st.lists(st.sampled_from([*WORDS, OPENER, END, "<eat>", "<word>"]) | st.text(max_size=6), max_size=12).map(
    "".join
)


def byte_level(*added: AddedToken, normalizer: normalizers.Normalizer | None = None, pattern: str = "") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    tokenizer.add_special_tokens([OPENER, END])
    tokenizer.add_tokens(list(added))
    return tokenizer


def of_words() -> Tokenizer:
    """A tokenizer whose tokens are no bytes of the text."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([OPENER, END])
    return tokenizer


# name: tokenizer, whether bytes are counted, whether texts are cut
KINDS = {
    "as GPT-2": (byte_level(), True, True),
    "as Llama 3": (byte_level(pattern=LLAMA3_WORDS), True, True),
    "as Qwen": (byte_level(normalizer=normalizers.NFC()), True, True),
    "eats white space": (byte_level(AddedToken("<eat>", lstrip=True, rstrip=True)), True, True),
    "whole words": (byte_level(AddedToken("<word>", single_word=True)), True, False),
    "holds the opener": (byte_level(AddedToken("a<|im_start|>")), True, False),
    "ends as the opener begins": (byte_level(AddedToken(" <|im")), True, False),
    "lower case": (byte_level(normalizer=normalizers.Lowercase()), False, True),
    "words": (of_words(), False, True),
}


def overlapping(tokenizer: Tokenizer, text: str, spans: list[tuple[int, int]]) -> SpanTokens:
    """What tokenizers says of the whole text, the offsets of each token with all of its characters."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    tokens = [
        [i for i, (first, behind) in enumerate(encoding.offsets) if first < stop and behind > begin]
        for begin, stop in spans
    ]
    return SpanTokens(encoding.ids, [(each[0], each[-1] + 1) if each else (0, 0) for each in tokens])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@example(texts=[("", 0, 0), (f"{OPENER}the{END}", 12, 15)])
@given(texts=st.lists(st.tuples(TEXT, st.integers(0, 40), st.integers(1, 40)), max_size=5))
def test_ids_and_places_are_those_of_the_whole_text_with_offsets(kind, texts):
    tokenizer, counts, cuts = KINDS[kind]
    encoder = SpanEncoder(tokenizer, OPENER)
    assert (encoder._bytes_of is not None, encoder._cuts) == (counts, cuts)
    texts = [(text, begin, min(begin + size, len(text))) for text, begin, size in texts]
    spans = [[(begin, stop)] if begin < stop else [] for _, begin, stop in texts]
    found = encoder.encode([text for text, *_ in texts], spans)
    assert found == [overlapping(tokenizer, text, places) for (text, *_), places in zip(texts, spans, strict=True)]


def test_what_many_texts_begin_with_is_tokenised_once():
    tokenizer = KINDS["as GPT-2"][0]
    encoder, seen = SpanEncoder(tokenizer, OPENER), []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_batch_fast(self, texts, **options):
            seen.extend(texts)
            return tokenizer.encode_batch_fast(texts, **options)

    encoder._tokenizer = Counting()
    texts = [f"{OPENER}a long prompt{END}{OPENER}{number}{END}" for number in range(5)]
    encoder.encode(texts, [[]] * 5)
    assert sorted(seen) == sorted([f"{OPENER}a long prompt{END}", *(f"{OPENER}{n}{END}" for n in range(5))])


def test_a_length_that_the_tokenizers_file_asks_for_cuts_and_fills_nothing(tmp_path: Path):
    write_tokenizer(tmp_path, CHATML)
    messages = ({"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hello you"})
    whole = ChatTokenizer(tmp_path).encode(Example("", messages=messages), "assistant")
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path))
    assert json.loads(path.read_text())["truncation"]["max_length"] == 4
    assert ChatTokenizer(tmp_path).encode(Example("", messages=messages), "assistant") == whole
