"""Conversions to MLX and back. The oracles are mlx-lm's own converter, tensor by tensor, and transformers' loader."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conversions import assert_same_files, run_convert, weights
from exports import TOKENS, model_logits
from safetensors import safe_open
from tiny_models import FAMILIES, write_family, write_llama

from common.convert.from_mlx import SAME_LAYOUT
from common.convert.request import quantization_of
from common.convert.source import open_source
from common.engine import mlx_target
from common.errors import UserError
from mlx_backend.dialect import translated

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

KEPT = [name for name in FAMILIES if name in SAME_LAYOUT]
OWN = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_text", "olmoe"]
# mlx-lm's own code lacks sliding windows, Gemma 3's scale in float32, and experts' factors that are not its own.
UNLIKE = ["mistral", "gemma2", "gemma3_text", "phi3", "ministral3"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 whose rows are whole groups of 128."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256, head_dim=32)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def by_mlx_lm(model: Path, output: Path, **options: object) -> Path:
    """Let mlx-lm convert a model, told of its config what it does not read there by itself."""
    told = shutil.copytree(model, output.with_name(f"{output.name}-told"))
    config = json.loads((told / "config.json").read_text())
    (told / "config.json").write_text(json.dumps(config | translated(config)))
    mlx_lm.convert(str(told), str(output), **options)
    return output


def mlx_logits(folder: Path) -> np.ndarray:
    model, _ = mlx_lm.utils.load_model(folder)
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


@pytest.mark.parametrize("family", [*KEPT, *OWN])
def test_each_family_is_laid_out_as_mlx_lm_does_and_comes_back(tmp_path: Path, family: str):
    model, ours, theirs = write_family(tmp_path / "model", family), tmp_path / "ours", tmp_path / "theirs"
    run_convert(model, ours, "mlx")
    assert_same_files(ours, by_mlx_lm(model, theirs))
    expected = model_logits(model)
    if family not in UNLIKE:
        np.testing.assert_allclose(mlx_logits(ours), expected, atol=1e-4 * np.abs(expected).max())
    if family in OWN:
        with pytest.raises(UserError, match="may name or stack the tensors"):
            run_convert(theirs, tmp_path / "back")
        return
    run_convert(theirs, tmp_path / "back")
    assert_same_files(tmp_path / "back", model)
    for folder in (ours, tmp_path / "back"):
        np.testing.assert_array_equal(model_logits(folder), expected)


def test_every_layout_that_is_said_to_be_kept_is_tested():
    assert sorted(KEPT) == sorted(SAME_LAYOUT)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"bits": 4}, {"q_bits": 4, "q_group_size": 64}),
        ({"bits": 3, "group_size": 32, "dtype": "float16"}, {"q_bits": 3, "q_group_size": 32, "dtype": "float16"}),
        ({"bits": 8, "group_size": 128, "dtype": "float32"}, {"q_bits": 8, "q_group_size": 128, "dtype": "float32"}),
        ({"mode": "mxfp4"}, {"q_mode": "mxfp4"}),
        ({"mode": "mxfp8"}, {"q_mode": "mxfp8"}),
        ({"mode": "nvfp4"}, {"q_mode": "nvfp4"}),
    ],
    ids=str,
)
def test_each_format_is_what_mlx_lm_writes_and_unpacks_to_what_it_means(
    tmp_path: Path, wide: Path, asked: dict, told: dict
):
    result = run_convert(wide, tmp_path / "ours", "mlx", **asked)
    theirs = by_mlx_lm(wide, tmp_path / "theirs", quantize=True, **told)
    assert_same_files(tmp_path / "ours", theirs)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "ours", theirs)]
    assert configs[0]["quantization"] == configs[0]["quantization_config"] == configs[1]["quantization"]
    assert 0 < result["weights"]["share"] <= 1
    run_convert(theirs, tmp_path / "back", dtype="float32")
    form, packed = configs[1]["quantization"], mx.load(str(theirs / "model.safetensors"))
    for name, found in weights(tmp_path / "back").items():
        parts = [packed.get(name.replace(".weight", part)) for part in (".weight", ".scales", ".biases")]
        parts = [part.astype(mx.float32) if part is not None and part.dtype == mx.bfloat16 else part for part in parts]
        parts = [part.astype(mx.float32) if part is not None and part.dtype == mx.float16 else part for part in parts]
        expected = parts[0] if parts[1] is None else mx.dequantize(*parts, **form, dtype=mx.float32)
        np.testing.assert_array_equal(found, np.array(expected.astype(mx.float32)), err_msg=name)
    assert model_logits(tmp_path / "back").shape == (2, 50, 416)  # transformers misses nothing


def test_overrides_name_modules_by_a_part_of_their_path_and_are_read_back(tmp_path: Path, wide: Path):
    overrides = ("lm_head=8", "layers.1=false", "k_proj=6")
    result = run_convert(wide, tmp_path / "out", "mlx", bits=2, group_size=32, overrides=overrides, check=True)
    packed, config = weights(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["lm_head"]["bits"] == 8 and config["quantization"]["bits"] == 2
    assert packed["model.layers.0.self_attn.k_proj.weight"].shape[1] * 32 // 6 == 128
    assert "model.layers.1.self_attn.k_proj.scales" not in packed
    assert result["logits"]["engine"] == "the mlx engine" and result["logits"]["difference"] > 0
    back = run_convert(tmp_path / "out", tmp_path / "back", dtype="float32", check=True)
    assert back["logits"]["difference"] < 1e-4 * back["logits"]["largest"]
    np.testing.assert_array_equal(
        weights(tmp_path / "back")["model.layers.1.mlp.up_proj.weight"],
        weights(wide)["model.layers.1.mlp.up_proj.weight"],
    )
    half = run_convert(tmp_path / "out", tmp_path / "half")
    assert half["stored"] == "bfloat16"  # that of the scales


def test_a_mixture_is_quantised_by_mlx_lms_own_choice_of_layers(tmp_path: Path):
    model = write_family(tmp_path / "model", "qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    run_convert(model, tmp_path / "ours", "mlx", bits=4, group_size=32, check=True)
    theirs = by_mlx_lm(model, tmp_path / "theirs", quantize=True, q_bits=4, q_group_size=32)
    assert_same_files(tmp_path / "ours", theirs)
    found, expected = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "ours", theirs))
    assert found["quantization"] == expected["quantization"] and len(found["quantization"]) > 3  # routers' own bits


def test_a_packed_model_is_packed_otherwise(tmp_path: Path, wide: Path):
    run_convert(wide, tmp_path / "eight", "mlx", bits=8)
    run_convert(tmp_path / "eight", tmp_path / "four", "mlx", bits=4)
    run_convert(tmp_path / "eight", tmp_path / "plain", dtype="bfloat16")
    run_convert(tmp_path / "plain", tmp_path / "expected", "mlx", bits=4)
    assert_same_files(tmp_path / "four", tmp_path / "expected")


def test_files_say_whose_layout_they_have(tmp_path: Path, wide: Path):
    for to, layout in (("mlx", "mlx"), ("hf", "pt")):
        run_convert(wide, tmp_path / to, to)
        with safe_open(tmp_path / to / "model.safetensors", "numpy") as file:
            assert file.metadata()["format"] == layout


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen3_5"])
def test_a_model_that_also_sees_is_refused_by_what_would_be_lost(tmp_path: Path, family: str):
    model = write_family(tmp_path / "model", family)
    with pytest.raises(UserError, match=r"no place for [\d,]+ of its numbers \(vision_config\)"):
        run_convert(model, tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits": 4, "overrides": ("lm_hed=8",)},
            "--override lm_hed: no module of this model; its modules are .*lm_head",
        ),
        ({"bits": 7}, "quantization.bits"),
        (
            {"bits": 4, "group_size": 16},
            "quantization.group_size: found 16 with mode: affine, which has 32 or 64 or 128",
        ),
        (
            {"overrides": ("lm_head=8",)},
            r"quantization.overrides: found {lm_head}, a group of keys without quantization.bits",
        ),
        ({"bits": 4, "overrides": ("lm_head=many",)}, "--override lm_head=many: expected a module and its bits"),
    ],
    ids=str,
)
def test_formats_that_mlx_lacks_are_refused(tmp_path: Path, wide: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        run_convert(wide, tmp_path / "out", "mlx", **options)
    assert not (tmp_path / "out").exists()


def test_what_mlx_lm_would_compute_otherwise_is_refused(tmp_path: Path):
    model = write_family(tmp_path / "model", "llama", hidden_act="gelu")
    with pytest.raises(UserError, match="hidden_act: 'gelu' is not what mlx-lm computes"):
        run_convert(model, tmp_path / "out", "mlx")


def test_rows_of_no_whole_groups_are_refused_with_the_way_out(tmp_path: Path, llama: Path):
    with pytest.raises(UserError, match=r"rows of \d+ weights, no multiple of 64; leave it .*--override \w+=false"):
        run_convert(llama, tmp_path / "out", "mlx", bits=4)
    linear = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
    run_convert(llama, tmp_path / "out", "mlx", bits=4, overrides=tuple(f"{name}=false" for name in linear))
    assert "model.layers.0.self_attn.o_proj.scales" in weights(tmp_path / "out")


@pytest.mark.parametrize("part", ["weight", "biases"])
def test_a_packed_weight_without_a_part_is_refused(tmp_path: Path, wide: Path, part: str):
    run_convert(wide, tmp_path / "packed", "mlx", bits=4)
    tensors = mx.load(str(tmp_path / "packed" / "model.safetensors"))
    tensors.pop(f"model.layers.1.mlp.down_proj.{part}")
    mx.save_safetensors(str(tmp_path / "packed" / "model.safetensors"), tensors, {"format": "mlx"})
    with pytest.raises(UserError, match=r"down_proj have shapes .* which is not what config.json says"):
        run_convert(tmp_path / "packed", tmp_path / "back")


def test_formats_that_config_json_tells_wrong_are_refused(tmp_path: Path, wide: Path):
    run_convert(wide, tmp_path / "packed", "mlx", bits=4)
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 32}}))
    with pytest.raises(UserError, match=r"is not what config.json says, .*'group_size': 32"):
        run_convert(tmp_path / "packed", tmp_path / "back")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_are_stacked_from_any_source_and_none_is_computed_whole(tmp_path: Path, family: str):
    from mlx_backend.convert import MlxTarget

    model = write_family(tmp_path / "model", family, hidden_size=64)
    run_convert(model, tmp_path / "nf4", "bnb")
    target = mlx_target(open_source(str(tmp_path / "nf4")), quantization_of(None, None, None, []), None)
    assert isinstance(target, MlxTarget) and {group.weight for group in target.groups} == target._origins.keys()
    run_convert(tmp_path / "nf4", tmp_path / "direct", "mlx")
    run_convert(tmp_path / "nf4", tmp_path / "hf")
    run_convert(tmp_path / "hf", tmp_path / "in_two", "mlx")
    assert_same_files(tmp_path / "direct", tmp_path / "in_two")


def test_what_mlx_lm_computes_anew_needs_a_folder_of_floats(tmp_path: Path):
    model = write_family(tmp_path / "model", "qwen3_5_text", hidden_size=64)
    run_convert(model, tmp_path / "nf4", "bnb")
    with pytest.raises(UserError, match=r"mlx-lm computes .*Hugging Face folder only: write one with --to hf, then"):
        run_convert(tmp_path / "nf4", tmp_path / "out", "mlx")


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "gpt_oss"])
def test_layouts_that_mlx_lm_cannot_read_are_written_as_it_can(tmp_path: Path, family: str):
    """transformers saves these two otherwise than the Hub's first releases, which mlx-lm goes by."""
    model = write_family(tmp_path / "model", family)
    result = run_convert(model, tmp_path / "out", "mlx", check=True)
    assert result["logits"]["difference"] <= result["logits"]["tolerance"] < 1e-3 * result["logits"]["largest"]
    assert np.isfinite(mlx_logits(tmp_path / "out")).all()
