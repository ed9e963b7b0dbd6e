"""From rows to splits: duplicates, contradictions and leaks out, then seeded draws that do not depend on row order."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompts.config import SplitConfig, TaskConfig, closest
from softprompts.data.templates import cell_text, is_missing, label_names, text_key
from softprompts.errors import DataError
from softprompts.types import Row


@dataclass(frozen=True)
class Table:
    """Rows of one file or split, its columns, and the line each row began at where that is known."""

    name: str
    rows: Sequence[Row]
    columns: tuple[str, ...]
    lines: Sequence[int] | None = None

    def where(self, index: int) -> str:
        """How a person finds the row: `file:line`, or the number of the row from 1."""
        return f"{self.name}:{self.lines[index]}" if self.lines else f"{self.name} row {index + 1}"


@dataclass(frozen=True)
class Splits:
    """Rows that train, choose and judge; `notes` says what was left out on the way."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check_labels(table: Table, config: TaskConfig) -> None:
    """Raise DataError for the first label that the verbalizer does not know, or the first value that is no number."""
    for index, row in enumerate(table.rows):
        value = row[config.label]
        if is_missing(value):
            continue
        if config.kind == "regression":
            try:
                finite = math.isfinite(float(value))
            except (TypeError, ValueError):
                finite = False
            if not finite:
                raise DataError(f"{table.where(index)}: '{value}' in column '{config.label}' is no number")
        for name in label_names(value, config.kind or "label") if config.verbalizer else ():
            if name not in (config.verbalizer or {}):
                known = list(config.verbalizer or {})
                shown = ", ".join(known[:30]) + (", ..." if len(known) > 30 else "")
                raise DataError(f"{table.where(index)}: label '{name}' is not in the verbalizer{closest(name, known)} "
                                f"known labels: {shown}")  # fmt: skip


def divide(tables: Mapping[str, Table], config: TaskConfig, columns: Sequence[str]) -> Splits:
    """The splits of `tables` ("train", and "validation" and "test" where the source has them).

    `columns` make the text of a row. What the source does not have is drawn from "train"; then `shots` and `limit`.
    Raises DataError when nothing is left to train on.
    """
    split, notes = config.split, list[str]()
    parts = {role: _labeled(table, config, notes) for role, table in tables.items()}
    parts = {role: rows for role, rows in parts.items() if rows or role == "train"}  # many test sets have no labels
    if "test" in parts:
        repeated = len(parts["test"]) - len({text_key(row, columns) for row in parts["test"]})
        if repeated:
            notes.append(f"test: kept as the source has it, with {repeated} repeated texts")
    for role in ("train", "validation"):
        if role in parts:
            parts[role] = _clean(parts[role], role, config, columns, notes)
    _no_leaks(parts, columns, notes)
    for role, fraction in (("test", split.test_fraction), ("validation", split.validation_fraction)):
        if role not in parts:
            parts[role], parts["train"] = _draw(parts["train"], fraction, role, config, columns)
    if split.shots:
        _shots(parts, split, config, columns, notes)
    for name, limit in split.limit.items():
        parts[name] = _sample(parts[name], limit, f"limit {name}", config, columns)
    if not parts["train"]:
        raise DataError(
            f"{tables['train'].name}: no rows are left to train on; {'; '.join(notes) or 'lower the fractions'}"
        )
    return Splits(
        tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), tables["train"].columns, tuple(notes)
    )


def _labeled(table: Table, config: TaskConfig, notes: list[str]) -> list[Row]:
    empty = config.kind == "multilabel"  # there "" means that no label applies
    found = [row for row in table.rows if not is_missing(row[config.label]) and (empty or row[config.label] != "")]
    if len(found) < len(table.rows):
        notes.append(f"{table.name}: {len(table.rows) - len(found)} rows with nothing in '{config.label}' left out")
    return found


def _clean(rows: list[Row], role: str, config: TaskConfig, columns: Sequence[str], notes: list[str]) -> list[Row]:
    """Without exact repetitions, and for classes without texts that have several answers."""
    cells = (*columns, config.label)
    unique = list({tuple(" ".join(cell_text(row[c]).split()) for c in cells): row for row in reversed(rows)}.values())[
        ::-1
    ]
    if len(unique) < len(rows):
        notes.append(f"{role}: {len(rows) - len(unique)} exact duplicates left out")
    if config.kind not in ("label", "multilabel"):
        return unique
    answers: dict[str, set[tuple[str, ...]]] = {}
    for row in unique:
        answers.setdefault(text_key(row, columns), set()).add(tuple(sorted(_classes(row, config))))
    kept = [row for row in unique if len(answers[text_key(row, columns)]) == 1]
    if len(kept) < len(unique):
        texts = sum(len(found) > 1 for found in answers.values())
        notes.append(f"{role}: {texts} texts with contradicting labels left out ({len(unique) - len(kept)} rows)")
    return kept


def _no_leaks(parts: dict[str, list[Row]], columns: Sequence[str], notes: list[str]) -> None:
    """Keep each text in the last split that has it: the test split of a source is never changed."""
    taken: set[str] = set()
    for role in ("test", "validation", "train"):
        rows = parts.get(role, [])
        kept = [row for row in rows if text_key(row, columns) not in taken]
        if len(kept) < len(rows):
            notes.append(f"{role}: {len(rows) - len(kept)} rows left out whose text is also in a later split")
        taken.update(text_key(row, columns) for row in kept)
        if role in parts:
            parts[role] = kept


def _rank(text: str, salt: str) -> bytes:
    """A place in a random order that depends on the text and the seed only."""
    return hashlib.blake2b(f"{salt}\x1f{text}".encode("utf-8", "replace"), digest_size=16).digest()


def _classes(row: Row, config: TaskConfig) -> tuple[str, ...]:
    kind = config.kind or "label"
    return label_names(row[config.label], kind) if kind in ("label", "multilabel") else ()


def _stratum(row: Row, config: TaskConfig) -> str:
    return ",".join(sorted(_classes(row, config)))


def _pick(items: Mapping[str, str], count: int, salt: str) -> set[str]:
    """`count` of the texts `items` (text -> stratum), each stratum in its proportion, by seeded hash."""
    strata: dict[str, list[str]] = {}
    for text in sorted(items, key=lambda text: _rank(text, salt)):
        strata.setdefault(items[text], []).append(text)
    shares = {name: count * len(texts) / len(items) for name, texts in strata.items()}
    take = {name: int(share) for name, share in shares.items()}
    fractions = sorted(strata, key=lambda name: (take[name] - shares[name], _rank(name, salt)))
    for name in fractions[: count - sum(take.values())]:
        take[name] += 1
    return {text for name, texts in strata.items() for text in texts[: take[name]]}


def _draw(
    rows: list[Row], fraction: float, role: str, config: TaskConfig, columns: Sequence[str]
) -> tuple[list[Row], list[Row]]:
    """`fraction` of the texts of `rows` with all their rows, and the rest."""
    texts = {text_key(row, columns): _stratum(row, config) for row in rows}
    count = round(fraction * len(texts))
    if fraction and not count and len(texts) > 2:
        count = 1
    drawn = _pick(texts, min(count, len(texts)), f"{config.split.seed} {role}") if count else set()
    inside = [text_key(row, columns) in drawn for row in rows]
    return [r for r, i in zip(rows, inside, strict=True) if i], [r for r, i in zip(rows, inside, strict=True) if not i]


def _order(rows: list[Row], salt: str, columns: Sequence[str]) -> list[int]:
    """Indices of `rows` in a random order that does not depend on theirs."""
    return sorted(
        range(len(rows)), key=lambda i: (_rank(text_key(rows[i], columns), salt), str(sorted(rows[i].items(), key=str)))
    )


def _sample(rows: list[Row], limit: int, salt: str, config: TaskConfig, columns: Sequence[str]) -> list[Row]:
    if len(rows) <= limit:
        return rows
    order = _order(rows, f"{config.split.seed} {salt}", columns)
    names = {str(place): _stratum(rows[i], config) for place, i in enumerate(order)}
    chosen = {order[int(place)] for place in _pick(names, limit, f"{config.split.seed} {salt}")}
    return [row for i, row in enumerate(rows) if i in chosen]


def _shots(
    parts: dict[str, list[Row]], split: SplitConfig, config: TaskConfig, columns: Sequence[str], notes: list[str]
) -> None:
    """`split.shots` rows, of each class or in all, to train on, and no more than that to choose with."""
    shots, seed = split.shots or 0, split.seed if split.shots_seed is None else split.shots_seed
    for role in ("train", "validation"):
        rows, counts, chosen = parts[role], Counter[str](), set[int]()
        for i in _order(rows, f"{seed} shots {role}", columns):
            names = (_classes(rows[i], config) if split.shots_per == "class" else ()) or ("",)
            if any(counts[name] < shots for name in names):
                counts.update(names)
                chosen.add(i)
        parts[role] = [row for i, row in enumerate(rows) if i in chosen]
        short = [f"{name or 'rows'} {count}" for name, count in sorted(counts.items()) if count < shots]
        if short and role == "train":
            notes.append(f"train: fewer than {shots} shots of {', '.join(short)}")
