"""From rows to splits: without duplicates, contradictions and leaks, by seeded draws that ignore the order of rows."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softprompts.config import TaskConfig, closest
from softprompts.data.templates import cell_text, is_missing, label_names, text_key
from softprompts.errors import DataError
from softprompts.types import Row


@dataclass(frozen=True)
class Table:
    """Rows of one file or split, its columns, and the line at which each row begins where that is known."""

    name: str
    rows: Sequence[Row]
    columns: tuple[str, ...]
    lines: Sequence[int] | None = None

    def locate(self, index: int) -> str:
        """The place of a row for a person: `file:line`, or the number of the row from 1."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name} row {index + 1}"


@dataclass(frozen=True)
class Splits:
    """Rows for training, validation and test; `notes` says which rows were left out."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check_labels(table: Table, config: TaskConfig) -> None:
    """Raise DataError for the first label that the verbalizer does not know, or the first value that is no number."""
    verbalizer = config.verbalizer or {}
    for index, row in enumerate(table.rows):
        value = row[config.label]
        if is_missing(value):
            continue
        if config.kind == "regression" and not _is_finite(value):
            raise DataError(f"{table.locate(index)}: '{value}' in column '{config.label}' is not a number")
        for name in label_names(value, config.kind or "label") if verbalizer else ():
            if name not in verbalizer:
                known = list(verbalizer)
                listed = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
                raise DataError(f"{table.locate(index)}: label '{name}' is not in the verbalizer"
                                f"{closest(name, known)} known labels: {listed}")  # fmt: skip


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def divide(tables: Mapping[str, Table], config: TaskConfig, columns: Sequence[str]) -> Splits:
    """Clean the rows, draw the splits that the source does not have, then apply `shots` and `limit`.

    Args:
        tables: "train", and "validation" and "test" where the source has them.
        config: The task with its split settings.
        columns: The columns that make the text of a row.

    Returns:
        The three splits.

    Raises:
        DataError: No row is left to train on.
    """
    division = _Division(tables, config, columns)
    if "test" in division.splits:
        division.note_repeated_test_texts()
    for role in ("train", "validation"):
        if role in division.splits:
            division.remove_duplicates(role)
    division.remove_leaks()
    for role, fraction in (("test", config.split.test_fraction), ("validation", config.split.validation_fraction)):
        if role not in division.splits:
            division.draw(role, fraction)
    if config.split.shots:
        for role in ("train", "validation"):
            division.limit_to_shots(role, config.split.shots)
    for role, limit in config.split.limit.items():
        division.limit(role, limit)
    splits, notes = division.splits, tuple(division.notes)
    if not splits["train"]:
        raise DataError(
            f"{tables['train'].name}: no rows are left to train on; {'; '.join(notes) or 'lower the fractions'}"
        )
    return Splits(
        train=tuple(splits["train"]),
        validation=tuple(splits["validation"]),
        test=tuple(splits["test"]),
        columns=tables["train"].columns,
        notes=notes,
    )


class _Division:
    """The splits of one task while they are cleaned and drawn.

    splits  the rows of each split so far
    notes   what was left out, for a person
    """

    def __init__(self, tables: Mapping[str, Table], config: TaskConfig, columns: Sequence[str]) -> None:
        """Start with the rows of `tables` that have a label; a test split without labels is dropped."""
        self.config = config
        self.columns = columns
        self.seed = config.split.seed
        self.notes: list[str] = []
        self.splits: dict[str, list[Row]] = {}
        for role, table in tables.items():
            labeled = self._labeled_rows(table)
            if labeled or role == "train":
                self.splits[role] = labeled

    def note_repeated_test_texts(self) -> None:
        """Note how many texts of the source's own test split are repeated; none is removed."""
        rows = self.splits["test"]
        repeated = len(rows) - len(set(map(self._text, rows)))
        if repeated:
            self.notes.append(f"test: kept as the source has it, with {repeated} repeated texts")

    def remove_duplicates(self, role: str) -> None:
        """Remove exact repetitions, and in tasks with classes the texts that have several answers.

        Of repeated rows the first stays, at the place of the last: seeded orders of training depend on this place.
        """
        cells = (*self.columns, self.config.label)
        first_rows: dict[tuple[str, ...], Row] = {}
        for row in self.splits[role]:
            identity = tuple(" ".join(cell_text(row[cell]).split()) for cell in cells)
            first_rows[identity] = first_rows.pop(identity, row)
        unique = list(first_rows.values())
        if removed := len(self.splits[role]) - len(unique):
            self.notes.append(f"{role}: {removed} exact duplicates left out")
        self.splits[role] = unique
        if self.config.kind in ("label", "multilabel"):
            self._remove_contradictions(role)

    def _remove_contradictions(self, role: str) -> None:
        answers: dict[str, set[tuple[str, ...]]] = {}
        for row in self.splits[role]:
            answers.setdefault(self._text(row), set()).add(tuple(sorted(self._classes(row))))
        contradicting = {text for text, labels in answers.items() if len(labels) > 1}
        if removed := self._keep(role, lambda row: self._text(row) not in contradicting):
            texts = len(contradicting)
            self.notes.append(f"{role}: {texts} texts with contradicting labels left out ({removed} rows)")

    def remove_leaks(self) -> None:
        """Keep each text in the last split that has it: the test split of a source never changes."""
        later_texts: set[str] = set()
        for role in ("test", "validation", "train"):
            if role not in self.splits:
                continue
            if removed := self._keep(role, lambda row: self._text(row) not in later_texts):
                self.notes.append(f"{role}: {removed} rows left out whose text is also in a later split")
            later_texts.update(map(self._text, self.splits[role]))

    def draw(self, role: str, fraction: float) -> None:
        """Move `fraction` of the training texts, with all their rows, to the split `role`."""
        rows = self.splits["train"]
        texts = list(map(self._text, rows))
        strata = dict(zip(texts, map(self._stratum, rows), strict=True))
        count = round(fraction * len(strata))
        if fraction and not count and len(strata) > 2:
            count = 1
        drawn = _draw_stratified(strata, min(count, len(strata)), f"{self.seed} {role}") if count else set()
        self.splits |= {role: [], "train": []}
        for text, row in zip(texts, rows, strict=True):
            self.splits[role if text in drawn else "train"].append(row)

    def limit_to_shots(self, role: str, shots: int) -> None:
        """Keep `shots` rows, of each class or in all."""
        settings = self.config.split
        seed = settings.seed if settings.shots_seed is None else settings.shots_seed
        rows = self.splits[role]
        counts = Counter[str]()
        chosen: set[int] = set()
        for index in self._random_order(rows, f"{seed} shots {role}"):
            classes = (self._classes(rows[index]) if settings.shots_per == "class" else ()) or ("",)
            if any(counts[name] < shots for name in classes):
                counts.update(classes)
                chosen.add(index)
        self.splits[role] = [rows[index] for index in sorted(chosen)]
        short = [f"{name or 'rows'} {count}" for name, count in sorted(counts.items()) if count < shots]
        if short and role == "train":
            self.notes.append(f"train: fewer than {shots} shots of {', '.join(short)}")

    def limit(self, role: str, limit: int) -> None:
        """Keep at most `limit` rows, each class in its proportion."""
        rows, salt = self.splits[role], f"{self.seed} limit {role}"
        if len(rows) <= limit:
            return
        order = self._random_order(rows, salt)
        strata = {str(rank): self._stratum(rows[index]) for rank, index in enumerate(order)}
        chosen = [order[int(rank)] for rank in _draw_stratified(strata, limit, salt)]
        self.splits[role] = [rows[index] for index in sorted(chosen)]

    def _keep(self, role: str, condition: Callable[[Row], bool]) -> int:
        """Keep the rows of a split that meet a condition; returns the number of removed rows."""
        before = len(self.splits[role])
        self.splits[role] = list(filter(condition, self.splits[role]))
        return before - len(self.splits[role])

    def _labeled_rows(self, table: Table) -> list[Row]:
        allows_empty = self.config.kind == "multilabel"  # there "" means that no label applies
        rows: list[Row] = []
        for row in table.rows:
            label = row[self.config.label]
            if not is_missing(label) and (allows_empty or label != ""):
                rows.append(row)
        if removed := len(table.rows) - len(rows):
            self.notes.append(f"{table.name}: {removed} rows with nothing in '{self.config.label}' left out")
        return rows

    def _text(self, row: Row) -> str:
        return text_key(row, self.columns)

    def _classes(self, row: Row) -> tuple[str, ...]:
        kind = self.config.kind or "label"
        return label_names(row[self.config.label], kind) if kind in ("label", "multilabel") else ()

    def _stratum(self, row: Row) -> str:
        return ",".join(sorted(self._classes(row)))

    def _random_order(self, rows: Sequence[Row], salt: str) -> list[int]:
        """Indices of `rows` in a random order that does not depend on theirs."""

        def rank(index: int) -> tuple[bytes, str]:
            return _hash_rank(self._text(rows[index]), salt), str(sorted(rows[index].items(), key=str))

        return sorted(range(len(rows)), key=rank)


def _hash_rank(text: str, salt: str) -> bytes:
    """A rank in a random order that depends on the text and the salt only."""
    return hashlib.blake2b(f"{salt}\x1f{text}".encode("utf-8", "replace"), digest_size=16).digest()


def _draw_stratified(strata: Mapping[str, str], count: int, salt: str) -> set[str]:
    """Draw texts by seeded hash, each stratum in its proportion.

    Args:
        strata: The stratum of each text.
        count: How many texts to draw.
        salt: The seed and the purpose of the draw.

    Returns:
        The drawn texts.
    """
    texts_of: dict[str, list[str]] = {}
    for text in sorted(strata, key=lambda text: _hash_rank(text, salt)):
        texts_of.setdefault(strata[text], []).append(text)
    shares = {stratum: count * len(texts) / len(strata) for stratum, texts in texts_of.items()}
    sizes = {stratum: int(share) for stratum, share in shares.items()}
    by_remainder = sorted(texts_of, key=lambda stratum: (sizes[stratum] - shares[stratum], _hash_rank(stratum, salt)))
    for stratum in by_remainder[: count - sum(sizes.values())]:
        sizes[stratum] += 1
    drawn: set[str] = set()
    for stratum, texts in texts_of.items():
        drawn.update(texts[: sizes[stratum]])
    return drawn
