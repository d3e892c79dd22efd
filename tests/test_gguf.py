"""GGUF to a Hugging Face folder.

The oracles are a transformers model written by hand as llama.cpp would write it, the tokenizers whose
vocabularies the files hold, and torch's own rounding.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, ReaderTensor, TokenType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.base import gguf as gguf_module
from common.base.gguf import TensorPlan, convert_gguf, tensor_blocks
from common.base.tensor_files import encode
from common.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

REAL_MODEL = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"
CORPUS = [
    "the cat sat on the mat",
    "It's 12345 days, isn't it?",
    "def f(x):\n    return x + 1",
    "naïve café 😀",
] * 3
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# Rows, columns, head size and heads all differ, so that no transposition or mix-up goes unseen.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
QUANTISED = {"attn_q": "Q8_0", "attn_v": "Q4_1", "ffn_gate": "Q5_0", "ffn_up": "BF16", "attn_output": "F16"}


def trained_bpe(pre: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def smollm_bpe() -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return trained_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]))


def tiny_llama(**options: object) -> "transformers.LlamaForCausalLM":
    rope = options.pop("rope_parameters", {"rope_type": "default", "rope_theta": 50000.0})
    config = transformers.LlamaConfig(vocab_size=320, rope_parameters=rope, **SHAPE, **options)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        # Norms and biases too: at their usual ones and zeros, a missing one would not show.
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp's convert_hf_to_gguf.py does (`LlamaModel.permute`)."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def add_vocabulary(
    writer: GGUFWriter, tokenizer: Tokenizer, pre: str | None = "smollm", merges: list | None = None
) -> None:
    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIALS else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges or bpe["merges"]])
    writer.add_chat_template(TEMPLATE)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)


def write_gguf(
    path: Path,
    model: "transformers.LlamaForCausalLM",
    *,
    arch: str = "llama",
    quantised: dict[str, str] | None = None,
    vocabulary: Callable[[GGUFWriter], None] = lambda writer: add_vocabulary(writer, smollm_bpe()),
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
    leave_out: str = "",
) -> Path:
    """Write `model` as llama.cpp would, and round its own weights to what the quantised ones say."""
    writer = GGUFWriter(path, arch)
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_key_length(SHAPE["head_dim"])
    writer.add_rope_dimension_count(SHAPE["head_dim"])
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    vocabulary(writer)
    extra(writer)
    for name, weights in gguf_weights(model).items():
        if name == leave_out:
            continue
        part = name.split(".")[-2]
        kind = GGMLQuantizationType[(quantised or {}).get(part, "F32") if weights.ndim == 2 else "F32"]
        rounded = quantize(weights.detach().numpy(), kind)
        weights.data.copy_(torch.from_numpy(dequantize(rounded, kind)))
        heads = {"attn_q": SHAPE["num_attention_heads"], "attn_k": SHAPE["num_key_value_heads"]}.get(part)
        writer.add_tensor(name, permuted(rounded, heads) if heads else rounded, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights(model: "transformers.LlamaForCausalLM") -> dict[str, "torch.nn.Parameter"]:
    weights = dict(model.named_parameters())
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(SHAPE["num_hidden_layers"]):
        names |= {f"blk.{layer}.{part}": f"model.layers.{layer}.{target}" for part, target in PARTS.items()}
    pairs = ((f"{name}.{kind}", f"{target}.{kind}") for name, target in names.items() for kind in ("weight", "bias"))
    return {name: weights[target] for name, target in pairs if target in weights}


def logits(model: "transformers.LlamaForCausalLM") -> "torch.Tensor":
    with torch.no_grad():
        return model(torch.arange(3, 103)[None]).logits


def load_model(folder: Path) -> "transformers.LlamaForCausalLM":
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}},
    ],
    ids=["tied", "untied with biases", "linear rope"],
)
def test_converted_model_computes_what_the_quantised_source_does(tmp_path: Path, options: dict) -> None:
    model = tiny_llama(**options)
    factor = model.config.rope_parameters.get("factor", 1.0)
    source = write_gguf(
        tmp_path / "model.gguf",
        model,
        quantised=QUANTISED,
        extra=lambda writer: writer.add_rope_scaling_factor(factor),
    )
    convert_gguf(source, tmp_path / "folder", "float32")
    # The same float32 weights in the same code: nothing may differ.
    assert torch.equal(logits(load_model(tmp_path / "folder")), logits(model))


def test_small_blocks_of_rows_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama(attention_bias=True), quantised=QUANTISED)
    convert_gguf(source, tmp_path / "whole", "float32")
    monkeypatch.setattr(gguf_module, "_BLOCK_ELEMENTS", 700)
    convert_gguf(source, tmp_path / "blocks", "float32")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "blocks" / "model.safetensors").read_bytes() == whole


def llama3_rope() -> tuple[dict, np.ndarray]:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**{**SHAPE, "max_position_embeddings": 131072}, rope_parameters=scaling)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** -(np.arange(0, SHAPE["head_dim"], 2) / SHAPE["head_dim"])
    return scaling, (plain / scaled.numpy()).astype(np.float32)


def test_llama3_rope_scaling_is_recovered_from_its_frequency_factors(tmp_path: Path) -> None:
    scaling, factors = llama3_rope()
    model = tiny_llama(rope_parameters=scaling)
    source = write_gguf(
        tmp_path / "model.gguf", model, extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
    )
    convert_gguf(source, tmp_path / "folder", "float32")
    loaded = load_model(tmp_path / "folder")
    assert loaded.config.rope_parameters == scaling
    assert torch.equal(logits(loaded), logits(model))


def test_a_rope_scaling_other_than_llama3s_is_refused(tmp_path: Path) -> None:
    scaling, factors = llama3_rope()
    factors[(factors > 1.5) & (factors < 30)] *= 1.01
    source = write_gguf(
        tmp_path / "model.gguf",
        tiny_llama(rope_parameters=scaling),
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    with pytest.raises(UserError, match=r"rope_freqs\.weight has a scaling that differs"):
        convert_gguf(source, tmp_path / "folder")


def test_mlx_lm_and_transformers_read_the_same_theta(tmp_path: Path) -> None:
    llama = pytest.importorskip("mlx_lm.models.llama")
    convert_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama()), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    arguments = llama.ModelArgs.from_dict(config)
    assert (arguments.rope_theta, arguments.rope_scaling) == (50000.0, None)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    assert loaded.rope_parameters == config["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    generator = np.random.default_rng(0)
    values = (generator.standard_normal(100_000) * 10.0 ** generator.integers(-9, 4, 100_000)).astype(np.float32)
    # Halfway between two neighbours, on either side of an even one.
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 0.0, -0.0], np.float32)
    values = np.concatenate([values, halfway, -halfway])
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.int16).numpy().tobytes()
    assert encode(values, dtype) == expected


def test_a_value_beyond_float16_is_refused_with_its_tensor(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = 70000.0
    source = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down\.weight reaches 70000; .*bfloat16"):
        convert_gguf(source, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def plan_of(data: np.ndarray, kind: str, shape: tuple[int, int]) -> TensorPlan:
    fields = {name: None for name in ReaderTensor._fields}
    source = ReaderTensor(**{**fields, "name": "t", "tensor_type": GGMLQuantizationType[kind], "data": data})
    return TensorPlan("t", shape, source, np.arange(shape[0]))


@pytest.mark.parametrize(("kind", "block_bytes"), [("Q4_K", 144), ("Q5_K", 176), ("Q6_K", 210)])
def test_k_quants_are_dequantised(kind: str, block_bytes: int) -> None:
    data = np.random.default_rng(0).integers(0, 60, (5, 2 * block_bytes), dtype=np.uint8)
    written = b"".join(tensor_blocks(plan_of(data, kind, (5, 512)), "float32", Path("m.gguf")))
    values = np.frombuffer(written, np.float32).reshape(5, 512)
    assert values.std() > 0
    assert np.array_equal(values, dequantize(data, GGMLQuantizationType[kind]))


def test_a_type_that_gguf_cannot_read_is_refused() -> None:
    plan = plan_of(np.zeros((2, 4), np.int32), "I32", (2, 4))
    with pytest.raises(UserError, match="tensor t is stored as I32"):
        list(tensor_blocks(plan, "float32", Path("m.gguf")))


def test_memory_does_not_grow_with_a_tensor() -> None:
    data = np.zeros((32768, 1024), np.float32)
    tracemalloc.start()
    for _ in tensor_blocks(plan_of(data, "F32", data.shape), "float16", Path("m.gguf")):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The tensor has 128 MB; a block has 16 MB, and there are a few copies of it on the way.
    assert peak < 80e6


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


def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece_does(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))

    def vocabulary(writer: GGUFWriter) -> None:
        kinds = {original.is_unknown: TokenType.UNKNOWN, original.is_control: TokenType.CONTROL}
        kinds |= {original.is_byte: TokenType.BYTE, lambda token: True: TokenType.NORMAL}
        tokens = range(original.vocab_size())
        writer.add_tokenizer_model("llama")
        writer.add_token_list([original.id_to_piece(token) for token in tokens])
        writer.add_token_scores([original.get_score(token) for token in tokens])
        writer.add_token_types([next(kind for is_, kind in kinds.items() if is_(token)) for token in tokens])
        writer.add_bos_token_id(original.bos_id())
        writer.add_eos_token_id(original.eos_id())

    tokenizer = converted_tokenizer(tmp_path, vocabulary)
    for text in [*CORPUS, "matmat  thethe\n cat", "你好 5", " the"]:
        ids = tokenizer(text).input_ids
        assert ids == [original.bos_id(), *original.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gemma3"}, "the architecture is 'gemma3'; expected llama"),
        ({"extra": lambda writer: writer.add_expert_count(8)}, r"llama\.expert_count is 8"),
        ({"extra": lambda writer: writer.add_sliding_window(64)}, r"llama\.attention\.sliding_window is 64"),
        (
            {"extra": lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones(4, np.float32))},
            r"tensor blk\.0\.ffn_gate_inp\.weight has no Hugging Face name",
        ),
        (
            {"leave_out": "blk.1.attn_v.weight"},
            r"tensor blk\.1\.attn_v\.weight is missing; expected \(48, 64\)",
        ),
        ({"vocabulary": lambda writer: None}, "the vocabulary has 0 tokens"),
        (
            {"vocabulary": lambda writer: add_vocabulary(writer, smollm_bpe(), "tekken")},
            r"tokenizer\.ggml\.pre is 'tekken'; expected smollm, ",
        ),
        (
            {"vocabulary": lambda writer: add_vocabulary(writer, smollm_bpe(), None)},
            r"tokenizer\.ggml\.pre is None; expected smollm, ",
        ),
    ],
    ids=[
        "architecture",
        "experts",
        "window",
        "extra tensor",
        "missing tensor",
        "no vocabulary",
        "pre",
        "no pre",
    ],
)
def test_what_the_folder_cannot_represent_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama(), **options)
    with pytest.raises(UserError, match=f"model.gguf: {message}"):
        convert_gguf(source, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


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


def test_a_folder_with_files_is_left_alone_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())
    output = tmp_path / "folder"
    output.mkdir()
    convert_gguf(source, output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(UserError, match="folder: already exists"):
        convert_gguf(source, output)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    size = 2 * sum(parameter.numel() for parameter in tiny_llama().parameters())
    with pytest.raises(UserError, match=f"the disk is full: {size - 1000:,} bytes are missing"):
        convert_gguf(source, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (OSError(errno.EIO, "Input/output error"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, seen: type[BaseException]
) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())

    def fail(handle: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(seen):
        convert_gguf(source, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_converting_imports_no_framework() -> None:
    code = "import sys, common.base.gguf; print({'torch', 'transformers', 'mlx'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.skipif(not REAL_MODEL.exists(), reason="`make model` has not been run")
def test_the_quickstart_model_answers() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL_MODEL)
    model = load_model(REAL_MODEL)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    # llama.cpp's answer from the GGUF itself; the end token shows that generation stops there.
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
