"""A task: its rows, and the template that turns a row into text and names the answers."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from softprompts.assets import datasets
from softprompts.config import Kind, TaskConfig, closest
from softprompts.data import sources
from softprompts.data.templates import (
    cell_text,
    default_template,
    is_missing,
    label_names,
    require_column,
    split_slots,
    template_columns,
)
from softprompts.errors import DataError
from softprompts.types import Row


@dataclass(frozen=True)
class TaskTemplate:
    """All that encodes a row of a task, in training and years later in prediction; JSON both ways.

    The fields are those of `TaskConfig` without open choices. `verbalizer` maps each class to its answer, in the order
    of the classes, and is None where answers are free. `truncate` names the columns that may be cut; None means all.
    """

    name: str
    template: str
    kind: Kind = "label"
    pair: str | None = None
    label: str = "label"
    separator: str = " "
    verbalizer: dict[str, str] | None = None
    truncate: tuple[str, ...] | None = None
    max_length: int | None = None
    chat: bool = False
    chat_placement: Literal["start", "user"] = "start"
    system: str | None = None
    metrics: tuple[str, ...] = ()
    positive: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that make the text of a row."""
        return tuple(dict.fromkeys((*template_columns(self.template), *template_columns(self.pair))))

    @property
    def templates(self) -> tuple[str | None, ...]:
        """The texts that may have slots for the prompt, in their order: system message, template, pair."""
        return (self.system if self.chat else None, self.template, self.pair)

    @property
    def has_prompt_slots(self) -> bool:
        """Whether a template has slots for the prompt."""
        return any(split_slots(template)[1] for template in self.templates)

    @property
    def truncatable_columns(self) -> tuple[str, ...]:
        """The columns that may be cut to make a row fit."""
        return self.columns if self.truncate is None else self.truncate

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "TaskTemplate":
        """The template that `to_json` wrote. Raises DataError for unknown or missing keys and wrong kinds."""
        known = {field.name: field for field in dataclasses.fields(TaskTemplate)}
        for name in values:
            if name not in known:
                raise DataError(f"template: unknown key '{name}'{closest(name, known)} known: {', '.join(known)}")
        for name in ("name", "template"):
            if not isinstance(values.get(name), str):
                raise DataError(f"template: '{name}' must be text, found {type(values.get(name)).__name__}")
        if values.get("kind", "label") not in typing.get_args(Kind):
            raise DataError(f"template: unknown kind '{values['kind']}', known: {', '.join(typing.get_args(Kind))}")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return TaskTemplate(**fields)


@dataclass(frozen=True)
class Task:
    """A named task with its rows; `notes` says which rows were left out and which cells were empty."""

    name: str
    template: TaskTemplate
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def load_task(config: TaskConfig | str) -> Task:
    """Load the rows of a task, and settle its open choices by the packaged set or the rows.

    Classes without a verbalizer are the sorted labels of all splits, and their answers are their names.

    Args:
        config: The task, or the source of its rows: a packaged set, a file, a directory or a hub name.

    Returns:
        The task with its rows and its template.

    Raises:
        DataError: As `read_splits`; and for a template without a column, labels with the same answer, an unknown
            positive label, and a column to truncate that the template does not have.
    """
    config = datasets.with_packaged_defaults(TaskConfig(source=config) if isinstance(config, str) else config)
    has_text = template_columns(config.template) or template_columns(config.pair)
    if config.template and config.kind != "generation" and not has_text:
        raise DataError(
            f"{config.title}: the template {config.template!r} has no slot for the text, so that all rows would be the "
            f"same; write a column in braces, as in {config.template + '{text}'!r}"
        )
    splits = sources.read_splits(config)
    rows = (*splits.train, *splits.validation, *splits.test)
    kind = config.kind or "label"
    template = TaskTemplate(
        name=config.title,
        template=default_template(splits.columns, config.label) if config.template is None else config.template,
        kind=kind,
        pair=config.pair,
        label=config.label,
        separator=config.separator,
        verbalizer=dict(config.verbalizer) if config.verbalizer else _label_verbalizer(rows, config.label, kind),
        truncate=config.truncate,
        max_length=config.max_length,
        chat=config.chat,
        chat_placement=config.chat_placement,
        system=config.system,
        metrics=config.metrics or (),
        positive=config.positive,
    )
    _check_template(template)
    notes = list(splits.notes)
    for column in template.columns:
        if empty := sum(is_missing(row.get(column)) for row in rows):
            notes.append(f"{empty} rows have no {column}: read as empty text")
    return Task(template.name, template, splits.train, splits.validation, splits.test, tuple(notes))


def resolve_placement(placement: str, templates: Sequence[TaskTemplate]) -> str:
    """The prompt's placement in tasks with these templates.

    Args:
        placement: `prompt.placement` of the configuration.
        templates: The templates of all tasks of a run.

    Returns:
        `template` where the templates have slots for the prompt, else `placement`.

    Raises:
        DataError: Some templates have slots and some have none; `placement` differs from the slots, or asks for missing
            slots; a chat's placement contradicts either.
    """
    with_slots = next((template for template in templates if template.has_prompt_slots), None)
    without_slots = next((template for template in templates if not template.has_prompt_slots), None)
    if with_slots and without_slots:
        raise DataError(
            f"{with_slots.name} has slots for the prompt in its template, {without_slots.name} has none; put <prompt> "
            "into every task's template, or into none"
        )
    if placement == "template" and without_slots:
        raise DataError(
            f"{without_slots.name}: prompt.placement is template, but the template {without_slots.template!r} has no "
            "slot for the prompt; write <prompt> at its place, or choose another placement"
        )
    if with_slots and placement not in ("auto", "template"):
        raise DataError(
            f"{with_slots.name}: the template has a slot for the prompt, and prompt.placement is {placement}; leave "
            "one out"
        )
    placed_by = "the template has a slot" if with_slots else f"prompt.placement is {placement}"
    for template in templates:
        in_user_message = template.chat and template.chat_placement == "user"
        if in_user_message and (with_slots or placement not in ("auto", "first")):
            raise DataError(
                f"{template.name}: chat_placement is user, and {placed_by}: both place the prompt; leave one out"
            )
    return "template" if with_slots else placement


def _label_verbalizer(rows: Sequence[Row], column: str, kind: Kind) -> dict[str, str] | None:
    """The labels of the rows, in order, each with its name as answer; None for tasks without classes."""
    if kind not in ("label", "multilabel", "tagging"):
        return None
    names: set[str] = set()
    for row in rows:
        names.update(label_names(row[column], kind))
    try:
        ordered = sorted(names, key=float)  # ratings 1..10 in the order of their values
    except ValueError:
        ordered = sorted(names)
    return dict(zip(ordered, ordered, strict=True))


def _check_template(template: TaskTemplate) -> None:
    """Raise DataError for answers that are empty or shared, an unknown positive label or an unknown column."""
    label_of_answer: dict[str, str] = {}
    for label, answer in (template.verbalizer or {}).items():
        bare = answer.strip()
        if not bare:
            raise DataError(f"{template.name}: the verbalizer's answer for label '{label}' is empty")
        if bare in label_of_answer:
            raise DataError(f"{template.name}: labels '{label_of_answer[bare]}' and '{label}' have the same answer "
                            f"'{answer}'; answers must differ")  # fmt: skip
        label_of_answer[bare] = label
    if template.positive is not None and template.verbalizer:
        require_label(template, template.positive, "positive label")
    for column in template.truncatable_columns:
        require_column(column, (*template.columns, template.label), "truncation", template.name)


def require_label(template: TaskTemplate, label: str, role: str = "label") -> None:
    """Raise DataError, with the known labels, when `label` is no class of the task; `role` names it in the message."""
    known = classes(template)
    if label not in known:
        raise DataError(f"{template.name}: {role} '{label}' is not in the verbalizer{closest(label, known)} "
                        f"known labels: {', '.join(known)}")  # fmt: skip


def classes(template: TaskTemplate) -> tuple[str, ...]:
    """The classes of a task in the order of their indices; empty where answers are free."""
    return tuple(template.verbalizer or ())


def answer_text(template: TaskTemplate, row: Row) -> str:
    """The right answer of a row, as a language model writes it, without the separator.

    Args:
        template: The task's template.
        row: The row.

    Returns:
        The answer. Commas join several labels, spaces join tags, and a span is its first text.

    Raises:
        DataError: The row has no label column, or an unknown label.
    """
    require_column(template.label, row, "label", template.name)
    value = row[template.label]
    if template.kind in ("label", "multilabel", "tagging"):
        names = label_names(value, template.kind)
        for name in names:
            require_label(template, name)
        answers = [(template.verbalizer or {})[name] for name in names]
        return " ".join(answers) if template.kind == "tagging" else ", ".join(answers)
    if template.kind == "regression":
        return f"{float(value):g}"
    if template.kind == "span" and isinstance(value, Mapping):
        return cell_text(next(iter(value["text"]), ""))
    return cell_text(value).strip()


def decode_answer(template: TaskTemplate, text: str) -> str | None:
    """The meaning of a generated text; only the space around an answer is forgiven.

    Args:
        template: The task's template.
        text: The generated text.

    Returns:
        A label, several labels joined by ", ", a number, or the text itself; None when it is no legal answer.
    """
    text = text.strip()
    if template.kind == "regression":
        try:
            return f"{float(text):g}"
        except ValueError:
            return None
    label_of_answer = {answer.strip(): label for label, answer in (template.verbalizer or {}).items()}
    if template.kind == "label":
        return label_of_answer.get(text)
    if template.kind not in ("multilabel", "tagging"):
        return text
    joiner = ", " if template.kind == "multilabel" else " "
    labels: list[str] = []
    for answer in text.split(joiner.strip() or None):
        if not answer.strip():
            continue
        label = label_of_answer.get(answer.strip())
        if label is None:
            return None
        labels.append(label)
    return joiner.join(filter(None, labels))
