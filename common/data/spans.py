"""From texts, and spans of their characters, to token ids and the tokens that the spans became.

Two ways. Any tokenizer tells the characters of each token (offsets), at the price of a third of its time. Byte-level
BPE, which most models have, needs none: its tokens are the bytes of the text, end to end, so places follow from
counting; and texts can be cut before the token that opens a message, since added tokens are taken out before anything
else, so that a part which many texts begin with (a system prompt, tools) is tokenised once a batch. A text whose
bytes don't add up goes the first way.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from common.data.tokens import starts_of
from common.engine import Array

Span = tuple[int, int]  # characters, or tokens, from the first to behind the last


@dataclass(frozen=True, slots=True)
class SpanTokens:
    """Hold the token ids of a text, and the tokens that overlap each of its spans."""

    ids: list[int]
    spans: list[Span]


class SpanEncoder:
    """Tokenise texts of which spans are to be found again; no special tokens are added."""

    def __init__(self, tokenizer: Tokenizer, opener: str = "") -> None:
        """Take the added token that messages begin with; how all this works is looked at when the first texts come."""
        self._tokenizer = tokenizer
        self._opener = opener

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[SpanTokens]:
        """Return the tokens of texts and of their spans."""
        if self._bytes_of is None:
            return self._by_offsets(texts, spans)
        ids = self._encode_parts(texts)
        counted = self._by_counting(texts, spans, ids)
        odd = [index for index, each in enumerate(counted) if each is None]
        told = iter(self._by_offsets([texts[i] for i in odd], [spans[i] for i in odd]))
        return [each or next(told) for each in counted]

    def _by_offsets(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[SpanTokens]:
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            SpanTokens(encoding.ids, [_tokens_of(encoding, begin, stop) for begin, stop in places])
            for encoding, places in zip(encodings, spans, strict=True)
        ]

    def _encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts in parts, equal ones once."""
        opener = self._opener if self._cuts else ""
        parts = [text.split(opener) if opener else ["", text] for text in texts]
        first = dict.fromkeys(part for each in parts for part in each[:1] if part)
        later = dict.fromkeys(part for each in parts for part in each[1:])
        written = [*first, *(opener + part for part in later)]
        encodings = self._tokenizer.encode_batch_fast(written, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        before = {"": [], **dict(zip(first, ids, strict=False))}
        after = dict(zip(later, ids[len(first) :], strict=True))
        return [list(chain(before[each[0]], *[after[part] for part in each[1:]])) for each in parts]

    def _by_counting(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], ids: Sequence[list[int]]
    ) -> list[SpanTokens | None]:
        """Place spans by counting bytes, of all texts at once; None for a text that its tokens are not the bytes of."""
        assert self._bytes_of is not None
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        sizes = self._bytes_of[np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))]
        ends = np.cumsum(sizes)
        first, behind = starts_of(lengths), np.cumsum(lengths)  # tokens of each text
        bytes_before = np.concatenate([[0], ends])
        bounds = [
            [_size(text[:place]) for span in places for place in span]
            for text, places in zip(texts, spans, strict=True)
        ]
        counts = [len(each) for each in bounds]
        flat = np.fromiter(chain.from_iterable(bounds), np.int64) + np.repeat(bytes_before[first], counts)
        # A token overlaps a span where it ends behind the span's beginning, and begins before its end.
        begins = np.searchsorted(ends, flat[0::2], side="right") - np.repeat(first, counts)[0::2]
        stops = np.searchsorted(ends - sizes, flat[1::2], side="left") - np.repeat(first, counts)[1::2]
        places = zip(begins.tolist(), stops.tolist(), strict=True)
        placed = [SpanTokens(tokens, [next(places) for _ in each]) for tokens, each in zip(ids, spans, strict=True)]
        held = (bytes_before[behind] - bytes_before[first]).tolist()
        return [
            each if size == _size(text) and self._is_normal(text) else None
            for text, size, each in zip(texts, held, placed, strict=True)
        ]

    @cached_property
    def _bytes_of(self) -> Array | None:
        """How many bytes of text each token id stands for, int64; None where tokens are not bytes of the text."""
        model, cutter = self._tokenizer.model, _parts(self._tokenizer.pre_tokenizer)
        levels = [part for part in cutter if part["type"] == "ByteLevel"]
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if (
            not isinstance(model, BPE)
            or any(getattr(model, name) for name in odd)
            or len(levels) != 1
            or levels[0]["add_prefix_space"]
            or any(part["type"] != "NFC" for part in _parts(self._tokenizer.normalizer))
        ):
            return None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(max([*vocabulary.values(), *added], default=-1) + 1, np.int64)
        for text, number in vocabulary.items():
            sizes[number] = len(text)  # each character of a byte-level token stands for a byte
        for number, token in added.items():
            sizes[number] = len(token.content.encode())
        return sizes

    def _is_normal(self, text: str) -> bool:
        """Tell whether normalising, which may be NFC here, leaves a text as it is."""
        return text.isascii() or self._tokenizer.normalizer is None or unicodedata.is_normalized("NFC", text)

    @cached_property
    def _cuts(self) -> bool:
        """Whether a text before the opener, and what follows from it on, are tokenised independently."""
        opener = self._opener
        added = self._tokenizer.get_added_tokens_decoder().values()
        own = [token for token in added if token.content == opener]
        others = [token.content for token in added if token.content != opener]
        if not own or own[0].normalized or own[0].lstrip or any(token.single_word for token in added):
            return False
        # No other token may be found across the cut: none holds the opener, or ends with its beginning.
        return not any(
            opener in other or any(other.endswith(opener[:size]) for size in range(1, len(opener))) for other in others
        )


def _parts(component: Any) -> list[dict[str, Any]]:
    """List what a normalizer or pre-tokenizer consists of, as tokenizer.json describes it."""
    if component is None:
        return []
    described = json.loads(component.__getstate__())
    return described.get("pretokenizers") or described.get("normalizers") or [described]


def _size(text: str) -> int:
    """Count the bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _tokens_of(encoding: Encoding, begin: int, stop: int) -> Span:
    """Return the tokens [first, last) that overlap the characters [begin, stop).

    A character may be none's, where a tokenizer trims white space from its offsets, or that of several tokens.
    """
    tokens = map(encoding.char_to_token, range(begin, stop))
    first = next((token for token in tokens if token is not None), None)
    if first is None:
        return 0, 0
    tokens = map(encoding.char_to_token, range(stop - 1, begin - 1, -1))
    last = next(token for token in tokens if token is not None)
    while first > 0 and (place := encoding.token_to_chars(first - 1)) and place[1] > begin:
        first -= 1
    last += 1
    while last < len(encoding) and (place := encoding.token_to_chars(last)) and place[0] < stop:
        last += 1
    return first, last
