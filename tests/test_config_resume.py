"""Which changes of a config a resumed run may have."""

import pytest
from written_config import load

from common.config import TrainConfig, changed_keys

pytestmark = pytest.mark.usefixtures("in_tmp_path")


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
