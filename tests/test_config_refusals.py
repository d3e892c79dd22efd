"""What a person reads who wrote a config that can't be honoured."""

import pytest
from written_config import load, problems

from common.config import TrainConfig, require_trainable
from common.config.errors import _ALIASES, known_keys, suggest
from common.errors import UserError

pytestmark = pytest.mark.usefixtures("in_tmp_path")

SHIP_BEST = "data: {validation: v.jsonl}\nload_best_model_at_end: true\n"


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
        ("prefix_sharing: true", ("prefix_sharing: found true", "packing: true too")),
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


def test_another_metric_is_refused_with_what_there_is():
    (found,) = problems("metric_for_best_model: accuracy")
    assert found == (
        'train.yaml: metric_for_best_model: found "accuracy"; the only metric computed while training is the loss on '
        "data.validation; write eval_loss"
    )


def test_training_without_model_and_data_is_refused_with_what_to_add():
    with pytest.raises(UserError) as caught:
        require_trainable(load("seed: 1"), "notes.json")
    model, data = str(caught.value).splitlines()
    assert model.startswith("notes.json: model_name_or_path: missing; add the base to train, e.g. ")
    assert data.startswith("notes.json: data.train: missing; add the file of examples, e.g. ")


def test_a_damaged_saved_config_is_named_in_the_error():
    with pytest.raises(UserError, match=r"^run/training_config\.json: lora\.r: found 0"):
        TrainConfig.from_dict({"lora": {"r": 0}}, "run/training_config.json")
