"""A PEFT adapter folder as every reader of PEFT's files understands it: classic keys, its texts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.adapters.adapter import peft_config, write_adapter
from common.engine import Engine
from common.export.adapter import Adapter, to_tensors
from common.export.source import Source
from common.lora import portable_target_modules


def write_peft(folder: Path, adapter: Adapter, source: Source, engine: Engine, dtype: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors in a dtype, tokenizer and training config."""
    alpha = adapter.lora.lora_alpha
    lora = adapter.lora.model_copy(update={"lora_alpha": int(alpha) if alpha == int(alpha) else alpha})
    config = peft_config(
        lora, _targets(adapter, source), source.base_name, source.settings.get("revision"), engine.tied_embeddings
    )
    write_adapter(folder, dict(sorted(to_tensors(adapter).items())), config, dtype)
    source.copy_texts(folder)


def _targets(adapter: Adapter, source: Source) -> Sequence[str]:
    """Return last names where those mean exactly the adapter's modules, else full names."""
    known = source.matrices()
    in_order = [name for name in known if name in adapter.parts]
    complete = len(in_order) == len(adapter.parts)  # else the checkpoint names modules otherwise than the engine
    return portable_target_modules(in_order, known, adapter.lora) if complete else sorted(adapter.parts)
