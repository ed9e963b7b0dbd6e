"""From YAML and `--set a.b=c` to checked sections; an error message names what is possible."""

import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from softprompts.config.old_keys import find_old_keys, section_in
from softprompts.config.schema import Run, Section
from softprompts.errors import ConfigError


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown word: `; did you mean 'x'?`, or `;` where no known word is close."""
    matches = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ";"


def parse(values: Mapping[str, Any], model: type[Section] = Run, origin: str = "configuration") -> Any:
    """A checked section.

    Args:
        values: What a user wrote.
        model: The class of the section.
        origin: How messages call the values, such as the name of their file.

    Raises:
        ConfigError: Unknown keys, each with the closest known one; keys of an earlier release, each with its name of
            today; wrong values, each with what is allowed.
    """
    if renames := find_old_keys(values, model):
        lines = [f"{origin}: unknown key '{old}'; it is called '{new}' now" for old, new in renames]
        raise ConfigError("; ".join(lines))
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [problem for problem in error.errors() if not _follows(problem, error.errors())]
        raise ConfigError("; ".join(_explain(problem, model, origin) for problem in problems)) from None


def read(path: str | Path, overrides: Iterable[str] = (), model: type[Section] = Run) -> Any:
    """The section in a YAML file.

    Args:
        path: The file.
        overrides: Changes, each as `section.key=value`.
        model: The class of the section.

    Raises:
        ConfigError: The file is missing or is not a YAML mapping; and as `parse` does.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, found {type(values).__name__}")
    return parse(override(values, overrides), model, str(path))


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` set. A value is read as YAML; a number in a path is the index of a list."""
    result = yaml.safe_load(yaml.safe_dump(dict(values)))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {item}: write it as section.key=value, for example training.max_steps=500")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}: the value is not YAML: {' '.join(str(error).split())}") from None
        assign(result, path.strip().split("."), value, f"--set {item}")
    return typing.cast(dict[str, Any], result)


def assign(node: Any, keys: list[str], value: Any, item: str) -> None:
    """Set a value at a path of nested values; sections that are missing are made.

    Args:
        node: The nested values, which are changed.
        keys: The path.
        value: The value.
        item: How messages call the change.

    Raises:
        ConfigError: The path leads through a value, or to no item of a list.
    """
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"{item}: '{key}' is not an index of a list of {len(node)}")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        else:
            raise ConfigError(f"{item}: '{'.'.join(keys[:depth])}' is a value, not a section")


def _follows(problem: Any, problems: Iterable[Any]) -> bool:
    """Whether a list is too short only because one of its items is wrong."""
    loc = problem["loc"]
    return problem["type"] == "too_short" and any(other["loc"][: len(loc)] == loc < other["loc"] for other in problems)


def _explain(error: Any, model: type[Section], origin: str) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        owner = _section_at(model, error["loc"][:-1])
        known = list(owner.model_fields) if owner else []
        key = str(error["loc"][-1])
        return f"{origin}: unknown key '{where}'{closest(key, known)} known: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = "" if isinstance(value, dict | list) or value is None else f" (given: {value!r}{_suggestion(value, error)})"
    return f"{origin}: {where}: {message}{shown}" if where else f"{origin}: {message}"


def _suggestion(value: Any, error: Any) -> str:
    """The closest allowed word to a wrong one."""
    expected = str(error.get("ctx", {}).get("expected", ""))
    options = [part.strip("' ") for part in expected.replace(" or ", ",").split(",")]
    return closest(value, options).removesuffix(";") if isinstance(value, str) and expected else ""


def _section_at(model: type[Section], loc: Iterable[Any]) -> type[Section] | None:
    """The section class at a pydantic error location, looking through optionals, lists and mappings."""
    current: type[Section] | None = model
    for part in loc:
        if current is None:
            return None
        field = current.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            current = section_in(field.annotation)
    return current
