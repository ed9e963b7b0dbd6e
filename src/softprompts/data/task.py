"""A task: its rows, and the format that says how a row is put into words and what the answers are called."""

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
    """All that is needed to encode a row of a task, at training and years later at prediction time; JSON both ways.

    The fields are those of `TaskConfig`, settled: `verbalizer` maps each class to its answer, in the order of the
    classes, and is None where answers are free; `truncate` names the columns that may be cut, None means all.
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
        """Where slots for the prompt may stand, in the order of the text: system message, template, pair."""
        return (self.system if self.chat else None, self.template, self.pair)

    @property
    def has_prompt_slots(self) -> bool:
        """Whether the template says where the prompt stands."""
        return any(split_slots(template)[1] for template in self.templates)

    @property
    def truncatable_columns(self) -> tuple[str, ...]:
        """The columns that may be cut to make a row fit."""
        return self.columns if self.truncate is None else self.truncate

    def to_json(self) -> dict[str, Any]:
        """The format as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "TaskTemplate":
        """The format that `to_json` wrote. Raises DataError for unknown or missing keys and wrong kinds."""
        known = {field.name: field for field in dataclasses.fields(TaskTemplate)}
        for name in values:
            if name not in known:
                raise DataError(f"format: unknown key '{name}'{closest(name, known)} known: {', '.join(known)}")
        for name in ("name", "template"):
            if not isinstance(values.get(name), str):
                raise DataError(f"format: '{name}' must be text, found {type(values.get(name)).__name__}")
        if values.get("kind", "label") not in typing.get_args(Kind):
            raise DataError(f"format: unknown kind '{values['kind']}', known: {', '.join(typing.get_args(Kind))}")
        settled: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return TaskTemplate(**settled)


@dataclass(frozen=True)
class Task:
    """A named task with its rows; `notes` says in plain words what was left out or assumed on the way."""

    name: str
    template: TaskTemplate
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def load_task(config: TaskConfig | str) -> Task:
    """The task that `config` describes, with what it leaves open taken from the packaged set or from the rows.

    A string is the source of the rows: a packaged set, a file, a directory or a hub name.

    Classes without a verbalizer are the sorted labels of all splits and answer with their own names.

    Raises DataError as `sources.read` does, and for a format that cannot be used: a template without any column,
    answers that two labels share, an unknown positive label, a column to truncate that the template does not have.
    """
    config = datasets.with_packaged_defaults(TaskConfig(source=config) if isinstance(config, str) else config)
    if (
        config.template
        and config.kind != "generation"
        and not (template_columns(config.template) or template_columns(config.pair))
    ):
        raise DataError(
            f"{config.title}: the template {config.template!r} has no slot for the text, so that all rows would be the "
            f"same; write a column in braces, as in {config.template + '{text}'!r}"
        )
    rows = sources.read_splits(config)
    every = (*rows.train, *rows.validation, *rows.test)
    template = default_template(rows.columns, config.label) if config.template is None else config.template
    kind = config.kind or "label"
    form = TaskTemplate(
        name=config.title,
        template=template,
        kind=kind,
        pair=config.pair,
        label=config.label,
        separator=config.separator,
        verbalizer=dict(config.verbalizer) if config.verbalizer else _labels(every, config.label, kind),
        truncate=config.truncate,
        max_length=config.max_length,
        chat=config.chat,
        chat_placement=config.chat_placement,
        system=config.system,
        metrics=config.metrics or (),
        positive=config.positive,
    )
    _check(form)
    empty = {c: sum(is_missing(row.get(c)) for row in every) for c in form.columns}
    notes = [f"{count} rows have no {column}: read as empty text" for column, count in empty.items() if count]
    return Task(form.name, form, rows.train, rows.validation, rows.test, (*rows.notes, *notes))


def resolve_placement(asked: str, forms: Sequence[TaskTemplate]) -> str:
    """What `prompt.placement` means for tasks of these formats: `template` where their templates have slots.

    Raises DataError where one has slots and another none, where `asked` says another place than the slots, where it
    asks for slots that are not there, and where a chat's place says another than either.
    """
    slotted = [form for form in forms if form.has_prompt_slots]
    without = next((form for form in forms if not form.has_prompt_slots), None)
    if slotted and without is not None:
        raise DataError(
            f"{slotted[0].name} has slots for the prompt in its template, {without.name} has none; put <prompt> into "
            f"every task's template, or into none"
        )
    if asked == "template" and without is not None:
        raise DataError(
            f"{without.name}: prompt.placement is template, but the template {without.template!r} has no slot for the "
            f"prompt; write <prompt> where it shall stand, or choose another place"
        )
    if slotted and asked not in ("auto", "template"):
        raise DataError(
            f"{slotted[0].name}: the template has a slot for the prompt, and prompt.placement is {asked}; leave one out"
        )
    said = "the template has a slot" if slotted else f"prompt.placement is {asked}"
    for form in forms:
        if form.chat and form.chat_placement == "user" and (slotted or asked not in ("auto", "first")):
            raise DataError(
                f"{form.name}: chat_placement is user, and {said}: both say where the prompt stands; leave one out"
            )
    return "template" if slotted else asked


def _labels(rows: Sequence[Row], column: str, kind: Kind) -> dict[str, str] | None:
    if kind not in ("label", "multilabel", "tagging"):
        return None
    names = {name for row in rows for name in label_names(row[column], kind)}
    try:
        ordered = sorted(names, key=float)  # ratings 1..10 in the order of their values
    except ValueError:
        ordered = sorted(names)
    return {name: name for name in ordered}


def _check(form: TaskTemplate) -> None:
    answers: dict[str, str] = {}
    for label, answer in (form.verbalizer or {}).items():
        if not answer.strip():
            raise DataError(f"{form.name}: the verbalizer's answer for label '{label}' is empty")
        if answer.strip() in answers:
            raise DataError(f"{form.name}: labels '{answers[answer.strip()]}' and '{label}' have the same answer "
                            f"'{answer}'; answers must differ")  # fmt: skip
        answers[answer.strip()] = label
    if form.positive is not None and form.verbalizer:
        require_label(form, form.positive, "positive label")
    for column in form.truncatable_columns:
        require_column(column, (*form.columns, form.label), "truncation", form.name)


def require_label(form: TaskTemplate, label: str, what: str = "label") -> None:
    """Raise DataError, with the labels there are, when `label` is no class of the format."""
    if label not in classes(form):
        known = classes(form)
        raise DataError(f"{form.name}: {what} '{label}' is not in the verbalizer{closest(label, known)} "
                        f"known labels: {', '.join(known)}")  # fmt: skip


def classes(form: TaskTemplate) -> tuple[str, ...]:
    """The classes of a format in the order of their indices; empty where answers are free."""
    return tuple(form.verbalizer or ())


def answer_text(form: TaskTemplate, row: Row) -> str:
    """The right answer of `row` as a language model should write it, without the separator.

    Several labels are joined by ", ", tags by spaces, a span is its first text. Raises DataError when the row has no
    such column or an unknown label.
    """
    require_column(form.label, row, "label", form.name)
    value = row[form.label]
    if form.kind in ("label", "multilabel", "tagging"):
        names = label_names(value, form.kind)
        for name in names:
            require_label(form, name)
        words = [(form.verbalizer or {})[name] for name in names]
        return " ".join(words) if form.kind == "tagging" else ", ".join(words)
    if form.kind == "regression":
        return f"{float(value):g}"
    if form.kind == "span" and isinstance(value, Mapping):
        return cell_text(next(iter(value["text"]), ""))
    return cell_text(value).strip()


def decode_answer(form: TaskTemplate, text: str) -> str | None:
    """What a generated `text` means: a label, a number, or the text itself; None when it is no legal answer.

    Only the space around an answer is forgiven. Several labels come back joined by ", ".
    """
    text = text.strip()
    if form.kind == "regression":
        try:
            return f"{float(text):g}"
        except ValueError:
            return None
    labels = {given.strip(): label for label, given in (form.verbalizer or {}).items()}
    if form.kind == "label":
        return labels.get(text)
    if form.kind in ("multilabel", "tagging"):
        cut = ", " if form.kind == "multilabel" else " "
        found = [labels.get(word.strip()) for word in text.split(cut.strip() or None) if word.strip()]
        return None if None in found else cut.join(name for name in found if name)
    return text
