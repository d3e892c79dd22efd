"""A config as a person writes it: load it, or collect what is said against it."""

from pathlib import Path

import pytest

from common.config import TrainConfig, load_config
from common.errors import UserError


def load(text: str, *overrides: str, name: str = "train.yaml") -> TrainConfig:
    Path(name).write_text(text, encoding="utf-8")
    return load_config(Path(name), overrides)


def problems(text: str, *overrides: str, name: str = "train.yaml") -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides, name=name)
    return str(caught.value).splitlines()
