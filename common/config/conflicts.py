"""Keys of the config that contradict each other, though each is well-formed by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.config.errors import Conflict, found_text
from common.config.quantization import MLX_MODES, complete_format

if TYPE_CHECKING:
    from common.config.quantization import LayerFormat
    from common.config.train import TrainConfig


def conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Yield every contradiction between keys that are well-formed each by itself."""
    yield from _dtype_conflicts(config)
    yield from _quantization_conflicts(config)
    yield from _best_conflicts(config)
    yield from _expert_conflicts(config)
    if config.adapter_name_or_path and config.lora.init_lora_weights is not True:
        yield Conflict(
            ("lora.init_lora_weights", "adapter_name_or_path"),
            f"found {config.lora.init_lora_weights}, but adapter_name_or_path says where the adapter starts; "
            "write init_lora_weights: true",
        )
    if config.warmup_steps and config.warmup_ratio:
        yield Conflict(("warmup_ratio", "warmup_steps"), "warmup_steps is set too; keep one of them")
    if config.max_steps <= 0 and config.num_train_epochs <= 0:
        yield Conflict(
            ("num_train_epochs", "max_steps"),
            f"found 0 with max_steps: {config.max_steps}: trains nothing; write e.g. num_train_epochs: 3",
        )
    if config.activation_offloading and not config.gradient_checkpointing:
        yield Conflict(
            ("activation_offloading", "gradient_checkpointing"),
            "found true, but only what gradient_checkpointing keeps is moved; write gradient_checkpointing: true too",
        )
    if config.packing and config.group_by_length:
        yield Conflict(
            ("group_by_length", "packing"),
            "packing is set too, which leaves no padding to save; write group_by_length: false",
        )
    if config.prefix_sharing and not config.packing:
        yield Conflict(
            ("prefix_sharing", "packing"),
            "found true, but only examples of one row share a beginning; write packing: true too",
        )
    if config.data.validation_split and config.data.validation:
        yield Conflict(
            ("data.validation_split", "data.validation"),
            f"found {config.data.validation_split:g}, but data.validation is set too; keep one of them",
        )
    if config.eval_strategy != "no" and not config.data.validation and not config.data.validation_split:
        yield Conflict(
            ("eval_strategy", "data.validation"),
            f"found {config.eval_strategy} without data.validation; add it, or write eval_strategy: no",
        )


def _expert_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Refuse beside adapted experts what PEFT can't do for them: they are parameters, not modules."""
    lora = config.lora
    wishes = (
        ("lora.lora_dropout", f"{lora.lora_dropout:g}", lora.lora_dropout > 0, "0"),
        ("lora.use_dora", "true", lora.use_dora, "false"),
        ("lora.init_lora_weights", str(lora.init_lora_weights), lora.init_lora_weights is not True, "true"),
    )
    for key, value, wished, instead in wishes:
        if lora.target_parameters and wished:
            name = key.removeprefix("lora.")
            yield Conflict(
                (key, "lora.target_parameters"),
                f"found {value}, which PEFT can't do for target_parameters; write {name}: {instead}, or leave them out",
            )


def _dtype_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Compare the ways to name the dtype of a run: all that are written must agree."""
    wishes = _dtype_wishes(config)
    if not wishes:
        return
    first_key, first_value, first_dtype = wishes[0]
    other = f"which contradicts {first_key}: {first_value}; keep one of them"
    for key, value, dtype in wishes[1:]:
        if dtype != first_dtype:
            yield Conflict((key, first_key), f"found {value}, {other}")
            return
    for flag, state, dtype in (("fp16", config.fp16, "float16"), ("bf16", config.bf16, "bfloat16")):
        if state is False and first_dtype == dtype:
            yield Conflict((flag, first_key), f"found false, {other}")


def _dtype_wishes(config: TrainConfig) -> list[tuple[str, str, str]]:
    """List each request for a dtype as key, value as written, dtype meant."""
    wishes: list[tuple[str, str, str]] = []
    nested = config.quantization.compute_dtype
    if config.dtype != "auto":
        wishes.append(("dtype", config.dtype, config.dtype))
    if config.quantization.load_in_4bit and nested:
        wishes.append(("quantization.compute_dtype", nested, nested))
    if config.fp16 is False and config.bf16 is False:
        wishes.append(("fp16", "false with bf16: false", "float32"))
    if config.fp16:
        wishes.append(("fp16", "true", "float16"))
    if config.bf16:
        wishes.append(("bf16", "true", "bfloat16"))
    return wishes


def _quantization_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Allow one way to quantise, and no setting of a way that isn't chosen unless it has a default."""
    group = config.quantization
    ways = {
        "quantization.load_in_4bit": group.load_in_4bit,
        "quantization.load_in_8bit": group.load_in_8bit,
        "quantization.bits": group.bits is not None,
        "quantization.mode": group.mode is not None and group.bits is None,
    }
    chosen = tuple(key for key, is_set in ways.items() if is_set)
    if len(chosen) > 1:
        yield Conflict(chosen, f"{' and '.join(chosen)} are different ways to quantise the base; keep one")
    for name, value in (("group_size", group.group_size), ("overrides", group.overrides)):
        if value and not group.mlx_format:
            yield Conflict(
                (f"quantization.{name}", "quantization.bits"),
                f"found {found_text(value)} without quantization.bits; write bits: 4 too, or delete {name}",
            )
    yield from _format_conflicts("quantization", group, None)
    for key, own in group.overrides.items():
        if own:
            yield from _format_conflicts(f"quantization.overrides.{key}", own, group)


def _format_conflicts(where: str, own: LayerFormat, above: LayerFormat | None) -> Iterator[Conflict]:
    """Refuse bits and group sizes that a mode lacks."""
    found = complete_format(own, above)
    mode, groups, bits = found["mode"], *MLX_MODES[found["mode"]]
    for name, allowed in (("group_size", groups), ("bits", bits)):
        if found[name] not in allowed:
            listed = " or ".join(map(str, allowed))
            yield Conflict((f"{where}.{name}",), f"found {found[name]} with mode: {mode}, which has {listed}")


def _best_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    """Ask for evaluations where the best is wanted, and, as transformers does, for checkpoints in the same rhythm."""
    patience, evaluation, saving = config.early_stopping_patience, config.eval_strategy, config.save_strategy
    if patience and evaluation == "no":
        yield Conflict(
            ("early_stopping_patience", "eval_strategy"),
            f"found {patience}, but eval_strategy is no; write eval_strategy: steps or epoch, or delete the line",
        )
    if not config.load_best_model_at_end:
        return
    if evaluation == "no":
        yield Conflict(
            ("load_best_model_at_end", "eval_strategy"),
            "found true, but eval_strategy is no; write eval_strategy: steps or epoch, or false",
        )
    elif evaluation != saving:
        yield Conflict(
            ("load_best_model_at_end", "save_strategy", "eval_strategy"),
            f"found true, but save_strategy is {saving} and eval_strategy {evaluation}; give both the same value",
        )
    elif evaluation == "steps" and config.save_steps % config.eval_steps:
        nearest = max(1, round(config.save_steps / config.eval_steps)) * config.eval_steps
        yield Conflict(
            ("load_best_model_at_end", "save_steps", "eval_steps"),
            f"found true, but save_steps: {config.save_steps} is no multiple of eval_steps: {config.eval_steps}; "
            f"write e.g. save_steps: {nearest}",
        )
