"""What is exported: an adapter, its base's folder, and engines opened on them as the run had them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.adapters.adapter import check_adapter, fitted_weights
from common.base.weights import read_header, read_model_config, vocabulary_size, weight_files
from common.config import TrainConfig
from common.data.chat import TOKENIZER_FILES
from common.engine import Array, Engine, TrainState, open_engine
from common.errors import UserError
from common.export.adapter import Adapter, by_layer, loadable

RUN_CONFIG = "training_config.json"


@dataclass(frozen=True)
class Source:
    """Name what is exported, and how engines are opened for it."""

    adapter: Adapter
    tensors: Mapping[str, Array]  # as the files have them
    settings: dict[str, Any]  # adapter_config.json
    folder: Path
    base: Path
    engine: str
    config: TrainConfig

    def open_own(self) -> Engine:
        """Open the base with the adapter by the adapter's own settings; raises UserError where they don't fit."""
        engine = open_engine(self.engine, self.config, self.base, self.adapter.lora)
        engine.load_state(TrainState.fresh(fitted_weights(self.tensors, engine, self.folder)))
        return engine

    def open(self, adapter: Adapter) -> Engine:
        """Open the base with an adapter read from elsewhere, by its arithmetic alone; raises UserError likewise."""
        lora, tensors = loadable(adapter)
        engine = open_engine(self.engine, self.config, self.base, lora)
        check_adapter(tensors, engine.adapter_shapes(), self.folder, trained=True)
        engine.load_state(TrainState.fresh(tensors))
        return engine

    def open_model(self, directory: Path) -> Engine:
        """Open another model, as it lies there."""
        config = TrainConfig(**{key: getattr(self.config, key) for key in ("engine", "device", "dtype")})
        return open_engine(self.engine, config, directory, None)

    def open_for_mlx(self, directory: Path) -> Engine:
        """Open another model, as it lies there, with MLX."""
        return open_engine("mlx", TrainConfig(engine="mlx", device=self.config.device), directory, None)

    @property
    def base_name(self) -> str:
        """Give the base's name as the adapter has it, a Hub name or a folder."""
        return str(self.settings.get("base_model_name_or_path") or self.base)

    @property
    def quantised(self) -> bool:
        """Tell whether the run held its base in fewer bits than the base's files do."""
        quantization = self.config.quantization
        return quantization.load_in_4bit or quantization.load_in_8bit or quantization.bits is not None

    def model_config(self) -> dict[str, Any]:
        """Read the base's config.json."""
        return read_model_config(self.base)

    def vocabulary(self) -> int:
        """Count the tokens that the base knows; raises UserError where its config doesn't say."""
        size = vocabulary_size(self.base)
        if size is None:
            raise UserError(f"{self.base / 'config.json'}: names no vocab_size; download the model again")
        return size

    def matrices(self) -> list[str]:
        """List the modules of the base that have a matrix, in the order of its layers."""
        shapes = {name: entry["shape"] for path in weight_files(self.base) for name, entry in read_header(path).items()}
        names = (name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2)
        return sorted((name for name in names if f"{name}.weight" in shapes), key=by_layer)

    def copy_texts(self, folder: Path) -> None:
        """Copy tokenizer and training config where the adapter's folder has them."""
        for name in (*TOKENIZER_FILES, RUN_CONFIG):
            path = self.folder / name
            if path.is_file():
                shutil.copyfile(path, folder / name)

    @property
    def tokenizer(self) -> Path:
        """Give the folder of the tokenizer: the adapter's where it has one, else the base's."""
        return self.folder if (self.folder / "tokenizer.json").is_file() else self.base

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files."""
        for name in TOKENIZER_FILES:
            if (self.tokenizer / name).is_file():
                shutil.copyfile(self.tokenizer / name, folder / name)

    def stops(self) -> list[int]:
        """List the tokens that end generation, as the base's generation_config.json has them."""
        path = self.base / "generation_config.json"
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        return found if isinstance(found, list) else [] if found is None else [found]
