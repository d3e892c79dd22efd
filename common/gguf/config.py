"""The config.json of a GGUF's model, for transformers 4 and 5 and for mlx-lm.

An unknown setting may change what the model computes (experts, another window): it is refused, never ignored.
"""

from __future__ import annotations

from typing import Any

from common.gguf.architectures import ARCHITECTURES, SETTINGS, WINDOW_PATTERN, Architecture, head_size
from common.gguf.file import GgufFile
from common.gguf.names import GgufNames, gguf_names
from common.gguf.rope import LOCAL_THETA, rope_options
from common.gguf.rope import SETTINGS as ROPE_SETTINGS
from common.gguf.vocabulary import Vocabulary

CHANGES_NOTHING = {"tensor_data_layout"}


def model_type_of(gguf: GgufFile) -> str:
    """Find the model_type of a GGUF's graph; raises UserError for one that is not in ARCHITECTURES."""
    for model_type, architecture in ARCHITECTURES.items():
        if architecture.name == gguf.architecture:
            return model_type
    known = dict.fromkeys(architecture.name for architecture in ARCHITECTURES.values())
    raise gguf.refusal(f"the architecture is {gguf.architecture!r}", " or ".join(known))


def model_config(gguf: GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """Build `config.json` but for the dtype, which is the writer's.

    Raises UserError for a setting that is missing or that Hugging Face's model of the kind doesn't have.
    """
    model_type = model_type_of(gguf)
    architecture = ARCHITECTURES[model_type]
    _refuse_unknown(gguf, architecture)
    options = {"model_type": model_type, **_options(gguf, architecture, len(vocabulary.tokens))}
    return {
        "architectures": [architecture.model_class],
        **options,
        "hidden_act": architecture.activation,
        **rope_options(gguf, architecture, options["head_dim"]),
        **_biases(gguf, gguf_names(options)),
        **(_gemma_options(gguf, architecture, options) if architecture.is_gemma else {}),
        "tie_word_embeddings": architecture.tied or "output.weight" not in gguf.tensors,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }


def _refuse_unknown(gguf: GgufFile, architecture: Architecture) -> None:
    known = {*SETTINGS, *architecture.settings, *ROPE_SETTINGS, *CHANGES_NOTHING}
    known |= {WINDOW_PATTERN} if architecture.is_gemma else set()
    known |= {LOCAL_THETA} if architecture.local_theta else set()
    for key, value in gguf.metadata.items():
        prefix, _, setting = key.partition(".")
        if prefix == gguf.architecture and setting not in known and value:
            raise gguf.refusal(f"{key} is {value!r}", f"a plain {architecture.model_class}, which has no such setting")


def _options(gguf: GgufFile, architecture: Architecture, num_tokens: int) -> dict[str, Any]:
    """Read the options that have a setting; raises UserError where one is missing, or two settings of one differ."""
    embedding = gguf.tensors.get("token_embd.weight")
    options: dict[str, Any] = {"vocab_size": num_tokens if embedding is None else embedding.shape[0]}
    for key, option in {**SETTINGS, **architecture.settings}.items():
        if option == "vocab_size":
            continue  # some files count the tokens of their tokenizer, without the rows that only fill up
        if option in architecture.defaults and architecture.defaults[option] is None and not gguf.setting(key):
            options[option] = None
            continue
        default = options.get(option, architecture.defaults.get(option))
        if default is None and option == "num_key_value_heads":
            default = options["num_attention_heads"]
        if default is None and option == "head_dim":
            default = head_size(options)
        value = gguf.number(key, default)
        if value != options.setdefault(option, value):
            raise gguf.refusal(f"{gguf.architecture}.{key} is {value}", f"the size of a head, {options[option]}")
    return options


def _biases(gguf: GgufFile, names: GgufNames) -> dict[str, bool]:
    first = {option: next(iter(modules)) for option, modules in names.architecture.optional_biases.items()}
    return {option: names.name(f"model.layers.0.{module}.bias") in gguf.tensors for option, module in first.items()}


def _gemma_options(gguf: GgufFile, architecture: Architecture, options: dict[str, Any]) -> dict[str, Any]:
    pattern, layers = gguf.setting(WINDOW_PATTERN, architecture.window_pattern), options["num_hidden_layers"]
    slides = pattern if isinstance(pattern, list) else [bool((layer + 1) % pattern) for layer in range(layers)]
    if len(slides) != layers:
        raise gguf.refusal(f"{WINDOW_PATTERN} names {len(slides)} layers", f"{layers}")
    return {
        "hidden_activation": architecture.activation,
        "query_pre_attn_scalar": architecture.attention_scalar(options),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
    }
