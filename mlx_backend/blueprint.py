"""What mlx-lm makes of a checkpoint: names, layouts and what is packed, found out over arrays that are never read.

mlx-lm builds the model, lays out the checkpoint's tensors and chooses what to quantise; MLX's arrays are lazy, so all
of that costs no memory. What its model would leave out is refused.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from common.config import QuantizationConfig
from common.convert.source import FolderSource, Source
from common.errors import UserError
from mlx_backend.dialect import translated
from mlx_backend.names import followed_classes

# Parts of models that see or hear, by the key of config.json; mlx-lm has the text model alone.
TOWERS = ("vision_config", "audio_config")


def lay_out(source: Source) -> tuple[nn.Module, dict[str, tuple[str, ...]]]:
    """Build mlx-lm's model of a checkpoint, unread; returns it with the tensors that each parameter is a stack of.

    A tensor that is a parameter as it stands is a stack of one; what mlx-lm computes in another way has no entry.
    Raises UserError for a model that mlx-lm lacks, or where that other way is closed, as the source is no folder.
    """
    config = {**source.config, **translated(source.config)}
    tensors = _lazy(source)
    try:
        model_class, arguments = followed_classes(config)
        model = model_class(arguments.from_dict(config))
        laid_out = model.sanitize(dict(tensors))
        model.load_weights(list(laid_out.items()))
    except (ValueError, KeyError, TypeError, AttributeError, SystemExit) as error:  # OLMo 1 exits without its package
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source.path}: mlx-lm can't lay out this model (model_type {config['model_type']}): {reason}"
        ) from None
    names = {id(tensor): name for name, tensor in tensors.items()}
    origins = {path: (names[id(array)],) for path, array in laid_out.items() if id(array) in names}
    if origins.keys() < laid_out.keys():
        stacks = _stacks(model, source)
        shapes = {path: (len(parts), *source.shapes[parts[0]]) for path, parts in stacks.items()}
        origins |= {
            path: stacks[path] for path in laid_out.keys() - origins if laid_out[path].shape == shapes.get(path)
        }
    if not isinstance(source, FolderSource) and (made := sorted(laid_out.keys() - origins.keys())):
        raise UserError(
            f"{source.path}: mlx-lm computes {made[0]} (and {len(made) - 1} more) from tensors that it can read in a "
            "Hugging Face folder only: write one with --to hf, then convert that to mlx"
        )
    return model, origins


def _stacks(model: nn.Module, source: Source) -> dict[str, tuple[str, ...]]:
    """Find which parameters are stacks of tensors, by laying out tiny tensors that each hold a number of their own.

    Their two columns tell a transposed one, and their numbers one that was added to.
    """
    names = list(source.shapes)
    marks = {
        name: mx.array([4 * number + 2.5, -4 * number - 2.5]).reshape([*[1] * (len(source.shapes[name]) - 1), 2])
        for number, name in enumerate(names)
    }
    try:
        laid_out = {path: np.array(array) for path, array in model.sanitize(marks).items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        return {}  # it cuts or reshapes tensors by sizes that these have not
    found = {}
    for path, array in laid_out.items():
        numbers = (array.reshape(-1, array.shape[-1])[:, 0] - 2.5) / 4
        if not (np.isin(numbers, np.arange(len(names))).all() and array.shape[-1] == 2):
            continue
        parts = tuple(names[int(number)] for number in numbers)
        if np.array_equal(array, np.stack([np.array(marks[part]) for part in parts])):
            found[path] = parts
    return found


def _lazy(source: Source) -> dict[str, mx.array]:
    """Give mlx-lm the tensors: those of a folder unread, others as zeros that stand for them."""
    if isinstance(source, FolderSource):
        files = sorted({source.tensors.path(name) for name in source.tensors})
        return {name: array for path in files for name, array in mx.load(str(path)).items()}
    return {name: mx.zeros(shape, getattr(mx, source.dtypes[name])) for name, shape in source.shapes.items()}


def refuse_dropped(source: Source, model: nn.Module, origins: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError where mlx-lm's model has fewer numbers than the checkpoint, but for what it computes anew."""
    unused = sorted(source.shapes.keys() - {name for parts in origins.values() for name in parts})
    tied = source.config.get("tie_word_embeddings", False)
    anew = {name for name in unused if name.endswith("inv_freq") or (tied and name.endswith("lm_head.weight"))}
    wanted = sum(math.prod(shape) for name, shape in source.shapes.items() if name not in anew)
    lost = wanted - sum(array.size for _, array in tree_flatten(model.parameters()))
    if lost > 0:
        kinds = [key for key in TOWERS if source.config.get(key)] or [name for name in unused if name not in anew]
        raise UserError(
            f"{source.path}: mlx-lm has no place for {lost:,} of its numbers ({kinds[0]}), which would be lost; "
            "expected a model of text alone"
        )


def quantize_as_asked(model: nn.Module, quantization: QuantizationConfig, source: Source) -> dict[str, Any]:
    """Let mlx-lm pack a model's layers, or what `overrides` say of them; returns what its config.json tells of it.

    Raises UserError for an override that names nothing, and for rows that are no whole groups.
    """
    default, own = quantization.mlx_format, getattr(model, "quant_predicate", None)
    assert default is not None
    modules = {path: module for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    for key in quantization.overrides:
        if not any(f".{key}." in f".{path}." for path in modules):
            names = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in modules))
            raise UserError(f"--override {key}: no module of this model; its modules are {names}")

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if any(f".{key}." in f".{path}." for key in quantization.overrides):
            return quantization.mlx_format_of(path, by_default=False) or False
        return own(path, module) if own else True

    for path, module in modules.items():
        form, columns = predicate(path, module), module.weight.shape[-1]
        group = {**default, **(form if isinstance(form, dict) else {})}["group_size"]
        if form and columns % group:
            raise UserError(
                f"{source.path}: {path} has rows of {columns} weights, no multiple of {group}; leave it as it is with "
                f"convert's --override {path.rsplit('.', 1)[-1]}=false, or take a smaller --group-size"
            )
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does, and JSON may be wanted there
        _, config = quantize_model(model, {}, **default, quant_predicate=predicate)
    return dict(config["quantization"])


def words_for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json by which mlx-lm alone builds the right model; transformers reads its own."""
    words = translated(config)
    if scaling := words.get("rope_scaling"):  # in which the engine has put the short factors for the long ones
        words["rope_scaling"] = {**scaling, **(config.get("rope_scaling") or config.get("rope_parameters") or {})}
        words["rope_scaling"].pop("rope_theta", None)
    return words
