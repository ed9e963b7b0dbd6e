"""The methods by name: each turns (task ids, input) into a prompt; one file each, loaded when first used.

Third parties add theirs through the entry point group `softprompts.methods` (name = "module:Class").
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from softprompts.config import ConfigError, closest
from softprompts.prompt import Group, Method, Slot, Start

METHODS: dict[str, str] = {
    "prompt-tuning": "softprompts.methods.prompt_tuning:PromptTuning",
    "multitask-prompt-tuning": "softprompts.methods.multitask:MultitaskPromptTuning",
    "attempt": "softprompts.methods.attempt:Attempt",
    "dept": "softprompts.methods.dept:DePT",
    "spt-reconstruction": "softprompts.methods.spt:SemiParametric",
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
        method: Any = kind(config, slot, start)
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from None
    if start.state:
        _take_up(name, method, start.state)
    return method


def _take_up(name: str, method: Any, state: Mapping[str, Any]) -> None:
    """Put tensors of the same method, trained before for one task, in the place of its own, for every task alike.

    What the method has beyond them keeps its own start. Raises ConfigError for tensors that it does not have.
    """
    lists: tuple[str, ...] = getattr(method, "per_task", ())
    own = method.state_dict()
    for key, value in state.items():
        owner, _, _ = key.partition(".")
        places = [f"{owner}.{i}" for i in range(len(method.slot.tasks))] if owner in lists else [key]
        for place in places:
            if place not in own or own[place].shape != value.shape:
                held = f"one of {list(own[place].shape)}" if place in own else f"none; it has {', '.join(own)}"
                raise ConfigError(
                    f"init.state: the trained prompt has a tensor '{key}' of {list(value.shape)} and method {name} "
                    f"{held}; give a prompt of the same method and options"
                )
            own[place] = value
    method.load_state_dict(own)


def groups(method: Any) -> Mapping[str, Group]:
    """The method's parameters by groups that may have learning rates of their own; one of all where it names none."""
    return getattr(method, "groups", {"prompt": Group(("",))})


def state_of(method: Any, task: str) -> dict[str, Any]:
    """The tensors that the method holds for `task`, as the same method made for that task alone would hold them."""
    lists: tuple[str, ...] = getattr(method, "per_task", ())
    index = str(method.slot.tasks.index(task))
    found: dict[str, Any] = {}
    for name, value in method.state_dict().items():
        owner, _, place = name.partition(".")
        if owner not in lists:
            found[name] = value
        elif place == index:
            found[f"{owner}.0"] = value
    return found


def shares(method: Any) -> bool:
    """Whether the method's tasks have parameters in common, beside those of their own."""
    lists: tuple[str, ...] | None = getattr(method, "per_task", None)
    return lists is not None and any(name.partition(".")[0] not in lists for name, _ in method.named_parameters())
