"""The one training config: every key with its type, default and meaning, checked before anything loads.

Frozen pydantic models; unknown keys, near-miss types ("8" for 8) and values that nothing would honour are
errors. Names are Hugging Face's and PEFT's wherever those have one. A key set to null is as if not written.
Paths are taken as they stand: relative ones from the current working directory, as with Hugging Face scripts,
because people run from the project's root. The cost of strictness: a config made for another tool may need a
line changed; the error says which.

A group of keys is a file, with the checks of its values before it: `data`, `lora`, `quantization`, `evaluation`, and
`train` for the rest. `conflicts` compares keys with each other, `resume` a config with that of a checkpoint; `file`
reads, `errors` explains, `schema` is for editors.
"""

from common.config.data import DataConfig, WeightedPath
from common.config.evaluation import EvaluationConfig
from common.config.lora import LoraConfig
from common.config.quantization import LayerFormat, QuantizationConfig
from common.config.resume import changed_keys
from common.config.train import TrainConfig, load_config, require_trainable

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "LayerFormat",
    "LoraConfig",
    "QuantizationConfig",
    "TrainConfig",
    "WeightedPath",
    "changed_keys",
    "load_config",
    "require_trainable",
]
