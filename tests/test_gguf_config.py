"""The settings of GGUF files as config.json has them; what it can't say is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conversions import convert_gguf
from gguf_files import (
    SHAPE,
    add_vocabulary,
    as_gguf,
    load_model,
    logits,
    smollm_bpe,
    tiny_llama,
    write_exportable,
    write_gguf,
)
from tiny_models import LLAMA3_ROPE, LONG_ROPE, YARN

from common.base.weights import read_model_config
from common.errors import UserError
from common.export.gguf_metadata import model_metadata
from common.gguf.config import model_config
from common.gguf.file import GgufFile, read_gguf
from common.gguf.names import gguf_names
from common.gguf.source import open_gguf_model
from common.gguf.tokenizer import build_tokenizer
from common.gguf.vocabulary import read_vocabulary


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "the architecture is 'mamba'; expected llama or qwen2"),
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
            {"vocabulary": lambda writer: add_vocabulary(writer, smollm_bpe(), "viking")},
            r"tokenizer\.ggml\.pre is 'viking'; expected smollm, ",
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


def changed(gguf: GgufFile, **changes: object) -> GgufFile:
    """Set settings of the architecture, "__" for "."; None takes them away."""
    new = {f"{gguf.architecture}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return replace(gguf, metadata={key: value for key, value in {**gguf.metadata, **new}.items() if value is not None})


def config_of(gguf: GgufFile) -> dict:
    return model_config(gguf, read_vocabulary(gguf.metadata, gguf.path))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GgufFile]:
    """Write a tiny model of an architecture as GGUF, once."""

    @cache
    def write(model_type: str) -> GgufFile:
        folder = tmp_path_factory.mktemp("gguf")
        return read_gguf(as_gguf(folder, write_exportable(folder / "model", model_type)))

    return write


def test_what_a_gemma_file_does_not_say_is_what_llama_cpp_takes(written: Callable[[str], GgufFile]) -> None:
    unsaid = {
        "attention__sliding_window_pattern": None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    gemma2 = config_of(changed(written("gemma2"), attention__sliding_window=None, **unsaid))
    assert gemma2["layer_types"] == ["sliding_attention", "full_attention"]
    assert (gemma2["sliding_window"], gemma2["attn_logit_softcapping"], gemma2["final_logit_softcapping"]) == (
        4096,
        50,
        30,
    )
    gemma3 = config_of(changed(written("gemma3_text"), rope__freq_base_swa=None, block_count=12, **unsaid))
    assert gemma3["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    assert gemma3["rope_parameters"]["sliding_attention"] == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(("model_type", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemmas_scale_attention_by_their_width(
    written: Callable[[str], GgufFile], model_type: str, layers: int
) -> None:
    config = config_of(
        changed(written(model_type), block_count=layers, attention__sliding_window_pattern=None, embedding_length=96)
    )
    assert config["query_pre_attn_scalar"] == 96 // 4
    # Exports refuse what llama.cpp wouldn't compute, by the same fact.
    assert model_metadata(gguf_names(config), "a", "float16")
    with pytest.raises(UserError, match=r"query_pre_attn_scalar is 16, llama\.cpp takes 24"):
        model_metadata(gguf_names(config | {"query_pre_attn_scalar": 16}), "a", "float16")


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma2", {"rope__freq_base_swa": 1000.0}, r"gemma2\.rope\.freq_base_swa is 1000"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"gemma3\.attn_logit_softcapping is 50"),
        ("gemma3_text", {"attention__sliding_window": None}, r"gemma3\.attention\.sliding_window is None"),
        (
            "gemma3_text",
            {"attention__sliding_window_pattern": [True]},
            "sliding_window_pattern names 1 layers; expected 3",
        ),
        ("qwen2", {"attention__head_count_kv": [2, 1]}, r"head_count_kv is \[2, 1\]; expected one number"),
        ("qwen3", {"rope__dimension_count": 8}, "dimension_count is 8; expected the size of a head, 16"),
        ("qwen3", {"attention__value_length": 8}, "value_length is 8; expected the size of a head, 16"),
        ("qwen3", {"rope__scaling__attn_factor": 1.2}, "attn_factor is set without LongRoPE's lists"),
        ("qwen3", {"rope__scaling__type": "dynamic", "rope__scaling__factor": 2.0}, "RoPE is scaled by dynamic"),
        ("phi3", {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, r"original_context_length is None"),
    ],
)
def test_settings_that_no_model_of_the_kind_has_are_refused(
    written: Callable[[str], GgufFile], model_type: str, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_of(changed(written(model_type), **changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma2", {"final_logit_softcapping": None}, r"final_logit_softcapping is None, which llama\.cpp"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0, which llama\.cpp"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16.0}}, r"no place for {'beta_fast': 16\.0}"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "llama3 is not exported to GGUF for qwen2"),
        ("phi3", {"rope_parameters": LONG_ROPE | {"factor": 3.0}}, "no place for {'factor': 3\\.0}"),
    ],
)
def test_options_that_no_gguf_has_are_not_exported(
    tmp_path: Path, model_type: str, changes: dict, message: str
) -> None:
    config = read_model_config(write_exportable(tmp_path / "model", model_type)) | changes
    with pytest.raises(UserError, match=message):
        model_metadata(gguf_names(config), "a", "float16")


def test_phi3s_own_tokenizer_is_refused(written: Callable[[str], GgufFile]) -> None:
    pieces = dict(written("phi3").metadata) | {"tokenizer.ggml.model": "llama"}
    with pytest.raises(UserError, match="the tokenizer is Phi 3's"):
        build_tokenizer(read_vocabulary(pieces, Path("phi.gguf")))


def test_a_gguf_of_something_else_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama(), extra=lambda writer: writer.add_type("adapter"))
    with pytest.raises(UserError, match=r"holds no model but general\.type 'adapter'"):
        open_gguf_model(source)
