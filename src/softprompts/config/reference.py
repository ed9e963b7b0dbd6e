"""Every key of a configuration with its type, default and help, and a JSON schema for editors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from softprompts.config.old_keys import section_in
from softprompts.config.schema import Run, Section

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: The dotted path, as `--set` takes it; `[]` stands for an index and `<name>` for a name.
        type: What values are allowed, in words.
        default: The default as it is written in YAML; empty where the key must be given.
        help: What the key means.
    """

    path: str
    type: str
    default: str
    help: str


def list_keys(model: type[BaseModel] = Run) -> list[Key]:
    """The keys of a section and of the sections inside it, in their order.

    A section of a class that was listed before has one line, whose default is what differs there.
    """
    keys: list[Key] = []
    schema = model.model_json_schema()
    _list_section(schema, schema.get("$defs", {}), "", {}, {}, keys)
    return keys


def key_help(path: str) -> str:
    """The help of a key of a run, such as `training.max_steps`."""
    *sections, name = path.split(".")
    owner: type[Section] = Run
    for key in sections:
        inside = section_in(owner.model_fields[key].annotation)
        assert inside is not None
        owner = inside
    return str(owner.model_fields[name].description)


def json_schema(model: type[BaseModel] = Run, options: Mapping[str, type[BaseModel]] | None = None) -> dict[str, Any]:
    """A JSON schema of a section, for editors that complete and check YAML.

    Args:
        model: The class of the section.
        options: The class of each method's options, which `prompt.options` must then follow.
    """
    schema = model.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    definitions = schema.get("$defs", {})
    if model is Run:
        schema["properties"]["task"] = {"$ref": "#/$defs/TaskConfig", "description": "The only task."}
    for name, kind in (options or {}).items() if "PromptConfig" in definitions else ():
        inside = kind.model_json_schema()
        definitions.update(inside.pop("$defs", {}))
        rule = {
            "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
            "then": {"properties": {"options": inside}},
        }
        definitions["PromptConfig"].setdefault("allOf", []).append(rule)
    return schema


def _list_section(
    section: Mapping[str, Any],
    definitions: Mapping[str, Any],
    prefix: str,
    defaults: Mapping[str, Any],
    listed: dict[str, str],
    keys: list[Key],
) -> None:
    """Add the keys of a section.

    Args:
        section: The section's JSON schema.
        definitions: The schemas of the sections inside it, by class.
        prefix: What precedes the section's own keys, with the dot.
        defaults: Defaults that this section has and others of its class do not.
        listed: The path of the first section of each class, which is added to.
        keys: The keys so far, which are added to.
    """
    for name, field in section.get("properties", {}).items():
        path, help_text = f"{prefix}{name}", " ".join(str(field.get("description", "")).split())
        required = name in section.get("required", ()) and name not in defaults
        default = defaults.get(name, field.get("default"))
        title, suffix = _section_of(field)
        if title is None:
            keys.append(Key(path, _type(field), "" if required else _written(default), help_text))
            continue
        own = default if isinstance(default, Mapping) else {}
        if title in listed:
            differs = None if default is None else _without_defaults(own, definitions[title])
            kind = f"{'list of ' if suffix == '[]' else ''}as {listed[title]}"
            keys.append(Key(path, kind, "" if required or suffix else _written(differs), help_text))
            continue
        listed[title] = f"{path}{suffix}"
        if suffix or default is None:
            written = "null" if default is None and not suffix else ""
            keys.append(Key(path, _type(field), written, help_text))
        _list_section(definitions[title], definitions, f"{path}{suffix}.", own, listed, keys)


def _without_defaults(values: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the defaults of the section's class."""
    fields = section["properties"]
    return {name: value for name, value in values.items() if value != fields[name].get("default")}


def _section_of(field: Mapping[str, Any]) -> tuple[str | None, str]:
    """The section class that a field holds, and what its keys have between the field's path and their names."""
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1], ""
    for part in (*field.get("anyOf", ()), *field.get("allOf", ())):
        title, suffix = _section_of(part)
        if title is not None:
            return title, suffix
    for key, suffix in (("items", "[]"), ("additionalProperties", ".<name>")):
        if isinstance(field.get(key), Mapping):
            title, _ = _section_of(field[key])
            if title is not None:
                return title, suffix
    return None, ""


def _type(field: Mapping[str, Any]) -> str:
    """What values a field allows, in words."""
    if "anyOf" in field:
        return " | ".join(map(_type, field["anyOf"]))
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "$ref" in field:
        return "section"
    kind = field.get("type", "any")
    if kind == "array":
        items = field["prefixItems"] if "prefixItems" in field else [field["items"]]
        return f"list of {_grouped(', '.join(dict.fromkeys(map(_type, items))))}"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_grouped(_type(values))}" if isinstance(values, Mapping) else "mapping"
    words = {"string": "text", "boolean": "true | false"}
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([words.get(kind, kind), *bounds[:1]])


def _grouped(words: str) -> str:
    return f"({words})" if " | " in words else words


def _written(value: Any) -> str:
    """A default as YAML shows it."""
    plain = isinstance(value, str) and value and value == value.strip()
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
