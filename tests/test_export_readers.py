"""`--for`: each program gets what it loads, adapted without a change of what the adapter computes, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from exports import make_adapter, model_logits, peft_logits, run_export
from safetensors import safe_open
from tiny_models import write_llama

from common.errors import UserError
from common.export.readers import READERS

CLOSE = {"rtol": 0, "atol": 2e-4}
PEFT_READERS = [reader.name for reader in READERS if reader.adapter == "peft"]
ODD = {
    "use_rslora": True,
    "r": 6,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"o_proj": 3},
    "layers_to_transform": [1],
    "target_modules": ["q_proj", "o_proj", "gate_proj"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("readers") / "model")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An adapter with all that some program doesn't read."""
    return make_adapter(tmp_path_factory.mktemp("readers") / "odd", model, **ODD)


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("reader", PEFT_READERS)
def test_what_is_made_for_a_program_computes_the_same_in_peft(tmp_path: Path, model: Path, odd: Path, reader: str):
    run_export(odd, tmp_path / "out", None, reader=reader)
    np.testing.assert_allclose(peft_logits(model, tmp_path / "out"), peft_logits(model, odd), **CLOSE)


@pytest.mark.parametrize("reader", ["vllm", "sglang", "tgi", "lorax"])
def test_servers_get_one_rank_and_one_whole_alpha(tmp_path: Path, odd: Path, reader: str):
    run_export(odd, tmp_path / "out", None, reader=reader)
    settings, shapes = settings_of(tmp_path / "out"), shapes_of(tmp_path / "out")
    assert (settings["rank_pattern"], settings["alpha_pattern"], settings["use_rslora"]) == ({}, {}, False)
    assert isinstance(settings["lora_alpha"], int) and settings["r"] == 6
    assert {shape[0] for key, shape in shapes.items() if "lora_A" in key} == {6}


def test_vllm_is_told_the_next_rank_that_it_takes(tmp_path: Path, model: Path):
    made = make_adapter(tmp_path / "adapter", model, r=24, use_rslora=True)
    notes = run_export(made, tmp_path / "out", None, reader="vLLM")["notes"]
    assert "--max-lora-rank 32" in notes[-1]
    assert settings_of(tmp_path / "out")["use_rslora"], "vLLM reads it"


def test_sglang_gets_zeros_for_what_it_fuses(tmp_path: Path, odd: Path):
    run_export(odd, tmp_path / "out", None, reader="sglang")
    modules = {key.split(".")[-3] for key in shapes_of(tmp_path / "out")}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert {key.split(".")[4] for key in shapes_of(tmp_path / "out")} == {"1"}


def test_tgi_gets_every_layer(tmp_path: Path, odd: Path):
    run_export(odd, tmp_path / "out", None, reader="tgi")
    assert {key.split(".")[4] for key in shapes_of(tmp_path / "out")} == {"0", "1"}
    assert settings_of(tmp_path / "out")["target_modules"] == ["gate_proj", "o_proj", "q_proj"]


@pytest.mark.parametrize("reader", ["vllm", "ollama"])
def test_what_a_program_cannot_load_is_merged(tmp_path: Path, model: Path, reader: str):
    made = make_adapter(tmp_path / "adapter", model, use_dora=True)
    result = run_export(made, tmp_path / "out", None, reader=reader)
    assert result["to"] == ("merged" if reader == "vllm" else "merged-gguf")
    assert "DoRA" in result["notes"][0]
    if reader == "vllm":
        np.testing.assert_allclose(model_logits(tmp_path / "out"), peft_logits(model, made), **CLOSE)
    else:
        assert (tmp_path / "out" / "Modelfile").is_file()


@pytest.mark.parametrize(
    ("reader", "to", "message"),
    [
        ("vllm", "peft", r"vllm can't load DoRA \(vllm/lora/peft_helper.py.*--to merged"),
        ("ollama", "peft", r"ollama loads --to gguf or --to merged-gguf"),
        ("nobody", None, r"--for nobody: unknown; expected one of vllm, sglang"),
        (None, None, r"--to: missing; expected peft"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    tmp_path: Path, model: Path, reader: str | None, to: str | None, message: str
):
    made = make_adapter(tmp_path / "adapter", model, use_dora=True)
    with pytest.raises(UserError, match=message):
        run_export(made, tmp_path / "out", to, reader=reader)
    assert not (tmp_path / "out").exists()
