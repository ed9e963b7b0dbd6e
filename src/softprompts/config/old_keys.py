"""Keys of earlier releases: a configuration that has one is refused with its name of today; stored ones load."""

import types
import typing
from collections.abc import Mapping
from typing import Any

from softprompts.config.schema import PromptConfig, Run, Section

OLD_KEYS: dict[str, dict[str, str]] = {
    "Run": {"train": "training", "evaluate": "evaluation", "out": "output_dir"},
    "ModelConfig": {
        "quantise": "quantize",
        "products": "matmul_backend",
        "compiled": "torch_compile",
        "checkpointing": "gradient_checkpointing",
    },
    "PromptConfig": {"length": "num_virtual_tokens", "place": "placement"},
    "TaskConfig": {"verbaliser": "verbalizer", "chat_place": "chat_placement"},
    "TaskTemplate": {"verbaliser": "verbalizer", "chat_place": "chat_placement"},  # stored in artifacts
    "TrainConfig": {
        "steps": "max_steps",
        "parity": "equivalence",
        "accumulate": "gradient_accumulation_steps",
        "optimiser": "optimizer",
        "rate": "learning_rate",
        "rate_unit": "learning_rate_unit",
        "head_rate": "head_learning_rate",
        "schedule": "lr_scheduler_type",
        "warmup": "warmup_steps",
        "clip": "max_grad_norm",
        "evaluate_every": "eval_steps",
        "patience": "early_stopping_patience",
        "checkpoint_every": "save_steps",
        "rates": "learning_rates",
        "distil": "distillation",
        "train": "target",
        "keep": "save_model",
    },
    "EvaluationConfig": {"normalise": "normalize"},
    # Plans of the recipes
    "Plan": {"evaluate": "evaluation", "out": "output_dir"},
    "TeacherStage": {"train": "training"},
    "SourceStage": {"train": "training"},
    "TargetStage": {"factor_rate": "factor_learning_rate"},
    "ComparisonStage": {
        "train": "training",
        "rates": "learning_rates",
        "weight_rates": "weight_learning_rates",
        "weight_steps": "weight_max_steps",
    },
    # Plans of the studies
    "Study": {"evaluate": "evaluation", "out": "output_dir"},
    "Arm": {"rates": "learning_rates"},
    "PretrainStage": {"train": "training"},
    "VectorStage": {"train": "training", "rates": "learning_rates"},
}
"""Class of a section -> key of an earlier release -> key of today. A class has the keys of its base classes too."""

OLD_ENTRIES: dict[str, dict[str, dict[str, str]]] = {
    "TrainConfig": {"objectives": {"distil-logits": "distill-logits", "distil-hidden": "distill-hidden"}}
}
"""Class of a section -> key whose value is a mapping -> its entry of an earlier release -> its entry of today."""

OLD_VALUES: dict[str, dict[str, dict[str, str]]] = {"InitConfig": {"kind": {"artefact": "artifact"}}}
"""Class of a section -> key -> value of an earlier release -> value of today."""

OLD_OPTIONS: dict[str, dict[str, str]] = {
    "idpg": {"normalise": "normalize"},
    "prefix-tuning": {"reparametrise": "reparametrize"},
    "p-tuning-v2": {"reparametrise": "reparametrize"},
}
"""Method -> option of an earlier release -> option of today. The digest of an artifact has the old names."""

_UNTYPED = {("Run", "runs"): tuple[Run, ...], ("Arm", "prompt"): PromptConfig}
"""Keys whose values are plain mappings in the schema, with what these mappings are parts of."""

Renames = list[tuple[str, str]]
"""Paths of keys, each as it was written and as it is called today."""


def find_old_keys(values: Mapping[str, Any], model: type[Section] = Run) -> Renames:
    """The keys of earlier releases in `values`, outermost first.

    Args:
        values: What a user wrote for a section of class `model`; its keys may be dotted paths.
        model: The class of the section.

    Returns:
        For each old key its whole path, as it was written and as it is called today.
    """
    renames: Renames = []
    _update(values, model, (), (), renames)
    return renames


def update_old_keys(values: Mapping[str, Any], model: type[Section] = Run) -> dict[str, Any]:
    """A stored section of class `model` with the keys and values of today; keys that nobody knows stay."""
    updated: dict[str, Any] = _update(values, model, (), (), [])
    return updated


def update_old_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The stored options of a method with the names of today."""
    return rename(options, OLD_OPTIONS.get(method, {}))


def original_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method with the names that they had first, so that a digest outlives a new name."""
    return rename(options, {today: name for name, today in OLD_OPTIONS.get(method, {}).items()})


def rename(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The values, with the keys that are in `names` renamed."""
    return {names.get(key, key): value for key, value in values.items()}


def section_in(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation: behind optionals, in lists and tuples, among the values of a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in typing.get_args(annotation):
        if (section := section_in(part)) is not None:
            return section
    return None


def _update(value: Any, annotation: Any, old: tuple[str, ...], new: tuple[str, ...], renames: Renames) -> Any:
    """`value` of type `annotation` with today's keys; `old` and `new` are its path, and each rename is noted."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _update(value, section_in(annotation), old, new, renames)
    if isinstance(value, list | tuple) and origin is tuple:
        return [
            _update(part, arguments[0], (*old, str(number)), (*new, str(number)), renames)
            for number, part in enumerate(value)
        ]
    if not isinstance(value, Mapping):
        return value
    if origin is dict:
        return {
            key: _update(part, arguments[1], (*old, str(key)), (*new, str(key)), renames) for key, part in value.items()
        }
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return _update_section(value, annotation, old, new, renames)
    return value


def _update_section(
    values: Mapping[str, Any], section: type[Section], old: tuple[str, ...], new: tuple[str, ...], renames: Renames
) -> dict[str, Any]:
    names: dict[str, str] = {}
    for base in reversed(section.__mro__):
        names |= OLD_KEYS.get(base.__name__, {})
    updated: dict[str, Any] = {}
    for key, value in values.items():
        first, dot, rest = str(key).partition(".")
        name = names.get(first, first) if first not in section.model_fields else first
        path, today = (*old, first), (*new, name)
        if name != first:
            renames.append((".".join(path), ".".join(today)))
        field = section.model_fields.get("tasks" if name == "task" and "tasks" in section.model_fields else name)
        annotation = _UNTYPED.get((section.__name__, name), field.annotation if field else None)
        if name == "task":
            annotation = section_in(annotation)
        entries = OLD_ENTRIES.get(section.__name__, {}).get(name, {})
        value = _update_entries({rest: value} if dot else value, entries, path, today, renames)
        value = _update(value, annotation, path, today, renames)
        if dot:
            inner = next(iter(value))
            updated[f"{name}.{inner}"] = value[inner]
            continue
        if isinstance(value, str):
            value = OLD_VALUES.get(section.__name__, {}).get(name, {}).get(value, value)
        updated[name if name != first else key] = value
    if section is PromptConfig and isinstance(updated.get("options"), Mapping):
        updated["options"] = _update_options(updated, old, new, renames)
    return updated


def _update_entries(
    value: Any, names: Mapping[str, str], old: tuple[str, ...], new: tuple[str, ...], renames: Renames
) -> Any:
    """A mapping with today's names of its entries, and any other value as it is."""
    if not isinstance(value, Mapping):
        return value
    for name in value:
        if name in names:
            renames.append((".".join((*old, name)), ".".join((*new, names[name]))))
    return {names.get(name, name): inner for name, inner in value.items()}


def _update_options(
    prompt: Mapping[str, Any], old: tuple[str, ...], new: tuple[str, ...], renames: Renames
) -> dict[str, Any]:
    """The options of a section `prompt`, with the names of today."""
    method = str(prompt.get("method", PromptConfig.model_fields["method"].default))
    for name, today in OLD_OPTIONS.get(method, {}).items():
        if name in prompt["options"]:
            renames.append((".".join((*old, "options", name)), ".".join((*new, "options", today))))
    return update_old_options(method, prompt["options"])
