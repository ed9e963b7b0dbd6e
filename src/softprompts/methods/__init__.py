"""The methods by name: each turns (task ids, input) into a prompt; one file each, loaded when first used.

Third parties add theirs through the entry point group `softprompts.methods` (name = "module:Class").
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from softprompts.config import ConfigError, closest
from softprompts.prompt import Method, Slot, Start

METHODS: dict[str, str] = {
    "prompt-tuning": "softprompts.methods.prompt_tuning:PromptTuning",
    "attempt": "softprompts.methods.attempt:Attempt",
}


def names() -> tuple[str, ...]:
    """All methods that can be used here, third parties' included."""
    return (*METHODS, *sorted({e.name for e in entry_points(group="softprompts.methods")} - set(METHODS)))


def find(name: str) -> type[Method]:
    """The method called `name`.

    Raises ConfigError with the closest known name.
    """
    target = METHODS.get(name) or next((e.value for e in entry_points(group="softprompts.methods", name=name)), None)
    if target is None:
        raise ConfigError(f"unknown method '{name}'{closest(name, names())} known: {', '.join(names())}")
    module, _, attribute = target.partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found


def build(name: str, options: Mapping[str, Any], slot: Slot, start: Start) -> Any:
    """The method called `name` at its start, as its `options` say.

    Raises ConfigError for a name or options that are not known, and for what the method says against its start.
    """
    kind = find(name)
    try:
        config = kind.Config(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"prompt.options of method {name}: {error}") from None
    try:
        return kind(config, slot, start)
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from None
