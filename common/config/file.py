"""Read a config file and lay `--set` overrides over it: text into one plain dict.

The cost is our own YAML rules: the scalars of YAML 1.2, because those of YAML 1.1 turn `eval_strategy: no`
into false and leave `1e-3` a string. The parsers are imported when first needed.
"""

import copy
import json
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common.config.errors import ConfigInput, found_text
from common.errors import UserError


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a .yaml, .yml or .json file (comments and trailing commas allowed) into a dict.

    Raises UserError where the file can't be read or parsed, holds a key twice, or holds no keys.
    """
    parsers = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json}
    parse = parsers.get(path.suffix.lower())
    if os.path.isdir(path):  # unlike Path's, never raises
        raise UserError(f"{path}: is a folder; expected a config file; write e.g. {path / 'train.yaml'}")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file (looked from {Path.cwd()}); check the path given to --config")
    if parse is None:
        raise UserError(f"{path}: found a file named *{path.suffix}; expected .yaml, .yml or .json")
    text = _read_text(path)
    try:
        values = parse(text)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a config has groups of one level") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if values is None:
        raise UserError(f"{path}: is empty; expected keys and values; configs/quickstart.yaml is an example")
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {found_text(values)}; expected keys and values, e.g. learning_rate: 2e-4")
    return values


def _read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without the byte order mark that Windows editors write."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: not UTF-8 text; save the file with the UTF-8 encoding") from None


def _parse_yaml(text: str) -> Any:
    """Parse one YAML document by YAML 1.2's scalar rules; raise ValueError with line and column."""
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise ValueError(f"{at}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _yaml_loader() -> Any:
    """Make a safe loader that knows null, true/false, decimal numbers and text, and refuses repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (drops YAML 1.1's rules for this class only)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            mapping: dict[Hashable, Any] = {}
            for key_node, value_node in node.value:
                key, at = key_node.value, key_node.start_mark
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ValueError(f"line {at.line + 1}, column {at.column + 1}: a key must be plain text")
                if key in mapping:
                    raise ValueError(f"line {at.line + 1}: {key}: written twice in one group; keep one")
                mapping[key] = self.construct_object(value_node, deep=deep)
            return mapping

    number = r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
    rules = {
        "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
        "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
        "int": ("[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
        "float": (number, list("-+.0123456789")),
    }
    for tag, (pattern, first) in rules.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    return Loader


def _parse_json(text: str) -> Any:
    """Parse JSON, or JSON5 where it isn't plain; raise ValueError with line and column."""
    if not text.strip():
        return None
    try:
        return json.loads(text, object_pairs_hook=_unique_pairs)
    except json.JSONDecodeError:
        import json5  # 11 ms, and slow: only for files with comments or trailing commas
    try:
        return json5.loads(text, object_pairs_hook=_unique_pairs)
    except ValueError as error:
        found = re.match(r"<string>:(\d+) (.*?)(?: at column (\d+))?$", str(error), re.DOTALL)
        if not found:
            raise
        line, problem, column = found.groups()
        raise ValueError(f"line {line}, column {column or 1}: not valid JSON: {problem}") from None


def _unique_pairs(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raise ValueError where a key comes twice."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name}: written twice in one group; keep one")
        values[name] = value
    return values


def apply_overrides(
    source: str, values: dict[str, Any], overrides: Sequence[str], groups: Iterable[str]
) -> ConfigInput:
    """Lay `key.sub=value` options over a file's values, the last one of a key winning.

    A value is YAML: a number, true, text, a list; nothing at all means the default. What is no
    `key=value`, doesn't parse, or replaces a whole group becomes one of the problems.
    """
    given = ConfigInput(copy.deepcopy(values), source, {})
    problems = [problem for option in overrides for problem in _apply_override(given, option, set(groups))]
    return given._replace(problems=tuple(problems))


def _apply_override(given: ConfigInput, option: str, groups: set[str]) -> list[str]:
    """Set one option in `given`; return what is wrong with it."""
    key, equals, text = (part.strip() for part in option.partition("="))
    label = f"--set {option}"
    if not equals or not all(key.split(".")):
        return [f"{label}: expected key=value; write e.g. --set lora.r=16"]
    if key in groups:
        return [f"{label}: {key} is a group; set its keys one by one, e.g. --set lora.r=16"]
    try:
        value = _parse_yaml(text)
    except (ValueError, RecursionError):
        return [f"{label}: the value isn't valid YAML; put text in quotes, e.g. --set 'run_name=\"a: b\"'"]
    *parents, leaf = key.split(".")
    inside, path = given.values, ""
    for parent in parents:
        path = f"{path}.{parent}".lstrip(".")
        if inside.get(parent) is None:
            inside[parent] = {}
            given.overridden.setdefault(path, label)
        inside = inside[parent]
        if not isinstance(inside, dict):
            return [f"{label}: {given.source} has {path}: {found_text(inside)}, which holds no keys"]
    inside[leaf] = value
    given.overridden[key] = label
    return []
