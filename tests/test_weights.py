"""A base model's folder: what is refused before anything heavy is loaded, and how a base is recognised again."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.base.weights import (
    check_model_folder,
    fingerprint,
    read_header,
    rope_in_both_forms,
    tensor_names,
    vocabulary_size,
    weight_files,
)
from common.errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same with its weights in two files and an index."""
    (model / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for name, tensor in shards.items():
        save_file({tensor: np.arange(6, dtype=np.float32)}, model / name)
    weight_map = {tensor: name for name, tensor in shards.items()}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        check_model_folder(directory)
    return str(error.value)


def test_a_whole_model_is_accepted(tiny_model: Path):
    check_model_folder(tiny_model)
    assert "model.layers.1.mlp.up_proj.weight" in tensor_names(tiny_model)
    assert vocabulary_size(tiny_model) == 416


def test_vocabulary_size_of_a_multimodal_config_is_that_of_its_text_part(model: Path):
    (model / "config.json").write_text('{"model_type": "x", "text_config": {"vocab_size": 7}}')
    assert vocabulary_size(model) == 7
    (model / "config.json").write_text('{"model_type": "x"}')
    assert vocabulary_size(model) is None


def test_every_cut_of_a_weight_file_is_noticed(model: Path):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 7, 8, header - 1, header, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert f"{size:,} bytes" in refused(model)
    path.write_bytes(whole + b"\0")
    assert f"{len(whole) + 1:,} bytes, its header promises {len(whole):,}" in refused(model)


@pytest.mark.parametrize("header", [b"[]", b"{]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"\xff\xff"])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="header can't be read"):
        read_header(path)


def test_shards_are_found_by_their_index(sharded: Path):
    assert [path.name[:11] for path in weight_files(sharded)] == ["model-00001", "model-00002"]
    assert tensor_names(sharded) == {"a", "b"}


def test_a_missing_shard_is_named(sharded: Path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    message = refused(sharded)
    assert "model-00002-of-00002.safetensors: named by model.safetensors.index.json but missing" in message


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": []}'])
def test_a_broken_index_is_refused(sharded: Path, index: str):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "no index of weights" in refused(sharded)


def test_weights_of_another_kind_are_named(model: Path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "found pytorch_model.bin; expected model.safetensors" in refused(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "no JSON"), ("[]", "names no model_type"), ("{}", "names no model_type"), ('{"model_type": 1}', "names no")],
)
def test_a_broken_config_is_refused(model: Path, config: str, message: str):
    (model / "config.json").write_text(config)
    found = refused(model)
    assert found.startswith(f"{model / 'config.json'}: ") and message in found


def test_a_copy_has_the_fingerprint_of_its_original(tiny_model: Path, model: Path):
    assert fingerprint(model) == fingerprint(tiny_model)


def test_any_change_of_config_or_weights_changes_the_fingerprint(model: Path):
    before = fingerprint(model)
    config, weights = model / "config.json", model / "model.safetensors"
    for path, position in ((config, 5), (weights, 20), (weights, -1)):
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert fingerprint(model) != before
        path.write_bytes(whole)
    weights.rename(model / "model-1.safetensors")
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 50000.0},
        {"rope_theta": 50000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 50000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 50000.0}},
    ],
    ids=["old", "old-llama3", "old-linear", "new", "new-llama3"],
)
def test_both_forms_of_rope_mean_what_transformers_reads(config: dict):
    """transformers' own reading of the config is the oracle; mlx-lm reads the old form alone."""
    transformers = pytest.importorskip("transformers")
    both = rope_in_both_forms(copy.deepcopy(config))
    expected = transformers.LlamaConfig(max_position_embeddings=512, **copy.deepcopy(config)).rope_parameters
    old = {key: both[key] for key in ("rope_theta", "rope_scaling")}
    for form in (both, old, {"rope_parameters": both["rope_parameters"]}):
        read = transformers.LlamaConfig(max_position_embeddings=512, **copy.deepcopy(form)).rope_parameters
        assert read == expected
    assert rope_in_both_forms({**config, **both})["rope_parameters"] == both["rope_parameters"]


@pytest.mark.parametrize("config", [{}, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}])
def test_a_config_without_one_rope_for_all_layers_is_left_alone(config: dict):
    assert rope_in_both_forms(config) == {}
