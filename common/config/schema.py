"""The config's JSON schema for editors: keys completed and explained while they are typed, mistakes underlined.

It is pydantic's own, widened by what the checks let pass besides: one item where a list is meant, and null for any key.
configs/config.schema.json is a copy of it, which a test keeps up to date.
"""

from __future__ import annotations

from typing import Any

from common.config import TrainConfig

SHOWN_BY_EDITORS = ("description", "default", "examples")


def config_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a config file."""
    schema = TrainConfig.model_json_schema()
    for group in (schema, *schema["$defs"].values()):
        group["properties"] = {name: _as_written(field) for name, field in group["properties"].items()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "twintune config"}


def _as_written(field: dict[str, Any]) -> dict[str, Any]:
    """Allow a key what a person may write for it."""
    shown = {name: field[name] for name in SHOWN_BY_EDITORS if name in field}
    rest = {name: value for name, value in field.items() if name not in (*SHOWN_BY_EDITORS, "title")}
    branches = rest.get("anyOf", [rest])
    single = [branch["items"] for branch in branches if branch.get("type") == "array"]
    return {**shown, "anyOf": [*single, *(each for each in branches if each != {"type": "null"}), {"type": "null"}]}
