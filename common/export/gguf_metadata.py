"""The settings of a model in llama.cpp's words, from its config.json.

Only what llama.cpp's graphs compute is written (common/gguf/architectures.py says what); the rest is refused, because
llama.cpp would leave it out without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, LlamaFileType

from common.errors import UserError
from common.gguf.architectures import FRACTIONS, SETTINGS, SOFT_CAPS, WINDOW_PATTERN, Architecture, head_size
from common.gguf.names import GgufNames
from common.gguf.rope import rope_settings, rotated_part

FILE_TYPES = {
    "float32": LlamaFileType.ALL_F32,
    "float16": LlamaFileType.MOSTLY_F16,
    "bfloat16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def model_metadata(names: GgufNames, title: str, dtype: str) -> dict[str, Any]:
    """Return a model's settings by GGUF key; raises UserError for one that llama.cpp's graph doesn't have."""
    config, architecture = names.config, names.architecture
    _refuse(config, architecture)
    options = {
        **architecture.defaults,
        **config,
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": head_size(config),
        "max_position_embeddings": _context(config, architecture),
    }
    settings = {
        key: float(options[option]) if option in FRACTIONS else options[option]
        for key, option in {**SETTINGS, **architecture.settings}.items()
        if options[option] is not None
    }
    settings |= rope_settings(config, architecture)
    if architecture.is_gemma and config.get("layer_types"):
        settings[WINDOW_PATTERN] = [kind == "sliding_attention" for kind in config["layer_types"]]
    general = {"general.name": title, "general.file_type": int(FILE_TYPES[dtype]), "general.quantization_version": 2}
    return general | {f"{architecture.name}.{key}": value for key, value in settings.items()}


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Write settings by the types their values have."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _refuse(config: Mapping[str, Any], architecture: Architecture) -> None:
    activation = config.get("hidden_activation") or config.get("hidden_act")
    scalar = architecture.attention_scalar(config)
    caps = {option: config.get(option, architecture.defaults.get(option)) for option in SOFT_CAPS.values()}
    capped = {option for option, value in caps.items() if value}
    found = None
    if activation not in (architecture.activation, None):
        found = f"it has the activation {activation}, where llama.cpp has {architecture.activation}"
    elif config.get("use_sliding_window"):
        found = "it has use_sliding_window, which llama.cpp doesn't compute for it"
    elif config.get("query_pre_attn_scalar") not in (None, scalar):
        found = f"its query_pre_attn_scalar is {config['query_pre_attn_scalar']}, llama.cpp takes {scalar}"
    elif wrong := capped.symmetric_difference(caps.keys() & architecture.settings.values()):
        (option, *_) = sorted(wrong)
        found = f"its {option} is {caps[option]}, which llama.cpp doesn't compute for it"
    elif rotated_part(config) != 1.0 and not architecture.partial_rotary:
        found = "it has a partial rotary embedding, which llama.cpp doesn't compute for it"
    if found:
        raise UserError(
            f"a GGUF of this {config['model_type']} would compute something else: {found}; write --to merged"
        )


def _context(config: Mapping[str, Any], architecture: Architecture) -> int:
    """Return the longest text: a Mistral's window, within which llama.cpp's full attention is the same."""
    longest, window = config["max_position_embeddings"], config.get("sliding_window")
    return int(min(longest, window) if architecture.windowless and window else longest)
