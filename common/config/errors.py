"""Say what is wrong with a config in lines a person can act on: `where: key: found; expected; write`.

It knows no key of ours but the aliases below: names, limits and examples come from the model's own JSON
schema, so a new field needs no line here. The cost: the schema is built, but only once something is wrong.
"""

import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from common.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

_ALIASES = {
    "model_name_or_path": "model base_model model_name model_id model_path pretrained_model",
    "revision": "model_revision",
    "adapter_name_or_path": "adapter adapter_path resume_adapter_file",
    "engine": "backend framework",
    "dtype": "torch_dtype precision",
    "seed": "random_seed data_seed",
    "output_dir": "output out_dir save_dir",
    "max_seq_length": "max_length max_seq_len seq_length seq_len sequence_len cutoff_len model_max_length",
    "packing": "sample_packing",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accumulation grad_accum accumulation_steps",
    "num_train_epochs": "epochs num_epochs n_epochs train_epochs",
    "max_steps": "iters max_iters steps num_steps train_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
    "warmup_steps": "warmup num_warmup_steps",
    "max_grad_norm": "grad_clip clip_grad_norm gradient_clipping max_norm",
    "optim": "optimizer",
    "gradient_checkpointing": "grad_checkpoint use_gradient_checkpointing",
    "logging_steps": "steps_per_report log_every log_steps",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "steps_per_eval eval_every",
    "save_steps": "save_every",
    "early_stopping_patience": "patience",
    "data.train": "dataset dataset_name dataset_path datasets train_file train_data train_path",
    "data.validation": "validation_file val_file valid eval_dataset validation_data",
    "data.test": "test_file test_data",
    "data.train_on": "train_on_inputs mask_prompt",
    "lora.r": "lora_r lora_rank rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target_modules lora_target modules",
    "quantization.load_in_4bit": "qlora use_4bit",
    "quantization.quant_type": "bnb_4bit_quant_type",
    "quantization.use_double_quant": "bnb_4bit_use_double_quant double_quantization",
    "quantization.compute_dtype": "bnb_4bit_compute_dtype",
}
"""What other tools call our keys: suggested when met, never accepted."""


class Conflict(NamedTuple):
    """Hold one problem between well-formed values: the keys that take part, then what to write."""

    keys: tuple[str, ...]
    message: str


class ConfigInput(NamedTuple):
    """Hold raw values, their file, the option that set each overridden key, and problems already found."""

    values: dict[str, Any]
    source: str
    overridden: dict[str, str]
    problems: tuple[str, ...] = ()

    def line(self, keys: Sequence[str], text: str) -> str:
        """Write one line of an error, blaming the override where one of the keys has any."""
        for key in keys:
            while key:
                if key in self.overridden:
                    return f"{self.overridden[key]}: {text}"
                key = key.rpartition(".")[0]
        return f"{self.source}: {keys[0]}: {text}"


def validated(model: type[Model], given: ConfigInput) -> Model:
    """Build the model from raw values; raises UserError with every problem, one a line.

    Conflicts between keys are looked for among the well-formed values, so that they come with the rest.
    """
    errors: Sequence[Mapping[str, Any]] = []
    try:
        config = model.model_validate(given.values)
        if not given.problems:
            return config
    except ValidationError as error:
        errors = error.errors(include_url=False)
    keys = known_keys(model)
    lines: dict[str, str] = {}
    blamed: set[str] = set()
    good = copy.deepcopy(given.values)
    for problem in errors:
        if problem["type"] not in ("conflicts", "default_factory_not_called"):
            key, near, text = _explain(problem, keys)
            lines.setdefault(key, given.line([key], text))
            blamed |= {key, near}
            _remove(good, problem["loc"], keys)
    for conflict in _conflicts(model, good):
        if not blamed & set(conflict.keys):
            lines[f"{conflict}"] = given.line(conflict.keys, conflict.message)
    raise UserError("\n".join([*given.problems, *lines.values()]))


def _conflicts(model: type[BaseModel], values: Mapping[str, Any]) -> Sequence[Conflict]:
    """Return what the model's own check of well-formed values finds."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return error.errors(include_url=False)[0].get("ctx", {}).get("conflicts", [])
    return []


def known_keys(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Map each dotted key of a model and its groups to its JSON schema; only a group's has properties."""
    schema = model.model_json_schema()
    keys: dict[str, dict[str, Any]] = {}
    for name, field in schema["properties"].items():
        group = schema.get("$defs", {}).get(field.get("$ref", "").rpartition("/")[2])
        keys[name] = group or field
        for sub_name, sub_field in (group or {}).get("properties", {}).items():
            keys[f"{name}.{sub_name}"] = sub_field
    return keys


def _explain(problem: Mapping[str, Any], keys: Mapping[str, dict[str, Any]]) -> tuple[str, str, str]:
    """Return a pydantic error's key, the key that was perhaps meant, and what to say of it."""
    location = problem["loc"]
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        key = ".".join(map(str, location))
        near = suggest(key, keys)
        hint = f"did you mean {near}?" if near else "delete it, nothing here is like it"
        return key, near, f"unknown key; {hint}"
    key = _known_part(location, keys)
    if problem["type"] == "value_error":
        return key, "", f"found {found_text(problem['input'])}; {problem['ctx']['error']}"
    schema = keys[key]
    if "additionalProperties" in schema and (names := location[len(key.split(".")) :]):
        key, schema = f"{key}.{names[0]}", schema["additionalProperties"]
    text = f"found {found_text(problem['input'])}; expected {_expected(schema)}"
    example = next((e for e in [*schema.get("examples", []), schema.get("default")] if e), None)
    if example is None or "enum" in schema:
        return key, "", text
    shown = example if isinstance(example, str) else found_text(example)
    if isinstance(example, Mapping):
        shown = f"{{{', '.join(f'{name}: {value}' for name, value in example.items())}}}"
    return key, "", f"{text}; write e.g. {key.rpartition('.')[2]}: {shown}"


def _known_part(location: Sequence[str | int], keys: Mapping[str, Any]) -> str:
    """Cut what pydantic adds below a key: list indices, union branches."""
    two = ".".join(map(str, location[:2]))
    return two if two in keys else str(location[0])


def _remove(values: dict[str, Any], location: Sequence[str | int], keys: Mapping[str, Any]) -> None:
    """Delete what an error points at, so that a second look sees only good values."""
    group, sub_key = str(location[0]), str(location[1]) if len(location) > 1 else ""
    if "properties" in keys.get(group, {}) and sub_key:
        values[group].pop(sub_key, None)
    else:
        values.pop(group, None)


def suggest(key: str, keys: Iterable[str]) -> str:
    """Return the dotted key that an unknown one was perhaps meant to be, or an empty string.

    Looks at other tools' names first, then for the same name in another group, then for the nearest spelling.
    """
    known = list(keys)
    group, _, leaf = key.lower().replace("-", "_").rpartition(".")
    for target, aliases in _ALIASES.items():
        if leaf in aliases.split():
            return target
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    if leaf in by_leaf:
        return by_leaf[leaf]
    here = [name for name in known if name.rpartition(".")[0] == group]
    for nearby, cutoff in ((here, 0.65), (known, 0.75)):
        leaves = {name.rpartition(".")[2]: name for name in reversed(nearby)}
        near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff)
        if near:
            return leaves[near[0]]
    return ""


def _expected(schema: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(_expected(branch) for branch in schema["anyOf"] if branch.get("type") != "null")
    if "enum" in schema or "const" in schema:
        choices = [str(value) for value in schema.get("enum", [schema.get("const")])]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if "properties" in schema:
        return f"a group of keys ({', '.join(schema['properties'])})"
    if "additionalProperties" in schema:
        return f"a group of names, each with {_expected(schema['additionalProperties'])}"
    limits = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    bounds = " and ".join(f"{words} {schema[limit]}" for limit, words in limits.items() if limit in schema)
    if "items" in schema:
        return f"a list, each {_expected(schema['items'])}"
    noun = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list",
        "object": "a group of keys",
    }[schema["type"]]
    return f"{noun} {bounds}".strip()


def found_text(value: Any) -> str:
    """Show a value as it would be written in a config, shortened."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, list(value)[:4]))}}}, a group of keys"
    if isinstance(value, list | tuple):
        if len(value) > 4 or any(isinstance(item, list | tuple | dict) for item in value):
            return f"a list of {len(value)}"
        return f"[{', '.join(map(found_text, value))}]"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
