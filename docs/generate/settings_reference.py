"""Reference of all settings, written from the JSON schema of `ExperimentConfig`."""

import json
from collections.abc import Mapping
from typing import Any

from linflab.platform.config.experiment import ExperimentConfig

INTRODUCTION = """# Settings

A recipe sets these by section; an override changes one by its dotted path, as in `model.width=128`. Rates, fractions
and radii can be fractions such as `8/255`. eps, theta and radii are for pixel values in [0, 1]. `linflab schema recipe`
prints the JSON schema from which this page is written.
"""
LIMITS = {"minimum": "≥", "ge": "≥", "exclusiveMinimum": ">", "gt": ">", "maximum": "≤", "le": "≤",
          "exclusiveMaximum": "<", "lt": "<"}  # fmt: skip


def settings_page() -> str:
    """Return the page of all settings: one table per section, and one per kind of network and objective."""
    document = ExperimentConfig.model_json_schema()
    definitions = document["$defs"]
    sections = {name: field for name, field in document["properties"].items() if _is_section(field)}
    plain = {name: field for name, field in document["properties"].items() if name not in sections}
    text = INTRODUCTION + "\n## Experiment\n\n" + _table("", plain, document.get("required", ()))
    for name, field in sections.items():
        text += f"\n## {name}\n\n" + _section(name, field, definitions)
    return text


def _section(path: str, field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "discriminator" not in field:
        definition = definitions[field["$ref"].rsplit("/", 1)[1]]
        nested = {name: one for name, one in definition["properties"].items() if _is_section(one)}
        plain = {name: one for name, one in definition["properties"].items() if name not in nested}
        text = f"{definition.get('description', '').strip()}\n\n" + _table(path, plain, definition.get("required", ()))
        for name, one in nested.items():
            text += f"\n### {path}.{name}\n\n" + _section(f"{path}.{name}", one, definitions)
        return text
    text = f"`{path}.kind` selects one of these:\n"
    for kind, reference in field["discriminator"]["mapping"].items():
        definition = definitions[reference.rsplit("/", 1)[1]]
        fields = dict(definition["properties"])
        description = fields.pop("kind")["description"]
        text += f"\n### {path}.kind={kind}\n\n{description[0].upper()}{description[1:]}.\n\n"
        text += _table(path, fields, definition.get("required", ())) if fields else ""
    return text


def _is_section(field: Mapping[str, Any]) -> bool:
    return "$ref" in field or "discriminator" in field


def _table(path: str, fields: Mapping[str, Any], required: Any) -> str:
    from reference import markdown_table

    prefix = f"{path}." if path else ""
    rows = [
        (
            f"`{prefix}{name}`",
            _values(field),
            "required" if name in required else f"`{_default(field.get('default'))}`",
            field.get("description", "").replace("<", "&lt;"),
        )
        for name, field in fields.items()
    ]
    return markdown_table(("Setting", "Values", "Default", "Meaning"), rows)


def _default(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_default(one)}" for key, one in value.items())
    return json.dumps(value)


def _values(field: Mapping[str, Any]) -> str:
    """Return the type of a setting with its limits, as text."""
    if "discriminator" in field:
        return "section: " + ", ".join(f"`{kind}`" for kind in field["discriminator"]["mapping"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    choices = field.get("anyOf", [field])
    types = [_type(choice) for choice in choices if "pattern" not in choice]
    limits = [
        f"{sign} {bound:g}" for source in (field, *choices) for key, sign in LIMITS.items()
        if isinstance(bound := source.get(key), int | float) and bound < 2**63
    ]  # fmt: skip
    return ", ".join([" or ".join(dict.fromkeys(types)), *dict.fromkeys(limits)])


def _type(field: Mapping[str, Any]) -> str:
    if field.get("type") == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_values(items)}"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    return {"string": "text", "boolean": "`true` or `false`", "null": "`null`"}.get(
        field.get("type", ""), field.get("type", "any")
    )
