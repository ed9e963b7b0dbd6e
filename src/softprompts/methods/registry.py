"""The methods by name: each turns (task ids, input) into a prompt; one file each, loaded when first used.

Third parties add theirs through the entry point group `softprompts.methods` (name = "module:Class").
"""

import contextlib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from softprompts.config import closest
from softprompts.errors import ConfigError
from softprompts.types import Method, ParamGroup, PromptInit, PromptSpec

METHODS: dict[str, str] = {
    "prompt-tuning": "softprompts.methods.prompt_tuning:PromptTuning",
    "multitask-prompt-tuning": "softprompts.methods.multitask:MultitaskPromptTuning",
    "attempt": "softprompts.methods.attempt:Attempt",
    "ipt": "softprompts.methods.ipt:InstancePromptTuning",
    "idpg": "softprompts.methods.idpg:Idpg",
    "prefix-tuning": "softprompts.methods.prefix_tuning:PrefixTuning",
    "p-tuning-v2": "softprompts.methods.prefix_tuning:PrefixTuning",  # another name for it, see its page
    "p-tuning": "softprompts.methods.p_tuning:PTuning",
    "residual": "softprompts.methods.residual:ResidualPromptTuning",
    "low-rank": "softprompts.methods.low_rank:LowRankPromptTuning",
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


def check_site(name: str, site: str) -> None:
    """Raise ConfigError unless there is a method called `name` and it can be used at `site`.

    A method that does not name its sites can be used at any.
    """
    possible: tuple[str, ...] = getattr(find(name), "sites", (site,))
    if site not in possible:
        raise ConfigError(
            f"method {name} cannot be used at site '{site}'; set prompt.site to one of: {', '.join(possible)}"
        )


def build(name: str, options: Mapping[str, Any], slot: PromptSpec, start: PromptInit) -> Any:
    """The method called `name` at its start, as its `options` say, in eval mode: training switches dropout on.

    Raises ConfigError for a name or options that are not known, and for what the method says against its start.
    """
    config = _configured(name, options)
    try:
        method: Any = find(name)(config, slot, start)
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from None
    if start.state:
        _take_up(name, method, start.state)
    return method.eval()


def sentence_encoders(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The frozen encoders of whole texts, beside the backbone, that the method called `name` reads with.

    Raises ConfigError as `build` does.
    """
    config = _configured(name, options)
    asked: Any = getattr(find(name), "sentence_encoders", None)
    return () if asked is None else tuple(asked(config))


def _configured(name: str, options: Mapping[str, Any]) -> Any:
    """The method's `Config` of options checked by name and kind; raises ConfigError."""
    kind: Any = find(name).Config
    known = typing.get_type_hints(kind)
    options = dict(options)
    for option, value in options.items():
        if option not in known:
            possible = f"{closest(option, known)} possible: {', '.join(known)}" if known else "; it has no options"
            raise ConfigError(f"prompt.options of method {name}: '{option}' is unknown{possible}")
        meant = _meant(known[option])
        if isinstance(value, str) and float in meant and str not in meant:
            with contextlib.suppress(ValueError):
                value = options[option] = float(value)  # YAML takes 5e-2 for a word
        _check_truth(f"prompt.options of method {name}: {option}", value, meant)
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"prompt.options of method {name}: {error}") from None


def _meant(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation allows."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _check_truth(where: str, value: Any, meant: Sequence[Any]) -> None:
    """Raise ConfigError for another value where true or false is meant, and for these where a number is."""
    if bool in meant and not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, given {value!r}")
    if isinstance(value, bool) and bool not in meant and {int, float} & set(meant):  # to Python these are 1 and 0
        raise ConfigError(f"{where} must be a {'number' if float in meant else 'whole number'}, given {value!r}")


def _take_up(name: str, method: Any, state: Mapping[str, Any]) -> None:
    """Put tensors of the same method, trained before for one task, in the place of its own, for every task alike.

    What the method has beyond them keeps its own start. Raises ConfigError for tensors that it does not have.
    """
    lists: tuple[str, ...] = getattr(method, "per_task", ())
    own = method.state_dict()
    for key, value in sorted(state.items()):
        owner, _, inner = _parts(key)
        places = [f"{owner}.{i}{inner}" for i in range(len(method.slot.tasks))] if owner in lists else [key]
        for place in places:
            if place not in own or own[place].shape != value.shape:
                held = f"one of {list(own[place].shape)}" if place in own else f"none; it has {', '.join(own)}"
                raise ConfigError(
                    f"init.state: the trained prompt has a tensor '{key}' of {list(value.shape)} and method {name} "
                    f"{held}; give a prompt of the same method and options"
                )
            own[place] = value
    method.load_state_dict(own)


def groups(method: Any) -> Mapping[str, ParamGroup]:
    """The method's parameters by groups that may have learning rates of their own; one of all where it names none."""
    return getattr(method, "groups", {"prompt": ParamGroup(("",))})


def state_of(method: Any, task: str) -> dict[str, Any]:
    """The tensors that the method holds for `task`, as the same method made for that task alone would hold them."""
    lists: tuple[str, ...] = getattr(method, "per_task", ())
    index = str(method.slot.tasks.index(task))
    found: dict[str, Any] = {}
    for name, value in method.state_dict().items():
        owner, place, inner = _parts(name)
        if owner not in lists:
            found[name] = value
        elif place == index:
            found[f"{owner}.0{inner}"] = value
    return found


def _parts(name: str) -> tuple[str, str, str]:
    """A tensor's name as that of a list, the place in it, and the rest with its dot (of one in a list of modules)."""
    owner, _, rest = name.partition(".")
    place, dot, inner = rest.partition(".")
    return owner, place, dot + inner


def shares(method: Any) -> bool:
    """Whether the method's tasks have parameters in common, beside those of their own."""
    lists: tuple[str, ...] | None = getattr(method, "per_task", None)
    return lists is not None and any(name.partition(".")[0] not in lists for name, _ in method.named_parameters())
