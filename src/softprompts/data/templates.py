"""Templates: how the columns of a row become text, and what the values of a row mean."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from softprompts.config import closest
from softprompts.errors import DataError
from softprompts.types import Row

MASK = "mask"
"""The name that stands for the masked answer in templates of masked models: `{mask}`."""

SLOT = "<prompt>"
"""What stands in a template where the prompt enters; `<prompt:10>` where ten of its tokens do."""

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SLOT = re.compile(r"<prompt(?::([^<>]*))?>")


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The pieces of `template` as (literal text, column that follows or None); `{{` and `}}` are literal braces.

    Raises DataError for a brace that is neither doubled nor part of a `{column}`.
    """
    found: list[tuple[str, str | None]] = []
    literal, at = "", 0
    for match in _PIECE.finditer(template):
        literal += template[at : match.start()]
        at = match.end()
        if match.group() in ("{{", "}}"):
            literal += match.group()[0]
        elif match.group(1):
            found.append((literal, match.group(1)))
            literal = ""
        else:
            given = match.group()
            raise DataError(f"template {template!r}: '{given}' at character {match.start() + 1} names no column; "
                            "write {column}, and {{ or }} for a literal brace")  # fmt: skip
    return [*found, (literal + template[at:], None)]


def template_columns(template: str | None) -> tuple[str, ...]:
    """The columns that `template` names, each once, in order; `{mask}` is none of them."""
    named = [column for _, column in parse_template(template or "") if column and column != MASK]
    return tuple(dict.fromkeys(named))


def mask_count(template: str) -> int:
    """How often `template` names the masked answer."""
    return sum(column == MASK for _, column in parse_template(template))


def split_slots(template: str | None) -> tuple[list[str], list[int | None]]:
    """The pieces of a template around its slots, one more than slots, and each slot's number of prompt tokens.

    None stands for a slot that names no number. Only the template's own words are looked at, never a row's.

    Raises DataError for a slot that names something else than a number.
    """
    *both, last = _SLOT.split(template or "")
    for size in both[1::2]:
        if size is not None and not size.strip().isdecimal():
            raise DataError(
                f"template {template!r}: '<prompt:{size}>' names no number of prompt tokens, as <prompt:10>"
            )
    return [*both[::2], last], [None if size is None else int(size) for size in both[1::2]]


def slot_sizes(templates: Sequence[str | None], length: int, name: str) -> tuple[int, ...]:
    """How many of a prompt's `length` tokens each slot in `templates` has, in order; () where there are none.

    One slot may leave the number out and has the whole prompt. Raises DataError, naming the task, for several of which
    one does, for a slot of none, and for numbers that do not sum to `length`.
    """
    given = [size for template in templates for size in split_slots(template)[1]]
    if given == [None]:
        return (length,)
    sizes = tuple(size for size in given if size)
    if len(sizes) != len(given):
        raise DataError(
            f"{name}: the template has {len(given)} slots for the prompt; write how many of its {length} tokens each "
            f"has, at least one, as in <prompt:{max(1, length // max(1, len(given)))}>"
        )
    if sizes and sum(sizes) != length:
        told = " + ".join(map(str, sizes)) + (f" = {sum(sizes)}" if len(sizes) > 1 else "")
        raise DataError(
            f"{name}: the template's slots have {told} prompt tokens, but prompt.num_virtual_tokens is {length}; make "
            "them equal"
        )
    return sizes


def render(template: str, values: Mapping[str, str], mask: str = "") -> str:
    """`template` with the column texts `values` and, for `{mask}`, the text `mask` filled in.

    Raises DataError for a column that `values` does not have.
    """
    return fill_template(template, values, mask)[0]


def fill_template(template: str, values: Mapping[str, str], mask: str = "") -> tuple[str, list[tuple[int, int]]]:
    """The same, and from where to where in it each text stands that was filled in; the rest is the template's own."""
    text, places = "", list[tuple[int, int]]()
    for literal, column in parse_template(template):
        text += literal
        if column is not None and column != MASK:
            require_column(column, values, "template")
        given = "" if column is None else mask if column == MASK else values[column]
        places += [(len(text), len(text) + len(given))] if given else []
        text += given
    return text, places


def has_words(template: str | None) -> bool:
    """Whether `template` has words of its own, beside the columns that it names."""
    return any(literal.strip() for literal, _ in parse_template(template or ""))


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell_text(value: Any) -> str:
    """A cell as text: nothing becomes the empty string, a list of words is joined by spaces."""
    if is_missing(value):
        return ""
    if isinstance(value, list | tuple):
        return " ".join(cell_text(item) for item in value)
    return str(value)


def require_column(column: str, columns: Iterable[str], what: str, origin: str = "") -> None:
    """Raise DataError, with the columns there are and the closest one, when `column` is not among `columns`."""
    known = list(columns)
    if column not in known:
        there = ", ".join(known) if known else "none"
        before = f"{origin}: " if origin else ""
        raise DataError(f"{before}no column '{column}' for the {what}{closest(column, known)} columns: {there}")


def label_name(value: Any) -> str:
    """One label as its name: `True` is "true", 1.0 is "1", text loses the spaces around it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def label_names(value: Any, kind: str) -> tuple[str, ...]:
    """All labels in a cell: one for kind label, any number for multilabel and tagging, none for the other kinds.

    Lists are taken as they are; text is cut at commas (multilabel) or spaces (tagging).
    """
    if kind == "label":
        return (label_name(value),)
    if kind not in ("multilabel", "tagging"):
        return ()
    if isinstance(value, str):
        value = [item for item in (value.split(",") if kind == "multilabel" else value.split()) if item.strip()]
    if not isinstance(value, Sequence):
        return (label_name(value),)
    return tuple(label_name(item) for item in value)


def text_key(row: Row, columns: Sequence[str]) -> str:
    """What makes two rows the same text: the cells of `columns` without regard to case and spacing."""
    return "\x1f".join(" ".join(cell_text(row.get(column)).split()).casefold() for column in columns)


def default_template(columns: Sequence[str], label: str) -> str:
    """The template of a source that comes without one: its `text` column, or its only column beside the label.

    Raises DataError when there are several to choose from.
    """
    others = [column for column in columns if column != label]
    if "text" in others:
        return "{text}"
    if len(others) == 1:
        return "{" + others[0] + "}"
    shown = ", ".join(others) if others else "none"
    raise DataError(f"give the task a template, such as '{{{others[0] if others else 'text'}}}'; columns: {shown}")
