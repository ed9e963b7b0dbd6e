"""The methods by name: each turns (task ids, input) into a prompt; one file each, loaded when first used.

Third parties add theirs through the entry point group `softprompts.methods` (name = "module:Class").
"""

import importlib
from importlib.metadata import entry_points

from softprompts.config import ConfigError, closest
from softprompts.prompt import Method

METHODS: dict[str, str] = {
    "prompt-tuning": "softprompts.methods.prompt_tuning:PromptTuning",
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
