"""The one training config: every key with its type, default and meaning, checked before anything loads.

Frozen pydantic models; unknown keys, near-miss types ("8" for 8) and values that nothing would honour are
errors. Names are Hugging Face's and PEFT's wherever those have one. A key set to null is as if not written.
Paths are taken as they stand: relative ones from the current working directory, as with Hugging Face scripts,
because people run from the project's root. The cost of strictness: a config made for another tool may need a
line changed; the error says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from common.config_checks import (
    also_false,
    as_layers,
    as_modules,
    as_overrides,
    as_reporters,
    as_sources,
    as_texts,
    check_columns,
    check_patterns,
    check_split,
    complete_format,
    conflicts,
    differences_for_resume,
    known_best_metric,
    known_initialisation,
    known_metric,
    known_optimizer,
)
from common.config_errors import ConfigInput, known_keys, validated
from common.config_file import apply_overrides, read_config_file
from common.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Alpha = Annotated[int, Field(ge=1, le=10**9)] | Annotated[float, Field(gt=0, le=1e9)]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_texts)]
Modules = Annotated[str | tuple[str, ...], BeforeValidator(as_modules)]


class _Group(BaseModel):
    """Share strictness: frozen, no unknown keys, no silent conversion, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        """Drop known keys set to null, so that `eval_steps: null` or an empty `data.test:` is the default."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}


class WeightedPath(_Group):
    """Name a source of training examples that counts more or less than once."""

    path: Name
    weight: Positive = 1.0

    def __str__(self) -> str:
        return f"{self.path} (weight {self.weight:g})"


class DataConfig(_Group):
    """Say which files hold the examples and how an example becomes tokens."""

    train: Annotated[tuple[Name | WeightedPath, ...], BeforeValidator(as_sources)] = ()
    """Path or list of paths of the training examples; README.md, "Data", lists the kinds.

    `{path: a.jsonl, weight: 2}` shows each example twice an epoch, 0.5 a seeded half of them once.
    """

    validation: Texts = ()
    """Path or list of paths for the loss during training."""

    validation_split: Annotated[NonNegative, AfterValidator(check_split)] = 0.0
    """Hold out training examples as validation: a share below 1 of them, or a whole number of examples."""

    test: Texts = ()
    """Path or list of paths for `twintune evaluate`."""

    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized"] = "auto"
    """What a record holds, as README.md, "Data", shows; auto looks at the fields of each."""

    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens count in the loss: every assistant turn, the last one only, or everything."""

    truncation: Literal["truncate", "error", "drop", "split"] = "truncate"
    """What happens to an example longer than `max_seq_length`."""

    on_error: Literal["stop", "skip"] = "stop"
    """Whether unusable lines end the run or are left out and counted."""

    columns: Annotated[dict[str, Name], AfterValidator(check_columns)] = {}
    """Your own names of the fields, e.g. `{prompt: question, completion: answer}`."""


class LoraConfig(_Group):
    """Describe the adapter, in PEFT's names."""

    r: Count = 16
    """Rank: the width of the adapter."""

    lora_alpha: Alpha = 32
    """Numerator of the scale alpha / r (alpha / sqrt(r) with `use_rslora`)."""

    lora_dropout: Fraction = 0.0
    """Share of the adapter's inputs set to zero while training."""

    target_modules: Modules = "all-linear"
    """Which modules get an adapter: all-linear, a regular expression on full names, a list of last names."""

    target_parameters: Annotated[tuple[Name, ...], BeforeValidator(as_texts)] | None = Field(
        default=None, examples=[["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]]
    )
    """Stacks of experts to adapt besides, by the end of their names in transformers' model; every expert gets `r`."""

    exclude_modules: Modules | None = None
    """Modules to leave out of those, as a regular expression or a list of last names."""

    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_layers)] | None = Field(
        default=None, examples=[[0, 1]]
    )
    """Layer number or numbers, from 0, to adapt; null for all."""

    rank_pattern: Annotated[dict[Name, Count], AfterValidator(check_patterns)] = Field(
        default={}, examples=[{"down_proj": 8}]
    )
    """Other ranks for modules whose name ends with a regular expression; the first that matches counts."""

    alpha_pattern: Annotated[dict[Name, Alpha], AfterValidator(check_patterns)] = Field(
        default={}, examples=[{"down_proj": 16}]
    )
    """Other alphas likewise."""

    modules_to_save: Annotated[tuple[Name, ...], BeforeValidator(as_texts)] | None = Field(
        default=None, examples=[["embed_tokens", "lm_head"]]
    )
    """Modules to train whole instead, by last name: embeddings and head for new tokens, norms."""

    init_lora_weights: Annotated[bool | Name, AfterValidator(known_initialisation)] = True
    """Where the adapter starts: true (A as a linear layer, B zero), gaussian, pissa, pissa_niter_4, olora."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks stable (arXiv:2312.03732)."""

    use_dora: bool = False
    """Learn magnitude and direction of each row apart (arXiv:2402.09353)."""

    bias: Literal["none"] = "none"
    """Which biases are trained."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """What the model does."""


class LayerFormat(_Group):
    """Say how MLX packs weights: `mode` decides which `bits` and `group_size` there are."""

    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    """Bits a weight: any of these in the affine mode, 4 in mxfp4 and nvfp4, 8 in mxfp8; null for the mode's own."""

    group_size: Literal[16, 32, 64, 128] | None = None
    """Weights that share a scale: 32, 64 or 128 in the affine mode, else the mode's own; null for its default."""

    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] | None = None
    """How MLX rounds: affine (a scale and an offset a group), or small floats with a scale a group."""


class QuantizationConfig(LayerFormat):
    """Hold the frozen base weights in fewer bits: bitsandbytes' 4 and 8 bits, or MLX's own formats."""

    load_in_4bit: bool = False
    """Quantise the base to 4 bits of `quant_type` (QLoRA, arXiv:2305.14314), the same weights on both engines."""

    load_in_8bit: bool = False
    """Quantise the base to 8 bits (LLM.int8); torch only."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code book of `load_in_4bit`."""

    use_double_quant: bool = False
    """Quantise the scales of `load_in_4bit` too: about 0.4 bits a weight less."""

    compute_dtype: Dtype | None = None
    """Dtype of the run with `load_in_4bit`; the same as `dtype`, under bitsandbytes' name."""

    overrides: Annotated[dict[Name, LayerFormat | None], BeforeValidator(as_overrides)] = Field(
        default={}, examples=[{"lm_head": {"bits": 8}}], json_schema_extra=also_false
    )
    """MLX's own formats, for some modules: by a path or a part of it at dots; false leaves those as they are."""

    @property
    def way(self) -> str | None:
        """Name the key that asks for a quantised base; None where none does."""
        ways = {"load_in_4bit": self.load_in_4bit, "load_in_8bit": self.load_in_8bit}
        ways |= {"bits": self.bits is not None, "mode": self.mode is not None}
        return next((f"quantization.{key}" for key, asked in ways.items() if asked), None)

    @property
    def mlx_format(self) -> dict[str, Any] | None:
        """Give `group_size`, `bits` and `mode` as MLX's quantize takes them; None where the base is not to be so."""
        return None if self.bits is None and self.mode is None else complete_format(self)

    def mlx_format_of(self, path: str, by_default: bool) -> dict[str, Any] | None:
        """Give the same for the module at a path: the first override that names it, else this if `by_default`."""
        for key, own in self.overrides.items():
            if f".{key}." in f".{path}.":
                return complete_format(own, self) if own else None
        return self.mlx_format if by_default else None


class EvaluationConfig(_Group):
    """Say what `twintune evaluate` measures and shows."""

    metrics: Annotated[tuple[Annotated[str, AfterValidator(known_metric)], ...], BeforeValidator(as_texts)] = ()
    """Beyond loss: valid_json, exact_match, json_field:<name> (the share of answers whose field is right)."""

    samples: Annotated[int, Field(ge=0)] = 5
    """Held-out examples to show with the model's answers."""

    max_new_tokens: Count = 128
    """Longest answer to generate, in tokens."""

    batch_size: Count = 32
    """Answers generated at a time."""


class TrainConfig(_Group):
    """Hold one whole run; groups have sections of their own."""

    model_name_or_path: Name | None = Field(default=None, examples=["meta-llama/Llama-3.2-3B-Instruct"])
    """Base model: a local folder where there is one of that name, else a Hugging Face Hub name."""

    revision: Name | None = Field(default=None, examples=["main"])
    """Branch, tag or commit of the base on the Hub."""

    adapter_name_or_path: Name | None = Field(default=None, examples=["outputs/run/final"])
    """Adapter to start from instead of a fresh one: a folder that twintune, PEFT or mlx-lm wrote."""

    engine: Literal["auto", "mlx", "torch"] = "auto"
    """What computes; auto takes MLX on Apple silicon, else torch, whichever is installed."""

    device: Literal["auto", "cuda", "mps", "cpu", "gpu"] = "auto"
    """Where the engine computes; auto takes the fastest there is."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of base weights and activations; LoRA weights are always float32. See `compute_dtype`."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Decides the initial adapter, the order of the data and dropout."""

    output_dir: Name = "outputs/run"
    """Folder for checkpoints, metrics and the final adapter."""

    run_name: Name | None = Field(default=None, examples=["first-try"])
    """Name of the run in reports."""

    report_to: Annotated[tuple[str, ...], BeforeValidator(as_reporters)] = ()
    """Trackers to send metrics to: tensorboard, wandb, trackio, mlflow, several of them, or none.

    metrics.jsonl is always written.
    """

    max_seq_length: Count = 2048
    """Longest example, in tokens; `data.truncation` says what happens to longer ones."""

    packing: bool = False
    """Fill each row of `max_seq_length` tokens with as many whole examples as fit; none sees another."""

    group_by_length: bool = False
    """Make each batch of examples of like length, so that less is padding."""

    per_device_train_batch_size: Count = 8
    """Examples of one micro-batch on each device; with `packing`, rows of examples."""

    per_device_eval_batch_size: Count = 8
    """Examples of one evaluation batch on each device."""

    gradient_accumulation_steps: Count = 1
    """Micro-batches of one optimizer step."""

    num_train_epochs: NonNegative = 3.0
    """Passes over the training data, fractions allowed; `max_steps` above 0 overrules it."""

    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Optimizer steps of the whole run; -1 or 0 goes by `num_train_epochs`."""

    learning_rate: Positive = 2e-4
    """Peak learning rate."""

    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "linear"
    """How the learning rate falls after warmup: not at all, or to 0 in a line or a half cosine."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises from 0."""

    warmup_ratio: Fraction = 0.0
    """The same as a share of all steps."""

    weight_decay: NonNegative = 0.0
    """Decoupled decay of the LoRA weights (AdamW, arXiv:1711.05101)."""

    adam_beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""

    adam_beta2: Fraction = 0.999
    """Decay of AdamW's second moment."""

    adam_epsilon: Positive = 1e-8
    """Added outside the square root in AdamW's denominator."""

    max_grad_norm: NonNegative = 1.0
    """Global norm to which gradients are clipped; 0 never clips."""

    optim: Annotated[str, AfterValidator(known_optimizer)] = "adamw_torch"
    """Any name that means AdamW; each engine has one implementation of it."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    activation_offloading: bool = False
    """Keep what `gradient_checkpointing` keeps in the host's memory instead of the card's (torch on CUDA)."""

    torch_compile: bool | None = Field(default=None, examples=[False])
    """Whether torch compiles the decoder layers; null: on CUDA, where Triton is there. MLX compiles by itself."""

    fp16: bool | None = None
    """True: float16. False for both this and `bf16`, written out: float32."""

    bf16: bool | None = None
    """True: bfloat16."""

    max_nonfinite_steps: Annotated[int, Field(ge=0)] = 0
    """Updates that may be skipped for a non-finite gradient before the run stops; 0 stops at the first."""

    logging_steps: Count = 1
    """Optimizer steps between lines of metrics."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to compute the loss on `data.validation`."""

    eval_steps: Count = Field(default_factory=lambda values: values["logging_steps"])
    """Optimizer steps between evaluations; `logging_steps` where not written, as Hugging Face has it."""

    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to save a checkpoint; the final adapter is saved in any case."""

    save_steps: Count = 500
    """Optimizer steps between checkpoints."""

    save_total_limit: Count | None = Field(default=None, examples=[2])
    """Newest checkpoints to keep, beside the best one where it is wanted; null keeps all."""

    save_minutes: NonNegative = 0.0
    """Minutes between checkpoints that are saved beside those of `save_strategy`, at the end of a step; 0 for none."""

    load_best_model_at_end: bool = False
    """Ship the weights with the best metric rather than the last; each new best is saved at once."""

    metric_for_best_model: Annotated[str, AfterValidator(known_best_metric)] = "eval_loss"
    """What "best" means: eval_loss, the lowest validation loss."""

    early_stopping_patience: Count | None = Field(default=None, examples=[3])
    """Evaluations in a row without a better metric after which the run ends; with it the best checkpoint is kept."""

    data: DataConfig = Field(default_factory=DataConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        """Refuse keys that contradict one another."""
        found = list(conflicts(self))
        if found:
            text = "\n".join(f"{conflict.keys[0]}: {conflict.message}" for conflict in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": found})
        return self

    @property
    def row_capacity(self) -> int | None:
        """Give the positions of a packed row, None where a row is one example."""
        return self.max_seq_length if self.packing else None

    @property
    def compute_dtype(self) -> Literal["auto", "float32", "bfloat16", "float16"]:
        """Give the dtype of base and activations; auto: the engine's choice (CUDA bfloat16, CPU float32).

        `fp16: false` and `bf16: false` both written out ask for float32: such configs mean just that.
        """
        if self.fp16 or self.bf16:
            return "float16" if self.fp16 else "bfloat16"
        if self.fp16 is False and self.bf16 is False:
            return "float32"
        if self.dtype == "auto" and self.quantization.load_in_4bit and self.quantization.compute_dtype:
            return self.quantization.compute_dtype
        return self.dtype

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved config in JSON's types, for training_config.json.

        No key holds a secret: tokens come from the environment. One that ever does is to be left out here.
        """
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "training_config.json") -> TrainConfig:
        """Build a config from what `to_dict` gave; raises UserError that names `source`."""
        return validated(cls, ConfigInput(dict(values), source, {}))


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML or JSON config and lay `key.sub=value` overrides over it.

    Raises UserError with all problems at once, one a line: `train.yaml: lora.r: found ...; expected ...`.
    """
    groups = [key for key, schema in known_keys(TrainConfig).items() if "properties" in schema]
    return validated(TrainConfig, apply_overrides(str(path), read_config_file(path), overrides, groups))


def require_trainable(config: TrainConfig, source: str | Path) -> str:
    """Return the name of the base; raises UserError that lists what a training run lacks, as a config may."""
    lines = []
    if not config.model_name_or_path:
        lines.append("model_name_or_path: missing; add the base to train, e.g. meta-llama/Llama-3.2-3B-Instruct")
    if not config.data.train:
        lines.append("data.train: missing; add the file of examples, e.g. data/train.jsonl")
    if lines or not config.model_name_or_path:
        raise UserError("\n".join(f"{source}: {line}" for line in lines))
    return config.model_name_or_path


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences of two `to_dict`s that forbid a resume, as `lora.r: 16 -> 8`.

    A key that one side lacks (an older version wrote it) counts as its default.
    """
    return differences_for_resume(old, new, TrainConfig().to_dict())
