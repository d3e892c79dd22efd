"""The weights of GGUF files: each quantisation undone, a block of rows at a time."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import convert_gguf
from gguf import GGMLQuantizationType
from gguf_files import SCALES, load_model, logits, smollm_bpe, tiny_llama, write_gguf
from llama_cpp import CLOSE, expected, log_probabilities

from common.base.tensor_files import encode
from common.errors import UserError
from common.gguf import source as source_module
from common.gguf.file import GgufTensor
from common.gguf.source import open_gguf_model

QUANTISED = {"attn_q": "Q8_0", "attn_v": "Q4_1", "ffn_gate": "Q5_0", "ffn_up": "BF16", "attn_output": "F16"}


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
    monkeypatch.setattr(source_module, "BLOCK_NUMBERS", 700)
    convert_gguf(source, tmp_path / "blocks", "float32")
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "blocks" / "model.safetensors").read_bytes() == whole


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
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight reaches 70000; .*bfloat16"):
        convert_gguf(source, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize("kind", [*SCALES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_each_kind_is_undone_as_llama_cpp_undoes_it(tmp_path: Path, kind: str) -> None:
    # In the embeddings, which llama.cpp looks up as they are: where it multiplies, it rounds the other factor too.
    model = tiny_llama(vocab_size=smollm_bpe().get_vocab_size(), hidden_size=256, num_hidden_layers=1)
    source = write_gguf(tmp_path / "model.gguf", model, quantised={"token_embd": kind})
    convert_gguf(source, tmp_path / "folder", "float32")
    found = logits(load_model(tmp_path / "folder"))
    assert torch.equal(found, logits(model))
    np.testing.assert_allclose(log_probabilities(source), expected(found.numpy()), **CLOSE)


def stored(path: Path, data: np.ndarray, kind: str, shape: tuple[int, int]) -> GgufTensor:
    path.write_bytes(b"head" + data.tobytes())
    return GgufTensor(path, "t", GGMLQuantizationType[kind], shape, len(b"head"))


def test_a_type_that_gguf_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tensor t is stored as I32"):
        stored(tmp_path / "t", np.zeros((2, 4), np.int32), "I32", (2, 4)).read()


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=1 << 18, tie_word_embeddings=True)
    opened = open_gguf_model(write_gguf(tmp_path / "model.gguf", model))
    tracemalloc.start()
    for name in opened.shapes:
        for block in opened.blocks(name):
            encode(block, "float16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The embedding has 67 MB; a block has 16 MB, and there are a few copies of it on the way.
    assert 16e6 < peak < 60e6
