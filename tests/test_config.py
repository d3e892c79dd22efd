"""The config: what is accepted, and what it means."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_config import load

from common.config import TrainConfig, load_config, require_trainable
from common.config.errors import known_keys

pytestmark = pytest.mark.usefixtures("in_tmp_path")

ROOT = Path(__file__).parent.parent
NOTES = """{
  "per_device_train_batch_size": 1,      // Small batch for memory
  "gradient_accumulation_steps": 8,      // Effective batch = 8
  "fp16": false,                         // FP32 more stable on MPS
  "bf16": false,
  "gradient_checkpointing": true,        // Saves memory
  "optim": "adamw_torch",                // Native PyTorch optimizer
  "save_steps": 250,                     // Frequent checkpoints
  "save_total_limit": 2,                 // Keep last 2 only
  "quantization": {
    "load_in_4bit": false                // No quantization on MPS
  }
}
"""


def test_snippet_of_the_notes_loads_unchanged_and_means_float32():
    config = load(NOTES, name="notes.json")
    assert config.compute_dtype == "float32"
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 8)
    assert config.gradient_checkpointing is True
    assert (config.save_steps, config.save_total_limit, config.optim) == (250, 2, "adamw_torch")
    assert config.quantization.load_in_4bit is False
    assert config.compute_dtype == TrainConfig.from_dict(config.to_dict()).compute_dtype


@pytest.mark.parametrize("name", ["apple_silicon_config.json", "cuda_config.json", "quickstart.yaml"])
def test_every_shipped_config_loads_and_can_train(name):
    config = load_config(ROOT / "configs" / name)
    require_trainable(config, name)
    assert config.lora.r == 16


def test_apple_config_says_what_the_notes_say():
    apple = load_config(ROOT / "configs/apple_silicon_config.json").to_dict()
    for key, value in load(NOTES, name="notes.json").to_dict().items():
        if key in NOTES:
            assert apple[key] == value, key


def test_quickstart_data_is_in_the_repository():
    config = load_config(ROOT / "configs/quickstart.yaml")
    for path in (*config.data.train, *config.data.validation, *config.data.test):
        assert (ROOT / path).is_file()


def test_integer_is_fine_where_a_float_is_expected():
    assert load("learning_rate: 1").learning_rate == 1.0


def test_null_means_the_default():
    assert load("eval_steps: null\nseed:\nlogging_steps: 7\ndata:\n  test:\nlora:\n") == load("logging_steps: 7")


def test_eval_steps_default_to_logging_steps():
    assert load("logging_steps: 7").eval_steps == 7
    assert load("logging_steps: 7\neval_steps: 3").eval_steps == 3


def test_one_path_and_a_list_of_one_path_are_the_same():
    assert load("data: {train: a.jsonl}").data.train == load("data: {train: [a.jsonl]}").data.train == ("a.jsonl",)


@pytest.mark.parametrize("written", ["none", "[]", "[none]"])
def test_report_to_none_is_accepted_however_it_is_written(written):
    assert load(f"report_to: {written}").report_to == ()


def test_report_to_takes_several_trackers_once_each():
    assert load("report_to: [wandb, tensorboard, wandb, none]").report_to == ("wandb", "tensorboard")


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("{bits: 4}", "a.q_proj", (64, 4, "affine")),
        ("{mode: mxfp4}", "a.q_proj", (32, 4, "mxfp4")),
        ("{mode: mxfp8}", "a.q_proj", (32, 8, "mxfp8")),
        ("{mode: nvfp4}", "a.q_proj", (16, 4, "nvfp4")),
        ("{bits: 3, group_size: 32, overrides: {q_proj: {bits: 8}}}", "a.q_proj", (32, 8, "affine")),
        ("{bits: 3, group_size: 32, overrides: {q_proj: {group_size: 64}}}", "a.q_proj", (64, 3, "affine")),
        ("{bits: 3, group_size: 32, overrides: {a: {mode: mxfp8}}}", "a.q_proj", (32, 8, "mxfp8")),
        ("{mode: mxfp4, overrides: {q_proj: {mode: affine}}}", "a.q_proj", (64, 4, "affine")),
        ("{bits: 3, overrides: {layers.1: {bits: 8}}}", "layers.11.q_proj", (64, 3, "affine")),
        ("{bits: 3, overrides: {layers.1: {bits: 8}, q_proj: false}}", "layers.1.q_proj", (64, 8, "affine")),
        ("{bits: 3, overrides: {layers.1: {bits: 8}, q_proj: false}}", "layers.2.q_proj", None),
        ("{load_in_4bit: true}", "a.q_proj", None),
    ],
)
def test_formats_of_mlx_are_completed_from_above_and_from_its_own_defaults(text, path, expected):
    found = load(f"quantization: {text}").quantization.mlx_format_of(path, by_default=True)
    assert found == (expected and dict(zip(("group_size", "bits", "mode"), expected, strict=True)))


def test_an_alpha_need_not_be_a_whole_number():
    assert load("lora: {lora_alpha: 22.5, alpha_pattern: {q_proj: 3}}").lora.lora_alpha == 22.5
    assert load("lora: {lora_alpha: 32}").to_dict()["lora"]["lora_alpha"] == 32


@pytest.mark.parametrize("text", ["", "metric_for_best_model: eval_loss", "metric_for_best_model: loss"])
def test_the_validation_loss_is_what_best_means(text):
    assert load(f"seed: 1\n{text}").metric_for_best_model == "eval_loss"


@pytest.mark.parametrize(("text", "minutes"), [("", 0), ("save_minutes:", 0), ("save_minutes: 7.5", 7.5)])
def test_checkpoints_by_the_clock_are_off_unless_asked_for(text, minutes):
    assert load(f"seed: 1\n{text}").save_minutes == minutes


def test_switching_off_what_is_not_there_yet_is_fine():
    config = load("early_stopping_patience: null\nadapter_name_or_path:\nlora: {use_dora: false}")
    assert config == TrainConfig()


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("", "auto"),
        ("fp16: false", "auto"),
        ("fp16: false\nbf16: false", "float32"),
        ("fp16: true\nbf16: false", "float16"),
        ("bf16: true", "bfloat16"),
        ("fp16: false\ndtype: bfloat16", "bfloat16"),
        ("dtype: float32", "float32"),
        ("quantization: {load_in_4bit: true, compute_dtype: float16}", "float16"),
        ("quantization: {load_in_4bit: false, compute_dtype: float16}", "auto"),
    ],
)
def test_dtype_of_a_run_follows_the_flags_that_were_written(text, dtype):
    assert load(f"seed: 1\n{text}").compute_dtype == dtype


@pytest.mark.parametrize("optim", ["adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_mlx"])
def test_every_name_of_plain_adamw_is_accepted(optim):
    assert load(f"optim: {optim}").optim == optim


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**32 - 1),
            "learning_rate": st.floats(1e-12, 1e3),
            "fp16": st.sampled_from([None, False]),
            "logging_steps": st.integers(1, 99),
            "model_name_or_path": st.text(min_size=1, max_size=9),
            "lora": st.fixed_dictionaries(
                {}, optional={"target_modules": st.just(["q_proj"]), "layers_to_transform": st.just(3)}
            ),
            "data": st.fixed_dictionaries({}, optional={"train": st.lists(st.text(min_size=1, max_size=5))}),
        },
    )
)
@settings(max_examples=50, deadline=None)
def test_resolved_config_survives_json_and_back(values):
    config = TrainConfig.from_dict(values)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_key_has_a_description():
    undocumented = [key for key, schema in known_keys(TrainConfig).items() if not schema.get("description", "").strip()]
    assert undocumented == []


def test_importing_the_config_loads_no_parser_and_no_framework():
    code = "import sys, common.config; print({'yaml', 'json5', 'torch', 'mlx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
