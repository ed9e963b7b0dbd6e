"""Cells that hold more than text: lists of words, and where answers stand in a context."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from softprompts.data.templates import cell_text, is_missing
from softprompts.errors import DataError


def split_words(value: Any) -> list[str]:
    """The words of a cell: its items, or its text cut at spaces."""
    if isinstance(value, str):
        return value.split()
    return [cell_text(item) for item in value or ()]


def answer_offsets(value: Any, name: str) -> tuple[int, int] | None:
    """The characters [start, end) of a span label; None where there is none, an empty span where there is no answer.

    A label is SQuAD's `{"text": [...], "answer_start": [...]}`, of which the first counts, or `[start, end]`; in a file
    of text either may be written as JSON. Raises DataError for anything else.
    """
    if is_missing(value) or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if isinstance(value, Mapping) and {"text", "answer_start"} <= set(value):
        texts, starts = value["text"], value["answer_start"]
        if not len(texts):
            return 0, 0
        return int(starts[0]), int(starts[0]) + len(texts[0])
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(end, int) for end in value):
        return value[0], value[1]
    raise DataError(
        f"{name}: a span label is {{'text': [...], 'answer_start': [...]}} or [start, end], found {value!r}"
    )
