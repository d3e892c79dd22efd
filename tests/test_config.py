"""The config layer: what is accepted and means what, and what the person reads when it is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import TrainConfig, changed_keys, load_config, require_trainable
from common.config.errors import known_keys, suggest
from common.errors import UserError

ROOT = Path(__file__).parent.parent
SHIP_BEST = "data: {validation: v.jsonl}\nload_best_model_at_end: true\n"
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


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Run where configs are written, so that messages hold bare file names."""
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str, name: str = "train.yaml") -> TrainConfig:
    Path(name).write_text(text, encoding="utf-8")
    return load_config(Path(name), overrides)


def problems(text: str, *overrides: str, name: str = "train.yaml") -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides, name=name)
    return str(caught.value).splitlines()


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


@pytest.mark.parametrize("written", ["1e-3", "0.001", "1.0e-3", "1E-3", "+1e-3"])
def test_yaml_numbers_with_an_exponent_are_numbers(written):
    assert load(f"learning_rate: {written}").learning_rate == 0.001


def test_integer_is_fine_where_a_float_is_expected():
    assert load("learning_rate: 1").learning_rate == 1.0


@pytest.mark.parametrize(("text", "name"), [("eval_strategy: no", "a.yaml"), ('{"eval_strategy": "no"}', "a.json")])
def test_no_is_the_word_no_in_yaml_too(text, name):
    assert load(text, name=name).eval_strategy == "no"


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
    ("text", "line"),
    [
        ("warmup_stepz: 3", "warmup_stepz: unknown key; did you mean warmup_steps?"),
        ("lora: {rr: 8}", "lora.rr: unknown key; did you mean lora.r?"),
        ("zzz: 1", "zzz: unknown key; delete it, nothing here is like it"),
        (
            "lora: {r: sixteen}",
            'lora.r: found "sixteen"; expected an integer of at least 1; write e.g. r: 16',
        ),
        ("lora: {r: 0}", "lora.r: found 0; expected an integer of at least 1; write e.g. r: 16"),
        (
            "lora: 16",
            "lora: found 16; expected a group of keys (r, lora_alpha, lora_dropout, target_modules,",
        ),
        ('seed: "8"', 'seed: found "8"; expected an integer of at least 0'),
        ("seed: true", "seed: found true; expected an integer"),
        ("max_steps: 8.0", "max_steps: found 8.0; expected an integer of at least -1"),
        ("packing: yes", 'packing: found "yes"; expected true or false'),
        ("packing: 1", "packing: found 1; expected true or false"),
        (
            "learning_rate: 0",
            "learning_rate: found 0; expected a number above 0; write e.g. learning_rate: 0.0002",
        ),
        ("learning_rate: .nan", "learning_rate: found NaN; expected a number above 0"),
        ("run_name: 2024-01-01\nrevision: 1", "revision: found 1; expected text; write e.g. revision: main"),
        ("engine: jax", 'engine: found "jax"; expected one of auto, mlx, torch'),
        ("lora: {bias: all}", 'lora.bias: found "all"; expected none; write e.g. bias: none'),
        ("lora: {target_modules: '(q'}", 'lora.target_modules: found "(q"; not a regular expression'),
        ("lora: {target_modules: []}", "lora.target_modules: found []; expected at least one name"),
        ("lora: {target_modules: ''}", 'lora.target_modules: found ""; expected all-linear, a regular'),
        ("lora: {layers_to_transform: [-1]}", "lora.layers_to_transform: found -1; expected a list, each an"),
        ("data: {train: 3}", "data.train: found 3; expected text or a list of texts"),
        ("data: {columns: {answer: a}}", "data.columns: found {answer}, a group of keys; expected names for"),
        ("evaluation: {metrics: [bleu]}", 'evaluation.metrics: found "bleu"; expected valid_json'),
        ("optim: paged_adamw_8bit", 'optim: found "paged_adamw_8bit"; the only optimizer here is AdamW'),
        ("report_to: wandbb", 'report_to: found "wandbb"; wandbb is not among tensorboard, wandb, trackio, mlflow'),
        ("report_to: [all]", 'report_to: found ["all"]; it would depend on what is installed; name them: tens'),
    ],
)
def test_message_says_where_what_was_found_and_what_to_write(text, line):
    (found,) = problems(text)
    assert found.startswith(f"train.yaml: {line}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{lm_head: {bits: x}}", 'expected in lm_head as bits, where there is "x": 2, 3, 4, 5, 6, 8'),
        ("{lm_head: {mode: nf4}}", "affine, mxfp4, mxfp8, nvfp4"),
        ("{lm_head: 8}", "expected modules with a format or false, e.g. {lm_head: {bits: 8}"),
        ("{lm_head: {bts: 8}}", "quantization.overrides.lm_head.bts: unknown key; did you mean quantization.bits?"),
    ],
)
def test_a_format_for_a_module_that_is_none_is_refused_with_what_there_is(overrides, message):
    (line,) = problems(f"quantization: {{bits: 4, overrides: {overrides}}}")
    assert message in line


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


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora_alpha", "lora.lora_alpha"),
        ("r", "lora.r"),
        ("lora_r", "lora.r"),
        ("lora.rank", "lora.r"),
        ("lora.learning_rate", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("max_length", "max_seq_length"),
        ("max_seq_len", "max_seq_length"),
        ("base_model", "model_name_or_path"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("learning-rate", "learning_rate"),
        ("bnb_4bit_quant_type", "quantization.quant_type"),
        ("load_in_4bit", "quantization.load_in_4bit"),
        ("data.valdation", "data.validation"),
    ],
)
def test_unknown_key_suggests_the_key_that_was_meant(key, meant):
    assert suggest(key, known_keys(TrainConfig)) == meant


def test_every_suggested_alias_leads_to_a_key_that_exists():
    from common.config.errors import _ALIASES

    known = known_keys(TrainConfig)
    assert set(_ALIASES) <= set(known)
    assert not {alias for names in _ALIASES.values() for alias in names.split()} & {
        key for key in known if "." not in key
    }


def test_all_problems_come_at_once_with_conflicts_among_the_good_values():
    found = problems("sed: 1\nlora: {r: x}\nfp16: true\nbf16: true\nreport_to: a\n", "max_steps=a")
    assert sorted(line.split(": ")[1] for line in found if line.startswith("train.yaml")) == [
        "bf16",
        "lora.r",
        "report_to",
        "sed",
    ]
    assert any(line.startswith('--set max_steps=a: found "a"; expected an integer') for line in found)
    assert len(found) == 5


def test_a_typo_is_not_reported_again_as_a_missing_key():
    assert problems("eval_strategy: steps\ndata: {valdation: v.jsonl}") == [
        "train.yaml: data.valdation: unknown key; did you mean data.validation?"
    ]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("fp16: true\nbf16: true", ("fp16", "bf16")),
        ("fp16: true\ndtype: bfloat16", ("fp16", "dtype: bfloat16")),
        ("fp16: false\ndtype: float16", ("fp16", "dtype: float16")),
        ("fp16: false\nbf16: false\ndtype: bfloat16", ("fp16", "bf16: false", "dtype: bfloat16")),
        (
            "bf16: true\nquantization: {load_in_4bit: true, compute_dtype: float16}",
            ("bf16", "quantization.compute_dtype: float16"),
        ),
        (
            "quantization: {load_in_4bit: true, load_in_8bit: true}",
            ("quantization.load_in_4bit", "quantization.load_in_8bit"),
        ),
        ("quantization: {load_in_4bit: true, bits: 4}", ("quantization.load_in_4bit", "quantization.bits")),
        ("quantization: {group_size: 64}", ("quantization.group_size", "bits: 4")),
        ("quantization: {load_in_8bit: true, mode: mxfp4}", ("quantization.load_in_8bit", "quantization.mode")),
        ("quantization: {mode: mxfp4, bits: 8}", ("quantization.bits: found 8 with mode: mxfp4", "has 4")),
        ("quantization: {bits: 4, group_size: 16}", ("quantization.group_size: found 16", "32 or 64 or 128")),
        ("quantization: {mode: nvfp4, group_size: 64}", ("quantization.group_size: found 64", "nvfp4, which has 16")),
        ("quantization: {overrides: {lm_head: {bits: 8}}}", ("quantization.overrides", "bits: 4")),
        (
            "quantization: {bits: 4, overrides: {lm_head: {mode: mxfp8, bits: 4}}}",
            ("quantization.overrides.lm_head.bits: found 4", "has 8"),
        ),
        ("warmup_steps: 2\nwarmup_ratio: 0.1", ("warmup_ratio", "warmup_steps")),
        ("eval_strategy: epoch", ("eval_strategy", "data.validation")),
        ("packing: true\ngroup_by_length: true", ("group_by_length", "packing")),
        ("num_train_epochs: 0", ("num_train_epochs", "max_steps: -1")),
        (
            "adapter_name_or_path: a\nlora: {init_lora_weights: pissa}",
            ("lora.init_lora_weights: found pissa", "adapter_name_or_path says"),
        ),
        ("early_stopping_patience: 3", ("early_stopping_patience: found 3", "eval_strategy: steps or epoch")),
        ("load_best_model_at_end: true", ("load_best_model_at_end: found true", "eval_strategy: steps or epoch")),
        (
            f"{SHIP_BEST}eval_strategy: epoch",
            ("load_best_model_at_end", "save_strategy is steps", "eval_strategy epoch"),
        ),
        (
            f"{SHIP_BEST}eval_strategy: steps\nsave_strategy: 'no'",
            ("load_best_model_at_end", "save_strategy is no", "eval_strategy steps"),
        ),
        (
            f"{SHIP_BEST}eval_strategy: steps\nsave_steps: 50\neval_steps: 20",
            ("load_best_model_at_end", "save_steps: 50", "eval_steps: 20", "write e.g. save_steps: 40"),
        ),
        (
            f"{SHIP_BEST}eval_strategy: steps\nsave_steps: 20\neval_steps: 50",
            ("load_best_model_at_end", "save_steps: 20", "eval_steps: 50", "write e.g. save_steps: 50"),
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused_naming_both(text, keys):
    (found,) = problems(text)
    assert all(key in found for key in keys), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora: {init_lora_weights: eva}", 'found "eva"; expected true, gaussian, pissa, pissa_niter_<n> or olora'),
        ("lora: {init_lora_weights: false}", "expected true"),
        ("lora: {init_lora_weights: loftq}", "LoftQ needs a base that is quantised anew"),
        ("lora: {rank_pattern: {q_proj: 0}}", "lora.rank_pattern.q_proj: found 0"),
        ("lora: {lora_alpha: 0}", "lora.lora_alpha: found 0"),
        ("lora: {lora_alpha: 1e300}", "lora.lora_alpha: found 1e+300"),
        ("lora: {rank_pattern: {'(': 8}}", "lora.rank_pattern: found {(}, a group of keys; '(' is no regular"),
    ],
)
def test_lora_settings_without_a_meaning_here_are_refused(text, expected):
    (found,) = problems(text)
    assert expected in found


def test_an_alpha_need_not_be_a_whole_number():
    assert load("lora: {lora_alpha: 22.5, alpha_pattern: {q_proj: 3}}").lora.lora_alpha == 22.5
    assert load("lora: {lora_alpha: 32}").to_dict()["lora"]["lora_alpha"] == 32


@pytest.mark.parametrize(
    "text",
    [
        "eval_strategy: steps\nsave_steps: 40\neval_steps: 20",
        "eval_strategy: steps\nsave_steps: 20\neval_steps: 20",
        "eval_strategy: epoch\nsave_strategy: epoch\nsave_steps: 3\neval_steps: 2",
    ],
)
def test_the_best_is_to_be_had_with_checkpoints_in_the_rhythm_of_evaluations(text):
    config = load(f"{SHIP_BEST}{text}\nearly_stopping_patience: 2")
    assert config.load_best_model_at_end and config.early_stopping_patience == 2


@pytest.mark.parametrize("text", ["", "metric_for_best_model: eval_loss", "metric_for_best_model: loss"])
def test_the_validation_loss_is_what_best_means(text):
    assert load(f"seed: 1\n{text}").metric_for_best_model == "eval_loss"


def test_another_metric_is_refused_with_what_there_is():
    (found,) = problems("metric_for_best_model: accuracy")
    assert found == (
        'train.yaml: metric_for_best_model: found "accuracy"; the only metric computed while training is the loss on '
        "data.validation; write eval_loss"
    )


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


def test_overrides_win_over_the_file_and_the_last_one_wins():
    config = load("lora: {r: 4, lora_alpha: 8}", "lora.r=8", "lora.r=64", "learning_rate=1e-4", "data.train=[a, b]")
    assert (config.lora.r, config.lora.lora_alpha, config.learning_rate) == (64, 8, 1e-4)
    assert config.data.train == ("a", "b")


def test_an_empty_override_restores_the_default():
    assert load("run_name: x\nsave_total_limit: 3", "run_name=", "save_total_limit=null") == TrainConfig()


def test_a_mapping_can_be_set_key_by_key():
    assert load("seed: 1", "data.columns.prompt=question").data.columns == {"prompt": "question"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lora.r=sixteen", 'found "sixteen"; expected an integer of at least 1; write e.g. r: 16'),
        ("lora.rr=8", "unknown key; did you mean lora.r?"),
        ("zoo.bar=3", "unknown key; delete it, nothing here is like it"),
        ("lora.r", "expected key=value; write e.g. --set lora.r=16"),
        ("lora..r=3", "expected key=value"),
        ("lora={r: 8}", "lora is a group; set its keys one by one"),
        ("data.train=[a", "the value isn't valid YAML"),
        ("seed.x=1", "train.yaml has seed: 1, which holds no keys"),
        ("bf16=true", "found true, which contradicts fp16: true"),
    ],
)
def test_a_bad_override_is_blamed_and_not_the_file(override, line):
    (found,) = problems("seed: 1\nfp16: true", override)
    assert found.startswith(f"--set {override}: {line}")


def test_an_override_does_not_hide_what_is_wrong_in_the_file():
    found = problems("lora: {r: x}\nfoo: 1", "lora.lora_alpha=8", "nonsense")
    assert [line.split(":")[0] for line in found] == ["--set nonsense", "train.yaml", "train.yaml"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.yaml", b"", "is empty"),
        ("a.yaml", b"# only a comment\n", "is empty"),
        ("a.json", b" \n", "is empty"),
        ("a.yaml", b"- 1\n- 2\n", "found [1, 2]; expected keys and values"),
        ("a.json", b"3", "found 3; expected keys and values"),
        ("a.yaml", b"seed: 1\nlora: {r: 1\nbf16: true\n", "line 3, column 5: not valid YAML"),
        ("a.yaml", b"seed: 1\n\tlora: 1\n", "line 2, column 1: not valid YAML"),
        ("a.yaml", b"seed: !!python/name:os.system x\n", "line 1, column 7: not valid YAML"),
        ("a.yaml", b"seed: \x00\n", "not valid YAML"),
        ("a.json", b'{"seed": 1,\n "lora": }', 'line 2, column 10: not valid JSON: Unexpected "}"'),
        ("a.json", b'{"seed": 1', "line 1, column "),
        ("a.yaml", b"seed: 1\nlora: {r: 1, r: 2}\n", "line 2: r: written twice"),
        ("a.json", b'{"seed": 1, "seed": 2}', "seed: written twice"),
        ("a.json", b'{"lora": {"r": 1, "r": 2,}} // so', "r: written twice"),
        ("a.yaml", b"seed: 1\nrun_name: \xff\n", "line 2: not UTF-8"),
        ("a.yaml", b"a: " + b"[" * 1500, "nested too deeply"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.toml", b"seed = 1", "found a file named *.toml; expected .yaml, .yml or .json"),
    ],
)
def test_a_file_that_holds_no_config_is_refused_with_the_place(name, content, line):
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(Path(name))
    assert str(caught.value).startswith(f"{name}: {line}")


def test_a_missing_file_and_a_folder_are_told_apart():
    Path("folder.yaml").mkdir()
    with pytest.raises(UserError, match=r"^nowhere\.yaml: no such file"):
        load_config(Path("nowhere.yaml"))
    with pytest.raises(UserError, match=r"^folder\.yaml: is a folder"):
        load_config(Path("folder.yaml"))


def test_byte_order_mark_and_windows_line_ends_are_read():
    Path("a.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\r\nlora:\r\n  r: 4\r\n")
    assert load_config(Path("a.yaml")).seed == 7


def test_yaml_json_and_commented_json_give_the_same_config():
    plain = load('{"seed": 7, "lora": {"r": 4}}', name="a.json")
    commented = load('{"seed": 7, // the seed\n "lora": {"r": 4,},}', name="b.json")
    assert plain == commented == load("seed: 7\nlora: {r: 4}")


def test_training_without_model_and_data_is_refused_with_what_to_add():
    with pytest.raises(UserError) as caught:
        require_trainable(load(NOTES, name="notes.json"), "notes.json")
    model, data = str(caught.value).splitlines()
    assert model.startswith("notes.json: model_name_or_path: missing; add the base to train, e.g. ")
    assert data.startswith("notes.json: data.train: missing; add the file of examples, e.g. ")


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


def test_a_damaged_saved_config_is_named_in_the_error():
    with pytest.raises(UserError, match=r"^run/training_config\.json: lora\.r: found 0"):
        TrainConfig.from_dict({"lora": {"r": 0}}, "run/training_config.json")


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("lora.r=8", "lora.r: 16 -> 8"),
        ("lr_scheduler_type=cosine", 'lr_scheduler_type: "linear" -> "cosine"'),
        ("seed=1", "seed: 42 -> 1"),
        ("quantization.load_in_4bit=true", "quantization.load_in_4bit: false -> true"),
        ("data.columns.prompt=q", 'data.columns: {} -> {"prompt": "q"}'),
        ("bf16=true", "bf16: null -> true"),
    ],
)
def test_a_change_that_forbids_a_resume_is_listed_old_to_new(override, change):
    assert changed_keys(load("dtype: auto").to_dict(), load("dtype: auto", override).to_dict()) == [change]


@pytest.mark.parametrize(
    "override",
    [
        *("learning_rate=1", "num_train_epochs=9", "max_steps=7", "logging_steps=3", "save_steps=3"),
        *(
            "save_total_limit=1",
            "save_strategy=epoch",
            "output_dir=x",
            "engine=mlx",
            "device=cpu",
            "run_name=x",
        ),
        *("evaluation.samples=0", "optim=adamw_mlx", "gradient_checkpointing=true", "data.train=moved.jsonl"),
        *("save_minutes=10.5", "early_stopping_patience=null", "load_best_model_at_end=false"),
        *("report_to=none", "eval_steps=9", "data.validation=v.jsonl", "max_nonfinite_steps=1"),
    ],
)
def test_a_change_that_leaves_the_state_valid_allows_a_resume(override):
    assert changed_keys(load("dtype: auto").to_dict(), load("dtype: auto", override).to_dict()) == []


def test_a_key_that_an_older_version_did_not_write_counts_as_its_default():
    new = TrainConfig().to_dict()
    old = {key: value for key, value in new.items() if key != "weight_decay"}
    assert changed_keys(old, new) == []
    assert changed_keys(old, {**new, "weight_decay": 0.1}) == ["weight_decay: 0.0 -> 0.1"]


def test_every_key_has_a_description():
    undocumented = [key for key, schema in known_keys(TrainConfig).items() if not schema.get("description", "").strip()]
    assert undocumented == []


def test_importing_the_config_loads_no_parser_and_no_framework():
    code = "import sys, common.config; print({'yaml', 'json5', 'torch', 'mlx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
