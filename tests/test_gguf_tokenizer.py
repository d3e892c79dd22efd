"""Tokenizers rebuilt from GGUF files, against those that the vocabularies came from."""

import itertools
import json
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import transformers
from conversions import convert_gguf
from gguf import GGUFWriter, TokenType
from gguf_files import CORPUS, SHAPE, TEXTS, add_vocabulary, smollm_bpe, tiny_llama, trained_bpe, write_gguf
from llama_cpp import tokenize
from tokenizers import Tokenizer, pre_tokenizers

from common.gguf.pre_tokenizers import PRE_TOKENIZERS


def test_the_tokenizer_encodes_as_the_one_the_vocabulary_came_from(tmp_path: Path) -> None:
    original = smollm_bpe()
    convert_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama()), tmp_path / "folder")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    texts = [
        *CORPUS,
        "2024\n\n  x\t's 'S",
        "你好 e\u0301 ½",
        "<|im_start|>user\nhi<|im_end|> <|im_start",
        "a<repo_name>b",
        "",
        " ",
    ]
    for text in texts:
        ids = loaded(text).input_ids
        assert ids == original.encode(text).ids
        assert loaded.decode(ids) == text
    messages = [{"role": "user", "content": "the cat"}]
    text = "<|im_start|>user\nthe cat<|im_end|>\n"
    assert loaded.apply_chat_template(messages, tokenize=False) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert loaded.model_max_length == SHAPE["max_position_embeddings"]
    assert loaded.decode(loaded(text + "<repo_name>").input_ids, skip_special_tokens=True) == "user\nthe cat\n"


def test_padding_does_not_hide_the_end_of_a_turn(tmp_path: Path) -> None:
    # The GGUF says pad = <|im_end|>, as SmolLM2's does.
    convert_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama()), tmp_path / "folder")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert loaded.pad_token == "<|endoftext|>"
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "folder" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    # What llama.cpp makes of this text with the same name; written as byte-level letters.
    [
        ("smollm", "IT ' S Ġ 1 2 3 4 5 Ġa . ĊĊĠ Ġb !"),
        ("gpt-2", "IT ' S Ġ12345 Ġa . ĊĊĠ Ġb !"),
        ("llama-bpe", "IT 'S Ġ 123 45 Ġa .ĊĊ Ġ Ġb !"),
        ("qwen2", "IT 'S Ġ 1 2 3 4 5 Ġa .ĊĊ Ġ Ġb !"),
        ("default", "IT ' S Ġ 123 45 Ġa . ĊĊĠ Ġb !"),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_models_do(tmp_path: Path, pre: str, pieces: str) -> None:
    tokenizer = converted_tokenizer(tmp_path, lambda writer: add_vocabulary(writer, smollm_bpe(), pre))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("IT'S 12345 a.\n\n  b!")
    assert [piece for piece, _ in cut] == pieces.split()


def converted_tokenizer(
    folder: Path, vocabulary: Callable[[GGUFWriter], None]
) -> "transformers.PreTrainedTokenizerFast":
    convert_gguf(write_gguf(folder / "model.gguf", tiny_llama(), vocabulary=vocabulary), folder / "folder")
    return transformers.AutoTokenizer.from_pretrained(folder / "folder")


@pytest.mark.parametrize(
    ("pre", "said", "adds"), [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True)]
)
def test_bos_is_added_where_the_file_or_its_rule_says(tmp_path: Path, pre: str, said: bool | None, adds: bool) -> None:
    def vocabulary(writer: GGUFWriter) -> None:
        add_vocabulary(writer, smollm_bpe(), pre)
        if said is not None:
            writer.add_add_bos_token(said)

    tokenizer = converted_tokenizer(tmp_path, vocabulary)
    ids = tokenizer("the cat").input_ids
    assert (ids[0] == 1) == adds
    assert Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json")).encode("the cat").ids == ids


def test_llama3_takes_a_whole_word_of_the_vocabulary_before_it_merges(tmp_path: Path) -> None:
    original = smollm_bpe()
    bpe = json.loads(original.to_str())["model"]
    # Without its merge, this word can only come from the vocabulary as a whole.
    word = "Ġthe"
    kept = [merge for merge in bpe["merges"] if "".join(merge) != word]
    ids = {}
    for pre in ("llama-bpe", "smollm"):
        folder = tmp_path / pre
        folder.mkdir()
        tokenizer = converted_tokenizer(folder, partial(add_vocabulary, tokenizer=original, pre=pre, merges=kept))
        ids[pre] = tokenizer(" the", add_special_tokens=False).input_ids
    assert ids["llama-bpe"] == [bpe["vocab"][word]]
    assert len(ids["smollm"]) > 1


def test_qwen2_composes_characters_first(tmp_path: Path) -> None:
    tokenizer = converted_tokenizer(tmp_path, lambda writer: add_vocabulary(writer, smollm_bpe(), "qwen2"))
    assert tokenizer("cafe\u0301").input_ids == tokenizer("café").input_ids


def read_alike(pre: str, text: str) -> bool:
    """Tell whether llama.cpp reads a text as the models' own tokenizers do, as ours have to."""
    if pre in ("tekken", "gpt-4o"):  # llama.cpp's pattern has no word for letters that only join others
        return not any(unicodedata.category(letter).startswith("M") for letter in text)
    return not PRE_TOKENIZERS[pre].composes or unicodedata.is_normalized("NFC", text)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_each_pre_tokenizer_gives_llama_cpps_tokens(tmp_path: Path, pre: str) -> None:
    # Merges that know no words: every cut that is missing or too many shows.
    whole = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), TEXTS * 2, 700)
    source = tmp_path / "model.gguf"
    model = tiny_llama(vocab_size=whole.get_vocab_size())
    write_gguf(source, model, vocabulary=lambda writer: add_vocabulary(writer, whole, pre))
    convert_gguf(source, tmp_path / "folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    pairs = [first + second for first, second in itertools.pairwise(TEXTS)]
    texts = [text for text in TEXTS + pairs if read_alike(pre, text)]
    assert [tokenizer(text).input_ids for text in texts] == tokenize(source, texts)


WHOLE = ["\n", "\n\n", "▁▁", "▁▁▁", "<b>"]  # pieces that a text is cut into before all others, as Gemma has them


@pytest.mark.parametrize("whole", [[], WHOLE], ids=["as Llama 2", "as Gemma"])
def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece_and_llama_cpp_do(tmp_path: Path, whole: list[str]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not whole,
        user_defined_symbols=whole,
        control_symbols=["<end_of_turn>"],
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))
    kinds = {original.is_unknown: TokenType.UNKNOWN, original.is_control: TokenType.CONTROL}
    kinds |= {
        original.is_byte: TokenType.BYTE,
        lambda token: original.id_to_piece(token) in whole: TokenType.USER_DEFINED,
    }
    kinds |= {lambda token: True: TokenType.NORMAL}

    def vocabulary(writer: GGUFWriter) -> None:
        tokens = range(original.vocab_size())
        pieces = [original.id_to_piece(token) for token in tokens]
        writer.add_tokenizer_model("llama")
        # llama.cpp's converter writes the spaces of such pieces as they are.
        writer.add_token_list([piece.replace("▁", " ") if piece in whole else piece for piece in pieces])
        writer.add_token_scores([original.get_score(token) for token in tokens])
        writer.add_token_types([next(kind for is_, kind in kinds.items() if is_(token)) for token in tokens])
        writer.add_bos_token_id(original.bos_id())
        writer.add_eos_token_id(original.eos_id())
        writer.add_add_space_prefix(not whole)

    source = tmp_path / "model.gguf"
    write_gguf(source, tiny_llama(vocab_size=original.vocab_size()), vocabulary=vocabulary)
    convert_gguf(source, tmp_path / "folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    texts = [*CORPUS, "matmat  thethe\n cat", "你好 5", " the", "a\n\n\n  b   c<b>d", *TEXTS]
    for text, from_llama_cpp in zip(texts, tokenize(source, texts), strict=True):
        ids = tokenizer(text).input_ids
        assert ids == from_llama_cpp
        # SentencePiece takes the first three for plain text, and the last for a space.
        if not any(written in text for written in ("</s>", "<0x", "<end_of_turn>", "▁")):
            assert ids == [original.bos_id(), *original.encode(text)]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    ends = [original.eos_id(), original.piece_to_id("<end_of_turn>")]
    assert json.loads((tmp_path / "folder" / "generation_config.json").read_text())["eos_token_id"] == ends
