"""The schema for editors accepts what load_config accepts and refuses what it refuses; jsonschema is the judge."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from common.config import TrainConfig, load_config
from common.config.file import read_config_file
from common.config.schema import config_schema
from common.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
VALIDATOR = Draft202012Validator(config_schema())


def in_any_order(value):
    """Sort the choices of each enum: typing may hand out an equal Literal of another module, in that one's order."""
    if isinstance(value, dict):
        return {key: sorted(item, key=str) if key == "enum" else in_any_order(item) for key, item in value.items()}
    return [in_any_order(item) for item in value] if isinstance(value, list) else value


def test_it_is_a_schema_and_knows_every_key_with_its_meaning():
    Draft202012Validator.check_schema(VALIDATOR.schema)
    assert set(VALIDATOR.schema["properties"]) == set(TrainConfig.model_fields)
    assert "description" in VALIDATOR.schema["properties"]["learning_rate"]


def test_the_copy_in_configs_is_up_to_date():
    written = json.loads((CONFIGS / "config.schema.json").read_text())
    assert in_any_order(written) == in_any_order(VALIDATOR.schema), (
        "write it anew: twintune schema > configs/config.schema.json"
    )


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*_config.json")]), ids=lambda p: p.name
)
def test_our_configs_are_valid_and_name_the_schema(path):
    assert list(VALIDATOR.iter_errors(read_config_file(path))) == []
    if path.suffix == ".yaml":
        assert path.read_text().startswith("# yaml-language-server: $schema=config.schema.json\n")


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("{}", True),
        ('{"data": {"train": "a.jsonl"}}', True),
        ('{"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}]}}', True),
        ('{"data": {"train": {"path": "b.jsonl", "weight": 0}}}', False),
        ('{"lora": {"layers_to_transform": 3, "target_modules": ["q_proj"]}}', True),
        ('{"lora": {"layers_to_transform": -3}}', False),
        ('{"lora": null, "eval_steps": null, "report_to": "wandb"}', True),
        ('{"evaluation": {"metrics": "exact_match"}}', True),
        ('{"warmup_stepz": 3}', False),
        ('{"lora": {"r": "16"}}', False),
        ('{"lora": {"r": 0}}', False),
        ('{"engine": "jax"}', False),
        ('{"learning_rate": 0}', False),
    ],
)
def test_it_judges_as_the_program_does(text, valid, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert VALIDATOR.is_valid(json.loads(text)) is valid
    if valid:
        load_config(tmp_path / "config.json")
    else:
        with pytest.raises(UserError):
            load_config(tmp_path / "config.json")


def test_the_command_prints_it(cli, tmp_path):
    done = cli("schema", cwd=tmp_path)
    assert done.returncode == 0 and in_any_order(json.loads(done.stdout)) == in_any_order(VALIDATOR.schema)
