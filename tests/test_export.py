"""Exports as other programs load them: PEFT, transformers and mlx-lm compute what PEFT makes of the adapter itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from exports import TOKENS, make_adapter, model_logits, peft_logits, run_export
from safetensors.numpy import load_file, save_file
from tiny_models import write_llama

from common.errors import UserError
from common.export.formats import write

# The same float32 numbers in another order through two layers; logits are about 10.
CLOSE = {"rtol": 0, "atol": 2e-4}
FAMILY = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 6},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def adapter(request: pytest.FixtureRequest, tmp_path: Path, model: Path) -> Path:
    return make_adapter(tmp_path / "adapter", model, **request.param)


def test_peft_loads_the_peft_export(tmp_path: Path, model: Path, adapter: Path):
    run_export(adapter, tmp_path / "out", "peft")
    np.testing.assert_allclose(peft_logits(model, tmp_path / "out"), peft_logits(model, adapter), **CLOSE)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_transformers_loads_the_merged_export(tmp_path: Path, model: Path, adapter: Path, dtype: str | None):
    proof = run_export(adapter, tmp_path / "out", "merged", dtype=dtype)
    tolerance = CLOSE["atol"] if dtype is None else proof["tolerance"]
    difference = np.abs(model_logits(tmp_path / "out") - peft_logits(model, adapter)).max()
    assert difference < tolerance < proof["adapter_effect"] / 2


def test_mlx_lm_loads_the_mlx_export(tmp_path: Path, model: Path, adapter: Path):
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    from mlx_lm.tuner.utils import load_adapters

    from common.base.weights import read_model_config, rope_in_both_forms

    run_export(adapter, tmp_path / "out", "mlx")
    base, _ = utils.load_model(model, model_config=rope_in_both_forms(read_model_config(model)))
    tuned = load_adapters(base, str(tmp_path / "out" / "mlx"))
    tuned.eval()
    np.testing.assert_allclose(np.array(tuned(mx.array(TOKENS))), peft_logits(model, adapter), **CLOSE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mlx"]


def test_an_adapter_of_mlx_lm_is_exported_to_peft(tmp_path: Path, model: Path, adapter: Path):
    run_export(adapter, tmp_path / "first", "mlx")
    run_export(tmp_path / "first" / "mlx", tmp_path / "out", "peft")
    np.testing.assert_allclose(peft_logits(model, tmp_path / "out"), peft_logits(model, adapter), **CLOSE)


def test_rslora_is_folded_on_request(tmp_path: Path, model: Path):
    made = make_adapter(tmp_path / "adapter", model, use_rslora=True, r=6)
    run_export(made, tmp_path / "out", "peft", fold_rslora=True)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["use_rslora"], settings["lora_alpha"]) == (False, 20)  # 8 * sqrt(6) = 19.6: the rest is within B
    np.testing.assert_allclose(peft_logits(model, tmp_path / "out"), peft_logits(model, made), **CLOSE)


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_are_written_in_fewer_bits(tmp_path: Path, model: Path, to: str, dtype: str):
    made = make_adapter(tmp_path / "adapter", model)
    full = run_export(made, tmp_path / "full", to)
    half = run_export(made, tmp_path / "half", to, dtype=dtype)
    assert full["largest_difference"] < half["largest_difference"] <= half["tolerance"] < half["adapter_effect"] / 5
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).rglob("*adapter*")) for name in ("half", "full")]
    assert sizes[0] < 0.7 * sizes[1]


def test_modules_trained_whole_are_merged(tmp_path: Path, tied_llama: Path):
    made = make_adapter(tmp_path / "adapter", tied_llama, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    run_export(made, tmp_path / "out", "merged")
    np.testing.assert_allclose(model_logits(tmp_path / "out"), peft_logits(tied_llama, made), **CLOSE)
    run_export(made, tmp_path / "again", "peft")
    np.testing.assert_allclose(peft_logits(tied_llama, tmp_path / "again"), peft_logits(tied_llama, made), **CLOSE)


def test_a_head_that_changes_alone_is_untied(tmp_path: Path, tied_llama: Path):
    made = make_adapter(tmp_path / "adapter", tied_llama, target_modules=["q_proj", "lm_head"])
    run_export(made, tmp_path / "out", "merged")
    np.testing.assert_allclose(model_logits(tmp_path / "out"), peft_logits(tied_llama, made), **CLOSE)
    assert not json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]


def test_shards_hold_every_tensor_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    made = make_adapter(tmp_path / "adapter", model)
    monkeypatch.setattr("common.export.merged.SHARD_BYTES", 50_000)
    run_export(made, tmp_path / "out", "merged")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 3
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards.values() for t in shard.values())
    np.testing.assert_allclose(model_logits(tmp_path / "out"), peft_logits(model, made), **CLOSE)


def test_a_merged_config_has_rope_in_both_forms(tmp_path: Path, model: Path):
    run_export(make_adapter(tmp_path / "adapter", model), tmp_path / "out", "merged")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names_in(tmp_path / "out")


@pytest.mark.parametrize("to", ["peft", "mlx", "merged", "gguf", "merged-gguf"])
def test_the_mlx_engine_exports_the_same(tmp_path: Path, model: Path, to: str):
    pytest.importorskip("mlx.core")
    made = make_adapter(tmp_path / "adapter", model, **({} if to == "gguf" else {"use_dora": True}))
    proof = run_export(made, tmp_path / "mlx_engine", to, "mlx", dtype="float32")
    run_export(made, tmp_path / "torch_engine", to, dtype="float32")
    assert proof["largest_difference"] < CLOSE["atol"] < proof["adapter_effect"]
    files = sorted(path.relative_to(tmp_path / "torch_engine") for path in (tmp_path / "torch_engine").rglob("*.*"))
    for file in files:
        ours, theirs = (tmp_path / engine / file for engine in ("mlx_engine", "torch_engine"))
        assert ours.is_dir() or file.name == "README.md" or ours.read_bytes() == theirs.read_bytes(), file


@pytest.mark.parametrize("to", ["peft", "mlx", "merged", "gguf", "merged-gguf"])
def test_an_export_that_computes_something_else_is_removed(
    tmp_path: Path, model: Path, to: str, monkeypatch: pytest.MonkeyPatch
):
    """What is written is read back from the disk: numbers that changed places there are found."""
    made = make_adapter(tmp_path / "adapter", model)
    monkeypatch.setattr("common.export.export.write", flipping(write))
    with pytest.raises(
        UserError, match=r"computes something else than the adapter.*differ from the adapter's by at most"
    ):
        run_export(made, tmp_path / "out", to)
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob(".*"))


def flipping(original):
    def write_flipped(folder, *arguments):
        written = original(folder, *arguments)
        (path,) = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
        data = bytearray(path.read_bytes())
        data[-4000:] = np.frombuffer(data[-4000:], np.uint32)[::-1].tobytes()  # every number in another's place
        path.write_bytes(data)
        return written

    return write_flipped


def test_a_base_in_four_bits_is_merged_as_the_run_held_it(tmp_path: Path, model: Path):
    """The merged model computes what the adapter does on the quantised base, not on the one it was made from."""
    pytest.importorskip("bitsandbytes")
    made = make_adapter(tmp_path / "adapter", model)
    plain = run_export(made, tmp_path / "plain", "merged")
    quantization = {"quantization": {"load_in_4bit": True}}
    (made / "training_config.json").write_text(json.dumps(quantization), encoding="utf-8")
    proof = run_export(made, tmp_path / "out", "merged")
    apart = np.abs(model_logits(tmp_path / "out") - model_logits(tmp_path / "plain")).max()
    assert max(proof["largest_difference"], plain["largest_difference"]) < 1e-3 < 0.1 < apart


def test_a_base_that_mlx_quantised_is_merged_dequantised(tmp_path: Path, model: Path):
    mlx_lm = pytest.importorskip("mlx_lm")
    base = write_llama(tmp_path / "wide", hidden_size=64, intermediate_size=96)
    mlx_lm.convert(str(base), str(tmp_path / "four_bits"), quantize=True, q_group_size=32, q_bits=4)
    made = make_adapter(tmp_path / "adapter", base)
    proof = run_export(made, tmp_path / "out", "merged", "mlx", model=str(tmp_path / "four_bits"), dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert proof["largest_difference"] < 1e-3 and not {"quantization", "quantization_config"} & config.keys()
    assert np.abs(model_logits(tmp_path / "out") - peft_logits(base, made)).max() > 0.1, "it is not the dense base's"


def test_a_weight_too_large_for_its_dtype_is_refused(tmp_path: Path, model: Path):
    made = make_adapter(tmp_path / "adapter", model)
    tensors = load_file(made / "adapter_model.safetensors")
    save_file({key: value * 1e6 for key, value in tensors.items()}, made / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"a weight reaches .* float16 ends at 65504"):
        run_export(made, tmp_path / "out", "peft", dtype="float16")


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf", "merged"])
def test_a_dtype_that_a_format_lacks_is_refused(tmp_path: Path, model: Path, to: str):
    with pytest.raises(UserError, match="q8_0: is for --to merged-gguf"):
        run_export(make_adapter(tmp_path / "adapter", model), tmp_path / "out", to, dtype="q8_0")


def test_a_folder_in_use_is_refused(tmp_path: Path, model: Path):
    made = make_adapter(tmp_path / "adapter", model)
    with pytest.raises(UserError, match="already exists"):
        run_export(made, made, "peft")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_adapter_of_experts_is_left_to_peft(tmp_path: Path):
    from engines import open_fresh
    from test_lora_family import moved, save
    from tiny_models import write_family

    from common.config import LoraConfig

    base = write_family(tmp_path / "model", "qwen3_moe")
    lora = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    engine = open_fresh("torch", base, lora)
    (tmp_path / "adapter").mkdir()
    save(tmp_path / "adapter", engine, moved(engine).weights, lora, base)
    with pytest.raises(UserError, match=r"adapts stacks of experts .* which PEFT alone loads"):
        run_export(tmp_path / "adapter", tmp_path / "out", "merged")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merged_model_is_quantised_as_mlx_lm_does(tmp_path: Path, bits: int):
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    model = write_llama(tmp_path / "model", hidden_size=128, intermediate_size=192, head_dim=32)
    adapter = make_adapter(tmp_path / "adapter", model, r=8, lora_alpha=64)
    proof = run_export(adapter, tmp_path / "out", "merged", quantize=bits)
    merged, _ = utils.load_model(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == bits and proof["largest_difference"] <= proof["tolerance"]
    found, expected = np.array(merged(mx.array(TOKENS))), peft_logits(model, adapter)
    # Of the logits' own spread; random weights multiply a rounding error more than a trained model's do.
    assert np.sqrt(np.mean((found - expected) ** 2)) < {8: 0.15, 4: 0.9}[bits] * expected.std()
    assert not [path for path in tmp_path.iterdir() if path.name not in ("model", "adapter", "out")]


@pytest.mark.parametrize(("to", "bits"), [("peft", 4), ("merged", 7)])
def test_quantising_something_else_is_refused(tmp_path: Path, model: Path, to: str, bits: int):
    adapter = make_adapter(tmp_path / "adapter", model)
    with pytest.raises(UserError, match=f"--quantize {bits}: with --to {to}; expected 4, 5, 6 or 8 bits"):
        run_export(adapter, tmp_path / "out", to, quantize=bits)
