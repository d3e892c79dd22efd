"""Conversions to bitsandbytes' formats and back: against what transformers saves, and bitsandbytes' functions."""

import json
from pathlib import Path

import numpy as np
import pytest
from conversions import run_convert, weights
from exports import TOKENS, model_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import write_family, write_llama

from common.base import eight_bit, four_bit
from common.errors import UserError

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

FORMATS = {"nf4": {"quant_type": "nf4"}, "fp4": {"quant_type": "fp4"}, "int8": {"quant_type": "int8"}}
FORMATS |= {f"{name}, double": FORMATS[name] | {"double_quant": True} for name in ("nf4", "fp4")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("bnb"), hidden_size=64, intermediate_size=192, attention_bias=True)


def loaded(folder: Path, **options: object):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, output_loading_info=True, **options)


def by_transformers(model: Path, output: Path, quant_type: str, double_quant: bool = False) -> Path:
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    form = BitsAndBytesConfig(load_in_8bit=True) if quant_type == "int8" else BitsAndBytesConfig(**four)
    packed, _ = loaded(model, quantization_config=form, dtype=torch.bfloat16)
    packed.save_pretrained(output)
    return output


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_the_folder_is_what_transformers_saves_and_loads(tmp_path: Path, model: Path, form: dict):
    result = run_convert(model, tmp_path / "ours", "bnb", dtype="bfloat16", check=True, **form)
    theirs = by_transformers(model, tmp_path / "theirs", **form)
    found, expected = weights(tmp_path / "ours"), weights(theirs)
    assert found.keys() == expected.keys() and 0 < result["weights"]["share"] <= 1
    doubles = form.get("double_quant", False)  # their mean of the scales differs in its last bit, by the machine
    for name, array in expected.items():
        if "quant_state" in name:
            ours, other = (json.loads(bytes(each.tolist())) for each in (found[name], array))
            assert ours.pop("nested_offset", 0) == pytest.approx(other.pop("nested_offset", 0), rel=1e-6)
            assert ours == other
        elif doubles and "absmax" in name:
            np.testing.assert_allclose(found[name].astype(float), array.astype(float), rtol=1e-5, atol=1)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "ours", theirs)]
    settings = [config["quantization_config"] for config in configs]
    assert settings[0].pop("bnb_4bit_compute_dtype") in ("bfloat16", "float32")
    settings[1].pop("bnb_4bit_compute_dtype")
    assert settings[0] == settings[1]
    packed, report = loaded(tmp_path / "ours", dtype=torch.bfloat16)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = packed(torch.tensor(TOKENS)).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_a_folder_of_transformers_is_unpacked_to_what_bitsandbytes_means(tmp_path: Path, model: Path, form: dict):
    theirs = by_transformers(model, tmp_path / "theirs", **form)
    result = run_convert(theirs, tmp_path / "back", dtype="float32", check=form["quant_type"] != "int8")
    found, stored = weights(tmp_path / "back"), weights(theirs)
    assert found.keys() == weights(model).keys()
    name = "model.layers.1.mlp.down_proj.weight"
    packed = {key: torch.from_numpy(array.copy()) for key, array in stored.items() if key.startswith(name)}
    if form["quant_type"] == "int8":
        absmax = torch.from_numpy(stored[name.replace(".weight", ".SCB")].copy())
        expected = functional.int8_vectorwise_dequant(packed[name], absmax)
    else:
        codes = packed.pop(name)
        state = functional.QuantState.from_dict({key[len(name) + 1 :]: each for key, each in packed.items()}, "cpu")
        state.dtype = torch.float32
        expected = functional.dequantize_4bit(codes, state)
    # Their 1/127 is a constant of seven digits.
    np.testing.assert_allclose(found[name], expected.float().numpy(), rtol=2e-7 if form["quant_type"] == "int8" else 0)
    assert json.loads((tmp_path / "back" / "config.json").read_text()).get("quantization_config") is None
    model_logits(tmp_path / "back")
    if form["quant_type"] != "int8":
        assert result["logits"]["difference"] <= 1e-4 * result["logits"]["largest"]


def test_a_packed_model_goes_on_to_mlx(tmp_path: Path, model: Path):
    pytest.importorskip("mlx.core")
    run_convert(model, tmp_path / "nf4", "bnb")
    result = run_convert(tmp_path / "nf4", tmp_path / "mlx", "mlx", bits=8, check=True)
    assert result["logits"]["engine"] == "the mlx engine" and result["stored"] == "8 bits"
    assert result["logits"]["difference"] < 0.1 * result["logits"]["largest"]


def test_a_layout_that_transformers_changes_is_refused(tmp_path: Path):
    model = write_family(tmp_path / "model", "gemma3")
    with pytest.raises(UserError, match=r"has no tensor .* transformers stacks or renames this model's tensors"):
        run_convert(model, tmp_path / "out", "bnb")
    assert not (tmp_path / "out").exists()


def test_experts_stay_in_the_dtype_as_transformers_leaves_them(tmp_path: Path):
    model = write_family(tmp_path / "model", "qwen3_moe", hidden_size=64)
    run_convert(model, tmp_path / "out", "bnb", dtype="bfloat16")
    found = weights(tmp_path / "out")
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == np.uint8
    assert found["model.layers.0.mlp.experts.3.up_proj.weight"].dtype == np.float32
    _, report = loaded(tmp_path / "out", dtype=torch.bfloat16)
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@settings(max_examples=40)
@given(st.integers(1, 500), st.floats(1e-6, 1e4), st.integers(0, 2**32 - 1))
def test_any_numbers_are_packed_in_numpy_as_bitsandbytes_does(quant_type: str, count: int, size: float, seed: int):
    numbers = (np.random.default_rng(seed).normal(0, 1, count) * size).astype(np.float32)
    codes, state = functional.quantize_4bit(torch.from_numpy(numbers), quant_type=quant_type)
    packed, absmax = four_bit.pack(numbers, quant_type)
    np.testing.assert_array_equal(packed, codes.reshape(-1).numpy())
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    book = four_bit.CODE_BOOKS[quant_type]
    nibbles = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:count]
    expected = book[nibbles] * np.repeat(absmax, 64)[:count]
    np.testing.assert_array_equal(four_bit.unpack(packed, absmax, quant_type)[:count], expected)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 90), st.sampled_from([0.0, 1e-6, 0.02, 3e3]), st.integers(0, 2**32 - 1))
def test_any_rows_are_packed_to_8_bits_as_bitsandbytes_does(rows: int, columns: int, size: float, seed: int):
    weight = (np.random.default_rng(seed).normal(0, 1, (rows, columns)) * size).astype(np.float32)
    codes, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
    found, scales = eight_bit.pack(weight)
    np.testing.assert_array_equal(scales, absmax.numpy())
    np.testing.assert_array_equal(found[scales > 0], codes.numpy()[scales > 0])
    assert not found[scales == 0].any()


def test_what_float16_cannot_hold_is_no_int8_either():
    with pytest.raises(OverflowError, match="past float16's 65504"):
        eight_bit.pack(np.full((1, 4), 1e5, np.float32))


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ({}, "weight"),
        ({}, "weight.absmax"),
        ({"double_quant": True}, "weight.nested_absmax"),
        ({"quant_type": "int8"}, "SCB"),
        ({"quant_type": "int8"}, "weight"),
    ],
    ids=str,
)
def test_a_packed_weight_without_a_part_is_refused(tmp_path: Path, model: Path, form: dict, part: str):
    run_convert(model, tmp_path / "packed", "bnb", **form)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    tensors.pop(f"model.layers.1.mlp.down_proj.{part}")
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    message = r"down_proj.weight has \d+ numbers; expected|is packed, and nothing says how|" + part + " has 0 numbers"
    with pytest.raises(UserError, match=message):
        run_convert(tmp_path / "packed", tmp_path / "back")
