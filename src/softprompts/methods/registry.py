"""The methods by name: each makes one task's prompt; one file each, loaded when first used.

Third parties add theirs through the entry point group `softprompts.methods` (name = "module:Class").
"""

import contextlib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor, nn

from softprompts.config import closest
from softprompts.errors import ConfigError
from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import PromptInit, PromptSpec

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


def find(name: str) -> type[PromptMethod]:
    """The class of the method called `name`.

    Raises:
        ConfigError: There is none, with the closest known name; or a third party's class is no `PromptMethod`.
    """
    target = METHODS.get(name) or next((e.value for e in entry_points(group="softprompts.methods", name=name)), None)
    if target is None:
        raise ConfigError(f"unknown method '{name}'{closest(name, names())} known: {', '.join(names())}")
    module, _, attribute = target.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    if not (isinstance(kind, type) and issubclass(kind, PromptMethod)):
        raise ConfigError(f"method '{name}' ({target}) must be a subclass of softprompts.methods.PromptMethod")
    return kind


def check_site(name: str, site: str) -> None:
    """Raise ConfigError unless there is a method called `name` and it can be used at `site`."""
    possible = find(name).sites
    if site not in possible:
        raise ConfigError(
            f"method {name} cannot be used at site '{site}'; set prompt.site to one of: {', '.join(possible)}"
        )


def build(
    name: str,
    options: Mapping[str, Any],
    spec: PromptSpec,
    init: PromptInit,
    shared: nn.Module | None = None,
) -> PromptMethod:
    """One task's method at its start, in eval mode: training switches dropout on.

    Args:
        name: The method's name.
        options: Its options.
        spec: What the prompt must fill.
        init: Where training begins; `init.state` then replaces the tensors that it has.
        shared: What the task shares with others; None: the method makes it for this task alone.

    Raises:
        ConfigError: A name or options that are not known, or what the method says against its start.
    """
    kind, config = find(name), parse_options(name, options)
    with _told(name):
        method = kind(config, spec, init, shared)
    if init.state:
        _load_tensors(name, method, init.state)
    return method.eval()


def build_tasks(
    name: str, options: Mapping[str, Any], spec: PromptSpec, init: PromptInit, tasks: Sequence[str]
) -> dict[str, PromptMethod]:
    """The methods of several tasks that share what the method called `name` shares; arguments as for `build`.

    What they share is drawn first, once; then each task's own part, in order.
    """
    kind, config = find(name), parse_options(name, options)
    with _told(name):
        shared = kind.share(config, spec, init, tasks)
    return {task: build(name, options, spec, init, shared) for task in tasks}


def sentence_encoders(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The frozen encoders of whole texts, beside the backbone, that the method called `name` reads with.

    Raises:
        ConfigError: As `build` does.
    """
    return find(name).sentence_encoders(parse_options(name, options))


def parse_options(name: str, options: Mapping[str, Any]) -> MethodConfig:
    """The checked options of the method called `name`.

    Raises:
        ConfigError: An unknown option, with the closest known one, or a wrong value, with what is allowed.
    """
    kind = find(name).Config
    values = {option: _number(kind.model_fields.get(option), value) for option, value in options.items()}
    try:
        return kind(**values)
    except ValidationError as error:
        messages = [_message(kind, part) for part in error.errors()]
        raise ConfigError("; ".join(f"prompt.options of method {name}: {message}" for message in messages)) from None


@contextlib.contextmanager
def _told(name: str) -> typing.Iterator[None]:
    """Turns what a method says against its options or its start into a ConfigError that names the method."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from None


def _number(field: FieldInfo | None, value: Any) -> Any:
    """`value` as a number where it is a text that means one: YAML takes 5e-2 for a word."""
    kinds = () if field is None else _kinds(field)
    if isinstance(value, str) and float in kinds and str not in kinds:
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The types that a field allows."""
    hint = field.annotation
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _message(kind: type[MethodConfig], error: Any) -> str:
    """What is wrong with one option, and what is possible."""
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    option, value = str(error["loc"][0]), error["input"]
    if error["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        possible = f"{closest(option, known)} possible: {', '.join(known)}" if known else "; it has no options"
        return f"'{option}' is unknown{possible}"
    field = kind.model_fields[option]
    choices = choices_of(field)
    if choices:
        return f"{option} '{value}' is unknown; possible: {', '.join(choices)}"
    return f"{option} must be {allowed(field)}, given {value!r}"


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The words that an option allows; none where it is no choice of words."""
    words: list[str] = []
    for kind in _kinds(field):
        if typing.get_origin(kind) is typing.Literal:
            words += map(str, typing.get_args(kind))
    return tuple(words)


def allowed(field: FieldInfo) -> str:
    """What an option allows, in words: "a whole number of at least 1"."""
    kinds = _kinds(field)
    if bool in kinds:
        return "true or false"
    bounds: dict[str, Any] = {}
    for rule in field.metadata:
        for bound in ("ge", "gt", "le", "lt"):
            if getattr(rule, bound, None) is not None:
                bounds[bound] = getattr(rule, bound)
    text = "a number" if float in kinds else "a whole number" if int in kinds else "a text"
    if "gt" in bounds:
        text += f" above {bounds['gt']:g}"
    if "ge" in bounds:
        text += f" {'from' if {'le', 'lt'} & bounds.keys() else 'of at least'} {bounds['ge']:g}"
    if "lt" in bounds:
        text += f" to below {bounds['lt']:g}"
    if "le" in bounds:
        text += f" to {bounds['le']:g}"
    return text


def _load_tensors(name: str, method: PromptMethod, state: Mapping[str, Tensor]) -> None:
    """Put tensors of the same method, trained before, in the place of the method's own; the others keep their start.

    Raises:
        ConfigError: The method does not have such tensors.
    """
    tensors = method.state_dict()
    for key, value in sorted(state.items()):
        if key not in tensors or tensors[key].shape != value.shape:
            existing = f"one of {list(tensors[key].shape)}" if key in tensors else f"none; it has {', '.join(tensors)}"
            raise ConfigError(
                f"init.state: the trained prompt has a tensor '{key}' of {list(value.shape)} and method {name} has "
                f"{existing}; give a prompt of the same method and options"
            )
        tensors[key] = value
    method.load_state_dict(tensors)
