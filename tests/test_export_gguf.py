"""GGUF exports as llama.cpp computes them: adapters and merged models of each architecture that is offered."""

from pathlib import Path

import numpy as np
import pytest
from conversions import convert_gguf
from exports import make_adapter, model_logits, peft_logits, run_export
from gguf_files import as_gguf, write_exportable
from llama_cpp import CLOSE, expected, log_probabilities
from tiny_models import write_family, write_llama

from common.base.weights import read_model_config
from common.errors import UserError
from common.export.gguf_metadata import model_metadata
from common.gguf.architectures import ARCHITECTURES
from common.gguf.names import gguf_names

# llama.cpp multiplies rounded weights by inputs rounded to the same dtype (Q8_0: to 8 bits), torch by float32.
LOOSE = {"float16": {"atol": 2e-3}, "bfloat16": {"atol": 5e-2}, "q8_0": {"atol": 0.2}}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Not "phi3": llama.cpp looks for some tokens in the vocabulary of whatever has that in its name.
    return write_exportable(tmp_path_factory.mktemp("gguf") / request.param.replace("phi3", "phi"), request.param)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3, "k_proj": 5}}
    if model.name == "phi":
        fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        patterns = {"target_modules": fused, "rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}}
    return make_adapter(tmp_path_factory.mktemp("gguf") / "adapter", model, **patterns)


def test_llama_cpp_loads_the_merged_model(tmp_path: Path, model: Path, adapter: Path):
    run_export(adapter, tmp_path / "out", "merged-gguf", dtype="float32")
    found = log_probabilities(tmp_path / "out" / "model-f32.gguf")
    np.testing.assert_allclose(found, expected(peft_logits(model, adapter)), **CLOSE)


def test_llama_cpp_loads_the_adapter_over_its_base(tmp_path: Path, model: Path, adapter: Path):
    run_export(adapter, tmp_path / "out", "gguf")
    base = as_gguf(tmp_path, model)
    found = log_probabilities(base, tmp_path / "out" / "adapter-f32.gguf")
    np.testing.assert_allclose(found, expected(peft_logits(model, adapter)), **CLOSE)
    assert np.abs(found - expected(model_logits(model))).max() > 0.1  # the adapter does something


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_llama_cpp_loads_a_model_in_fewer_bits(tmp_path: Path, dtype: str):
    """Rounding is all that is lost: llama.cpp on the file agrees with transformers on the file's own numbers."""
    base = write_llama(tmp_path / "model", tied=True, hidden_size=64, intermediate_size=96, initializer_range=0.06)
    made = make_adapter(tmp_path / "adapter", base, use_dora=True)
    proof = run_export(made, tmp_path / "out", "merged-gguf", dtype=dtype)
    (path,) = (tmp_path / "out").glob("*.gguf")
    convert_gguf(path, tmp_path / "read", "float32")
    found = log_probabilities(path)
    np.testing.assert_allclose(found, expected(model_logits(tmp_path / "read")), **LOOSE[dtype])
    assert 0 < proof["largest_difference"] < proof["tolerance"] < proof["adapter_effect"]
    assert (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8").endswith(f"FROM ./{path.name}\n")


def test_a_llama3_rope_keeps_its_factors(tmp_path: Path):
    rope = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    base = write_llama(tmp_path / "model", rope_parameters=rope)
    made = make_adapter(tmp_path / "adapter", base)
    run_export(made, tmp_path / "out", "merged-gguf", dtype="float32")
    found = log_probabilities(tmp_path / "out" / "model-f32.gguf")
    np.testing.assert_allclose(found, expected(peft_logits(base, made)), **CLOSE)


def test_a_mistral_has_a_context_within_which_its_window_changes_nothing(tmp_path: Path):
    base = write_family(tmp_path / "model", "mistral")
    config = read_model_config(base)
    assert model_metadata(gguf_names(config), "a", "float16")["llama.context_length"] == config["sliding_window"] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA.*--to merged-gguf"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*--to merged-gguf"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head.*--to merged-gguf"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused(tmp_path: Path, settings: dict, message: str):
    base = write_llama(tmp_path / "model", tied="lm_head" in settings.get("target_modules", ()))
    made = make_adapter(tmp_path / "adapter", base, **settings)
    with pytest.raises(UserError, match=message):
        run_export(made, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_was_not_tried_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"model_type granite.*--to merged"):
        gguf_names({"model_type": "granite"})


def test_a_scale_that_llama_cpp_does_not_compute_is_refused(tmp_path: Path):
    config = read_model_config(write_family(tmp_path / "model", "gemma2"))
    with pytest.raises(UserError, match=r"query_pre_attn_scalar is 24, llama.cpp takes 16"):
        model_metadata(gguf_names(config), "a", "float16")


def test_a_setting_that_llama_cpp_does_not_compute_is_refused(tmp_path: Path, model: Path):
    config = read_model_config(model) | {"hidden_act": "relu", "hidden_activation": "relu"}
    with pytest.raises(UserError, match="activation relu"):
        model_metadata(gguf_names(config), "a", "float16")
