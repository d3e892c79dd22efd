"""The keys of a run that are in no group, the groups, and how a config is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from common.config.conflicts import conflicts
from common.config.data import DataConfig
from common.config.errors import ConfigInput, known_keys, validated
from common.config.evaluation import EvaluationConfig
from common.config.file import apply_overrides, read_config_file
from common.config.group import Count, Fraction, Group, Name, NonNegative, Positive, as_texts
from common.config.lora import LoraConfig
from common.config.quantization import QuantizationConfig
from common.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def as_reporters(value: Any) -> tuple[str, ...]:
    """Check the names of trackers, and turn Hugging Face's "none" into the empty tuple."""
    names = tuple(dict.fromkeys(name for name in as_texts(value) if name != "none"))
    for name in names:
        if name == "all":
            raise ValueError(f"it would depend on what is installed; name them: {', '.join(TRACKERS)}")
        if name not in TRACKERS:
            raise ValueError(f"{name} is not among {', '.join(TRACKERS)}, none")
    return names


def known_optimizer(value: str) -> str:
    """Accept the names that mean AdamW, the one optimizer here."""
    if value in ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_hf", "adamw_mlx"):
        return value
    raise ValueError("the only optimizer here is AdamW with float32 moments of the adapter; write adamw_torch")


def known_best_metric(value: str) -> str:
    """Accept the names of the one metric that is computed while training."""
    if value in ("eval_loss", "loss"):
        return "eval_loss"
    raise ValueError("the only metric computed while training is the loss on data.validation; write eval_loss")


class TrainConfig(Group):
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

    prefix_sharing: bool = False
    """With `packing`, compute a beginning that a row's examples share (a system prompt) once: the same loss, sooner."""

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
    """Keep what `gradient_checkpointing` keeps, and attention's result, in the host's memory (torch on CUDA)."""

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
        """Give the dtype of base and activations; auto: the engine's choice (CUDA half, CPU float32).

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
