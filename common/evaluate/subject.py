"""What is measured: a base and, where there is one, an adapter, known and checked before an engine is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.adapters.adapter import fitted_weights, lora_of, read_adapter
from common.base.hub import resolve_model
from common.config import TrainConfig
from common.engine import Array, Engine, TrainState, choose_engine
from common.errors import UserError
from common.initial import untrained
from common.inputs import read_base
from common.runs.run import FINAL_NAME


@dataclass(frozen=True)
class Subject:
    """Hold a base, an adapter or None, and the config by which both are opened."""

    config: TrainConfig
    engine: str
    model_dir: Path
    adapter: Path | None
    weights: Mapping[str, Array]

    @classmethod
    def of(cls, config: TrainConfig, adapter: Path | None) -> Subject:
        """Find the base that a config names and read an adapter, by default what its run has left, if it has."""
        final = Path(config.output_dir) / FINAL_NAME
        adapter = adapter or (final if final.is_dir() else None)
        base = config.model_name_or_path
        if not base:
            raise UserError("model_name_or_path: missing; add the base to measure to the config")
        engine = choose_engine(config.engine)
        weights, settings = read_adapter(adapter) if adapter else ({}, {})
        config = config.model_copy(update={"lora": lora_of(settings, adapter)}) if adapter else config
        return cls(config, engine, resolve_model(base, config.revision), adapter, weights)

    def open(self, console: Console) -> Engine:
        """Open an engine with the adapter, or with one that changes nothing; raises UserError where it doesn't fit."""
        engine = read_base(self.engine, self.config, self.model_dir, console)
        if self.adapter is None:
            self.load_base(engine)
        else:
            engine.load_state(TrainState.fresh(fitted_weights(self.weights, engine, self.adapter)))
        return engine

    def load_base(self, engine: Engine) -> None:
        """Put an adapter that changes nothing in the place of the one that is loaded."""
        engine.load_state(untrained(engine, self.config.lora, self.config.seed))
