"""Every config of configs/MACHINE/ is valid, is what its rule says, and fits the machine that its folder names."""

from pathlib import Path

import pytest
from published_models import MODELS
from ready_configs import CONFIGS, MACHINES, STEP_TOKENS, config_files, peak, readme, shape_of_model

from common.config import load_config, require_trainable

FILES = sorted(path for machine in MACHINES for path in (CONFIGS / machine.folder).glob("*"))
BY_FILE = {model.file_name: model for model in MODELS}
BY_FOLDER = {machine.folder: machine for machine in MACHINES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_is_valid_and_fits_the_machine_of_its_folder(path: Path):
    config, machine, model = load_config(path), BY_FOLDER[path.parent.name], BY_FILE[path.name]
    assert require_trainable(config, path) == model.name and machine.name in path.read_text()
    assert machine.fits(peak(config, shape_of_model(model), machine))
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert rows * config.max_seq_length == STEP_TOKENS and config.packing
    assert config.per_device_eval_batch_size <= config.per_device_train_batch_size  # evaluating needs no more than that
    assert (config.engine, config.device, config.quantization.mlx_format) == ("auto", "auto", None)
    schema = path.read_text().partition("\n")[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == CONFIGS / "config.schema.json"


@pytest.mark.parametrize(
    ("name", "folder"), [("apple_silicon_config.json", "mac-32gb"), ("cuda_config.json", "cuda-8gb")]
)
def test_the_two_of_the_notes_fit_what_the_readme_says(name: str, folder: str):
    config = load_config(CONFIGS / name)
    model = next(model for model in MODELS if model.name == config.model_name_or_path)
    assert BY_FOLDER[folder].fits(peak(config, shape_of_model(model), BY_FOLDER[folder]))


def test_configs_and_their_tables_are_what_the_rule_says():
    written = {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8") for path in FILES}
    assert written == config_files(), "write them anew: python tests/ready_configs.py"
    assert (CONFIGS / "README.md").read_text(encoding="utf-8") == readme(), "python tests/ready_configs.py"


def test_every_model_is_somewhere_on_a_mac_and_on_a_card():
    for engine in ("mlx", "torch"):
        assert {path.name for path in FILES if BY_FOLDER[path.parent.name].engine == engine} == set(BY_FILE)
