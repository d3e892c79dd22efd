"""The shapes of published models, from the config.json of each on the Hub: no weight of them is here.

The architecture makes the tensors out of a config, and their number is held against the published one, which is known
apart from it: a width remembered wrongly would show.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from common.estimate.shape import ModelShape, shape_of


@dataclass(frozen=True, eq=False)  # each is itself alone
class Published:
    """Describe a model on the Hub: its name there, what its config.json says, how many weights it has."""

    name: str
    model_type: str
    config: dict[str, Any]
    num_weights: int

    @property
    def title(self) -> str:
        """Give the name as people say it."""
        return self.name.partition("/")[2].removesuffix("-Instruct").removesuffix("-instruct").removesuffix("-it")

    @property
    def file_name(self) -> str:
        """Give the name that the model's configs have in configs/."""
        return f"{self.title.lower()}.yaml"


def widths(layers: int, hidden: int, inner: int, heads: int, keys: int, vocabulary: int, **more: object) -> dict:
    """Write what every decoder's config has, under its names there."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        **more,
    }


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WIDE = {"head_dim": 128}
GEMMA = {"head_dim": 256}
PHI = {"pad_token_id": 0}
SIGLIP = {  # the tower of Gemma 3 4B and larger
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}

MODELS = [
    Published(
        "meta-llama/Llama-3.2-1B-Instruct",
        "llama",
        widths(16, 2048, 8192, 32, 8, 128256, head_dim=64, **TIED),
        1_235_814_400,
    ),
    Published(
        "meta-llama/Llama-3.2-3B-Instruct",
        "llama",
        widths(28, 3072, 8192, 24, 8, 128256, **TIED, **WIDE),
        3_212_749_824,
    ),
    Published(
        "meta-llama/Llama-3.1-8B-Instruct", "llama", widths(32, 4096, 14336, 32, 8, 128256, **UNTIED), 8_030_261_248
    ),
    Published("Qwen/Qwen3-0.6B", "qwen3", widths(28, 1024, 3072, 16, 8, 151936, **TIED, **WIDE), 596_049_920),
    Published("Qwen/Qwen3-1.7B", "qwen3", widths(28, 2048, 6144, 16, 8, 151936, **TIED, **WIDE), 1_720_574_976),
    Published("Qwen/Qwen3-4B", "qwen3", widths(36, 2560, 9728, 32, 8, 151936, **TIED, **WIDE), 4_022_468_096),
    Published("Qwen/Qwen3-8B", "qwen3", widths(36, 4096, 12288, 32, 8, 151936, **UNTIED, **WIDE), 8_190_735_360),
    Published("Qwen/Qwen3-14B", "qwen3", widths(40, 5120, 17408, 40, 8, 151936, **UNTIED, **WIDE), 14_768_307_200),
    Published("google/gemma-3-1b-it", "gemma3_text", widths(26, 1152, 6912, 4, 1, 262144, **GEMMA), 999_885_952),
    Published("google/gemma-3-4b-it", "gemma3", widths(34, 2560, 10240, 8, 4, 262208, **GEMMA), 4_300_079_472),
    Published("google/gemma-3-12b-it", "gemma3", widths(48, 3840, 15360, 16, 8, 262208, **GEMMA), 12_187_325_040),
    Published("google/gemma-3-27b-it", "gemma3", widths(62, 5376, 21504, 32, 16, 262208, **WIDE), 27_432_406_640),
    Published(
        "microsoft/Phi-4-mini-instruct", "phi3", widths(32, 3072, 8192, 24, 8, 200064, **TIED, **PHI), 3_836_021_760
    ),
    Published("microsoft/phi-4", "phi3", widths(40, 5120, 17920, 40, 10, 100352, **UNTIED, **PHI), 14_659_507_200),
]


def published_shape(model: Published) -> ModelShape:
    """Build a model without weights and return its shape, as `twintune estimate` reads it from the Hub."""
    with torch.device("meta"):
        if model.model_type == "gemma3":
            config = AutoConfig.for_model("gemma3", text_config=dict(model.config), vision_config=dict(SIGLIP))
            built = AutoModelForImageTextToText.from_config(config)
        else:
            config = AutoConfig.for_model(model.model_type, **model.config)
            built = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in built.parameters()) == model.num_weights, model.name
    headers = {key: {"dtype": "BF16", "shape": list(weight.shape)} for key, weight in built.state_dict().items()}
    return shape_of(model.name, config.to_dict(), headers)
