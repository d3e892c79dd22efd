"""Every architecture that is written as GGUF is read again: the same weights, the same logits in every program."""

from pathlib import Path

import numpy as np
import pytest
from conversions import convert_gguf
from exports import TOKENS, model_logits
from gguf_files import as_gguf, write_exportable
from llama_cpp import CLOSE, expected, log_probabilities
from tiny_models import LONG_ROPE, YARN

from common.base.tensors import model_tensors
from common.base.weights import read_model_config
from common.config import TrainConfig
from common.engine import open_engine
from common.gguf.architectures import ARCHITECTURES

SCALED = {
    "llama": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    "qwen2": YARN | {"rope_type": "yarn"},
    "gemma3_text": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 70000.0, "factor": 8.0},  # Gemma 3 4B and larger
    },
    "phi3": LONG_ROPE | {"original_max_position_embeddings": 128},
}


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *(f"{name} scaled" for name in SCALED)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, _, scaled = request.param.partition(" ")
    changes = {"rope_parameters": SCALED[model_type]} if scaled else {}
    return write_exportable(tmp_path_factory.mktemp("gguf") / model_type, model_type, **changes)


@pytest.fixture(scope="module")
def written(model: Path) -> Path:
    return as_gguf(model.parent, model)


@pytest.fixture(scope="module")
def folder(written: Path) -> Path:
    convert_gguf(written, written.parent / "folder", "float32")
    return written.parent / "folder"


def test_every_tensor_comes_back(model: Path, folder: Path) -> None:
    original, converted = model_tensors(model), model_tensors(folder)
    assert set(converted) == set(original)
    for name in original:
        # Gemma's norms are stored with 1 added, which rounds what was below 1.
        atol = 1e-6 if "gemma" in model.name and "norm" in name else 0
        np.testing.assert_allclose(converted.read(name), original.read(name), rtol=0, atol=atol, err_msg=name)


def test_both_engines_and_llama_cpp_compute_the_original_from_it(model: Path, written: Path, folder: Path) -> None:
    logits = model_logits(model)
    scale = np.abs(logits).max()
    for name in ("torch", "mlx"):
        engine = open_engine(name, TrainConfig(engine=name, device="cpu", dtype="float32"), folder, None)
        assert np.abs(engine.logits(TOKENS) - logits).max() < 1e-5 * scale
        engine.close()
    np.testing.assert_allclose(log_probabilities(written), expected(logits), **CLOSE)


def test_what_the_config_says_is_what_it_said(model: Path, folder: Path) -> None:
    original, converted = read_model_config(model), read_model_config(folder)
    # A Mistral within its window is a Llama; biases are said by tensors; the rest only trains.
    ignored = {"model_type", "architectures", "transformers_version", "use_cache", "initializer_range", "dtype"}
    ignored |= {"sliding_window", "use_sliding_window", "max_window_layers"} if "gemma" not in model.name else set()
    shared = (original.keys() & converted.keys()) - ignored
    assert {"hidden_size", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"} <= shared
    special = {f"{role}_token_id" for role in ("bos", "eos", "pad")}  # the tiny checkpoints name none
    assert {key: converted[key] for key in shared - special} == {key: original[key] for key in shared - special}
