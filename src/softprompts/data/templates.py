"""Templates: how the columns of a row become text, and what the cells of a row mean."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from softprompts.config import closest
from softprompts.errors import DataError
from softprompts.types import Row

MASK = "mask"
"""The name of the masked answer in templates of masked models: `{mask}`."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SLOT = re.compile(r"<prompt(?::([^<>]*))?>")
"""A slot for the prompt: `<prompt>`, or `<prompt:10>` for ten of its tokens."""

CharRange = tuple[int, int]
"""Characters [start, end) of a text."""


class FilledText(NamedTuple):
    """A filled template.

    text      the whole text
    inserted  the characters that were filled in; all others are the template's own
    """

    text: str
    inserted: list[CharRange]


# Templates


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Cut a template into its columns; `{{` and `}}` are literal braces.

    Args:
        template: The template.

    Returns:
        Pairs of literal text and the column behind it. The column of the last pair is None.

    Raises:
        DataError: A brace is neither doubled nor part of a `{column}`.
    """
    pieces: list[tuple[str, str | None]] = []
    literal = ""
    end = 0
    for match in _PIECE.finditer(template):
        literal += template[end : match.start()]
        end = match.end()
        if match.group() in ("{{", "}}"):
            literal += match.group()[0]
        elif match.group(1):
            pieces.append((literal, match.group(1)))
            literal = ""
        else:
            raise DataError(
                f"template {template!r}: '{match.group()}' at character {match.start() + 1} names no column; "
                "write {column}, and {{ or }} for a literal brace"
            )
    return [*pieces, (literal + template[end:], None)]


def template_columns(template: str | None) -> tuple[str, ...]:
    """The columns that `template` names, each once, in order; `{mask}` is none of them."""
    columns = [column for _, column in parse_template(template or "") if column and column != MASK]
    return tuple(dict.fromkeys(columns))


def mask_count(template: str) -> int:
    """How often `template` names the masked answer."""
    return sum(column == MASK for _, column in parse_template(template))


def has_words(template: str | None) -> bool:
    """Whether `template` has words beside the columns that it names."""
    return any(literal.strip() for literal, _ in parse_template(template or ""))


def render(template: str, values: Mapping[str, str], mask: str = "") -> str:
    """The text of `fill_template`."""
    return fill_template(template, values, mask).text


def fill_template(template: str, values: Mapping[str, str], mask: str = "") -> FilledText:
    """Fill a template.

    Args:
        template: The template.
        values: The text of each column.
        mask: The text for `{mask}`.

    Returns:
        The text, with the places of the columns and of the mask.

    Raises:
        DataError: The template names a column that `values` does not have.
    """
    text = ""
    inserted: list[CharRange] = []
    for literal, column in parse_template(template):
        text += literal
        if column is None:
            continue
        if column != MASK:
            require_column(column, values, "template")
        value = mask if column == MASK else values[column]
        if value:
            inserted.append((len(text), len(text) + len(value)))
        text += value
    return FilledText(text, inserted)


def default_template(columns: Sequence[str], label: str) -> str:
    """The template of a source without one: its `text` column, or its only column beside the label.

    Args:
        columns: The columns of the source.
        label: The label column.

    Returns:
        A template of one column.

    Raises:
        DataError: There are several columns to choose from, or none.
    """
    others = [column for column in columns if column != label]
    if "text" in others:
        return "{text}"
    if len(others) == 1:
        return "{" + others[0] + "}"
    shown = ", ".join(others) if others else "none"
    raise DataError(f"give the task a template, such as '{{{others[0] if others else 'text'}}}'; columns: {shown}")


# Slots for the prompt


def split_slots(template: str | None) -> tuple[list[str], list[int | None]]:
    """Split a template at its slots for the prompt.

    Slots are part of the template's own words; the same words in a row are text.

    Args:
        template: The template; None has no slot.

    Returns:
        The pieces around the slots, one more than slots, and the number of prompt tokens that each slot names, or None.

    Raises:
        DataError: A slot names something else than a number.
    """
    *pieces_and_sizes, last = _SLOT.split(template or "")
    sizes: list[int | None] = []
    for size in pieces_and_sizes[1::2]:
        if size is not None and not size.strip().isdecimal():
            raise DataError(
                f"template {template!r}: '<prompt:{size}>' names no number of prompt tokens, as <prompt:10>"
            )
        sizes.append(None if size is None else int(size))
    return [*pieces_and_sizes[::2], last], sizes


def slot_sizes(templates: Sequence[str | None], length: int, name: str) -> tuple[int, ...]:
    """Divide a prompt among the slots of a task's templates.

    Args:
        templates: The system message, the template and the pair's template.
        length: The number of prompt tokens.
        name: The task, for messages.

    Returns:
        The number of prompt tokens in each slot, in order; () without slots. A single slot may leave its number out and
        has the whole prompt.

    Raises:
        DataError: One of several slots names no number, a slot has no token, or the numbers do not sum to `length`.
    """
    stated: list[int | None] = []
    for template in templates:
        stated += split_slots(template)[1]
    if stated == [None]:
        return (length,)
    sizes = tuple(size for size in stated if size)
    if len(sizes) != len(stated):
        raise DataError(
            f"{name}: the template has {len(stated)} slots for the prompt; write how many of its {length} tokens each "
            f"has, at least one, as in <prompt:{max(1, length // max(1, len(stated)))}>"
        )
    if sizes and sum(sizes) != length:
        total = " + ".join(map(str, sizes)) + (f" = {sum(sizes)}" if len(sizes) > 1 else "")
        raise DataError(
            f"{name}: the template's slots have {total} prompt tokens, but prompt.num_virtual_tokens is {length}; make "
            "them equal"
        )
    return sizes


# Cells


def require_column(column: str, columns: Iterable[str], role: str, origin: str = "") -> None:
    """Raise DataError, with the known columns and the closest one, when `column` is not among `columns`.

    Args:
        column: The column.
        columns: The known columns.
        role: The use of the column, for the message.
        origin: The file or task, for the message.
    """
    known = list(columns)
    if column not in known:
        prefix = f"{origin}: " if origin else ""
        listed = ", ".join(known) if known else "none"
        raise DataError(f"{prefix}no column '{column}' for the {role}{closest(column, known)} columns: {listed}")


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell_text(value: Any) -> str:
    """A cell as text: nothing becomes the empty string, spaces join a list of words."""
    if is_missing(value):
        return ""
    if isinstance(value, list | tuple):
        return " ".join(map(cell_text, value))
    return str(value)


def text_key(row: Row, columns: Sequence[str]) -> str:
    """The identity of a row's text: the cells of `columns` without regard to case and spacing."""
    return "\x1f".join(" ".join(cell_text(row.get(column)).split()).casefold() for column in columns)


def split_words(value: Any) -> list[str]:
    """The words of a cell: its items, or its text cut at spaces."""
    if isinstance(value, str):
        return value.split()
    return list(map(cell_text, value or ()))


def label_name(value: Any) -> str:
    """One label as its name: `True` is "true", 1.0 is "1", text loses the spaces around it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def label_names(value: Any, kind: str) -> tuple[str, ...]:
    """The labels in a cell: one for kind label, any number for multilabel and tagging, none for the other kinds.

    Args:
        value: The cell. Lists are taken as they are; text is cut at commas (multilabel) or spaces (tagging).
        kind: The kind of the task.

    Returns:
        The names of the labels.
    """
    if kind == "label":
        return (label_name(value),)
    if kind not in ("multilabel", "tagging"):
        return ()
    if isinstance(value, str):
        items = value.split(",") if kind == "multilabel" else value.split()
        return tuple(label_name(item) for item in items if item.strip())
    if not isinstance(value, Sequence):
        return (label_name(value),)
    return tuple(map(label_name, value))


def answer_offsets(value: Any, name: str) -> tuple[int, int] | None:
    """The characters [start, end) of a span label.

    Args:
        value: SQuAD's `{"text": [...], "answer_start": [...]}`, of which the first answer counts, or `[start, end]`; in
            a file of text either may be written as JSON.
        name: The task, for messages.

    Returns:
        The range; (0, 0) where there is no answer, None where there is no label.

    Raises:
        DataError: The value is anything else.
    """
    if is_missing(value) or value == "":
        return None
    label = value
    if isinstance(value, str):
        try:
            label = json.loads(value)
        except json.JSONDecodeError:
            label = None
    if isinstance(label, Mapping) and {"text", "answer_start"} <= set(label):
        texts, starts = label["text"], label["answer_start"]
        if not len(texts):
            return 0, 0
        return int(starts[0]), int(starts[0]) + len(texts[0])
    if isinstance(label, Sequence) and len(label) == 2 and all(isinstance(offset, int) for offset in label):
        return label[0], label[1]
    raise DataError(
        f"{name}: a span label is {{'text': [...], 'answer_start': [...]}} or [start, end], found {value!r}"
    )
