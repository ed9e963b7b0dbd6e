"""Where rows come from: csv, tsv, json, jsonl and parquet files, folders, the hub, and the packaged sets."""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompts.assets import datasets as packaged
from softprompts.config import SplitConfig, TaskConfig, closest
from softprompts.data.splits import Splits, Table, check_labels, divide
from softprompts.data.templates import default_template, is_missing, require_column, template_columns
from softprompts.errors import DataError
from softprompts.types import Row

NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""What sources call their splits."""


def read_splits(config: TaskConfig) -> Splits:
    """The rows that train, choose and judge, from `config.source`.

    A split named in `config.split` (one of the source's, or a file) is used as it is; else the source's own splits of
    that name; what is then missing is drawn from the training rows by a seeded hash of the text, so that no text is in
    two splits, whatever the order of the rows. A test split that the source has is kept whole: rows of the other splits
    with the same text are removed.

    Raises DataError, one line, for whatever does not fit: a missing file, column, split or label, an empty file, a
    wrong delimiter, a broken row (named by file and line), an unknown source.
    """
    config = packaged.with_packaged_defaults(config)
    tables = _assign(_tables(config.source), config.split, config.source)
    for table in tables.values():
        template = default_template(table.columns, config.label) if config.template is None else config.template
        for column in (*template_columns(template), *template_columns(config.pair)):
            require_column(column, table.columns, "template", table.name)
        require_column(config.label, table.columns, "label", table.name)
        check_labels(table, config)
        keys = (*template_columns(template), *template_columns(config.pair)) or (config.label,)
    return divide(tables, config, tuple(dict.fromkeys(keys)))


def _assign(tables: Mapping[str, Table], split: SplitConfig, source: str) -> dict[str, Table]:
    """Which table plays which role; the pool to draw from is "train"."""
    named = {role: getattr(split, role) for role in NAMES if getattr(split, role)}
    twice = [name for name in named.values() if list(named.values()).count(name) > 1]
    if twice:
        raise DataError(f"{source}: '{twice[0]}' is named for more than one of train, validation and test")
    found: dict[str, Table] = {}
    for role, names in NAMES.items():
        if role in named:
            found[role] = _named(named[role], role, tables, source)
        else:
            own = [name for name in names if name in tables and name not in named.values()]
            if own:
                found[role] = tables[own[0]]
    if "train" not in found and len(tables) == 1:
        only = next(iter(tables))
        if only == "":
            found["train"] = tables[only]
    if "train" not in found:
        raise DataError(f"{source} has no split to train on; splits: {', '.join(tables)}; name one with split.train")
    return found


def _named(name: str, role: str, tables: Mapping[str, Table], source: str) -> Table:
    if name in tables and name:
        return tables[name]
    if _suffix(name) or Path(name).expanduser().exists():
        return _only(read_file(Path(name).expanduser()), name)
    there = f"splits: {', '.join(tables)}" if list(tables) != [""] else "it has no named splits"
    raise DataError(f"{source} has no split '{name}' for {role}{closest(name, tables)} {there}; or give a file")


def _only(tables: Mapping[str, Table], name: str) -> Table:
    if len(tables) != 1:
        raise DataError(f"{name} holds the splits {', '.join(tables)}; give a file with one table for a single split")
    return next(iter(tables.values()))


def _tables(source: str) -> dict[str, Table]:
    """Every split of a source by its name; "" where it has none."""
    if source in packaged.PACKAGED:
        return {k: table(source, rows) for k, rows in packaged.read_rows(source).items()}
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return read_file(path)
    if _suffix(source) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no file {source}{closest(path.name, beside).removesuffix(';')}")
    if "/" in source:
        return _hub(source)
    raise DataError(f"unknown source '{source}'{closest(source, packaged.PACKAGED)} give a file, a folder, a hub name "
                    f"(owner/name), or a packaged set: {', '.join(packaged.PACKAGED)}")  # fmt: skip


def table(name: str, rows: Sequence[Row], lines: Sequence[int] | None = None) -> Table:
    """Rows with the columns that any of them has. Raises DataError when there are none."""
    if not rows:
        raise DataError(f"{name} has no rows")
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    whole = [row if len(row) == len(columns) else {c: row.get(c) for c in columns} for row in rows]
    return Table(name, whole, columns, lines)


def read_file(path: Path) -> dict[str, Table]:
    """The tables of one file: one named "", or the splits of a JSON object of lists. Raises DataError."""
    if not path.is_file():
        raise DataError(f"no file {path}")
    reader = READERS.get(_suffix(path.name))
    if reader is None:
        raise DataError(f"{path} is none of the files read here: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return reader(path)


def _suffix(name: str) -> str:
    suffix = Path(name).suffix.lower()
    return suffix if suffix in READERS else ""


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}:{line}: a NUL byte; the file is no text, or saved as UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _csv(path: Path) -> dict[str, Table]:
    return {"": _delimited(path, _text(path), ",", csv.QUOTE_MINIMAL)}


def _tsv(path: Path) -> dict[str, Table]:
    """A quotation mark is an ordinary character in most files with tabs, so quoting is tried second."""
    text = _text(path)
    try:
        return {"": _delimited(path, text, "\t", csv.QUOTE_NONE)}
    except DataError as error:
        try:
            return {"": _delimited(path, text, "\t", csv.QUOTE_MINIMAL)}
        except DataError:
            raise error from None


def _delimited(path: Path, text: str, delimiter: str, quoting: Any) -> Table:
    found = list(delimited(path, io.StringIO(text, newline=""), delimiter, quoting))
    return table(str(path), [row for _, row in found], [line for line, _ in found])


def delimited(path: Path, text: Iterable[str], delimiter: str, quoting: Any) -> Iterator[tuple[int, Row]]:
    """The rows in the lines of `text`, each with the line it begins at. Raises DataError where one is broken."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    line, empty = 1, True
    try:
        for cells in reader:
            if header is None and cells:
                header = [cell.strip() for cell in cells]
                _check_header(path, header, delimiter)
            elif header is not None and cells:
                if len(cells) != len(header):
                    raise DataError(f"{path}:{line}: {len(cells)} fields, but the header has {len(header)}: "
                                    f"{', '.join(header)}; a field that holds {delimiter!r} needs quotes")  # fmt: skip
                yield line, dict(zip(header, cells, strict=True))
                empty = False
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken row: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if empty:
        raise DataError(f"{path} has no rows" + (" beneath its header" if header else ""))


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    others = [other for other in ",;\t|" if other != delimiter and other in header[0]]
    if len(header) == 1 and others:
        shown = {"\t": "tabs"}.get(others[0], repr(others[0]))
        wanted = {"\t": "tabs (.tsv)", ",": "commas (.csv)"}[delimiter]
        raise DataError(
            f"{path} looks like it is separated by {shown}, this suffix means {wanted}: rename or save it anew"
        )
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns called '{twice[0]}'")


def _objects(path: Path, found: Iterable[tuple[int, Any]], what: str) -> Table:
    rows = list(_checked(path, found, what))
    return table(str(path), [row for _, row in rows], [line for line, _ in rows] if what == ":" else None)


def _checked(path: Path, found: Iterable[tuple[int, Any]], what: str) -> Iterator[tuple[int, Row]]:
    for number, value in found:
        if not isinstance(value, dict):
            raise DataError(f"{path}{what}{number}: expected an object of columns, found {type(value).__name__}")
        yield number, value


def _jsonl(path: Path) -> dict[str, Table]:
    rows = list(objects(path, _text(path).split("\n")))
    return {"": table(str(path), [row for _, row in rows], [line for line, _ in rows])}


def objects(path: Path, text: Iterable[str]) -> Iterator[tuple[int, Row]]:
    """The rows in the lines of `text`, a JSON object each, with their lines. Raises DataError where one is broken."""

    def values() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(text, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: broken row: {error.msg} at column {error.colno}") from None

    return _checked(path, values(), ":")


def _json(path: Path) -> dict[str, Table]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}; one object a line is a .jsonl file") from None
    if isinstance(value, list):
        return {"": _objects(path, enumerate(value, 1), " row ")}
    if isinstance(value, dict) and value and all(isinstance(rows, list) for rows in value.values()):
        return {name: _objects(path, enumerate(rows, 1), f" {name} row ") for name, rows in value.items()}
    raise DataError(f"{path} must be a list of objects, or an object with such a list for each split")


def _parquet(path: Path) -> dict[str, Table]:
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return {"": _dataset(str(path), Dataset(pyarrow.parquet.read_table(path)))}
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], dict[str, Table]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _folder(path: Path) -> dict[str, Table]:
    """A directory of `save_to_disk`, or one of files that begin with their split: `train.csv`, `test-0.parquet`."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from datasets import load_from_disk

        return _datasets(str(path), load_from_disk(str(path)))
    files = [f for f in sorted(path.rglob("*")) if _suffix(f.name) and not re.match(r"[._]|dataset_infos?\.", f.name)]
    if not files:
        raise DataError(f"{path} holds no data set and none of the files read here: {', '.join(READERS)}")
    if len(files) == 1:
        return read_file(files[0])
    shards: dict[str, list[Table]] = {}
    for file in files:
        shards.setdefault(re.split(r"[-.]|_\d", file.name)[0], []).append(_only(read_file(file), str(file)))
    return {name: _joined(str(path / name), several) for name, several in shards.items()}


def _joined(name: str, several: Sequence[Table]) -> Table:
    return several[0] if len(several) == 1 else table(name, [row for one in several for row in one.rows])


def _hub(source: str) -> dict[str, Table]:
    import datasets

    name, _, subset = source.partition(":")
    try:
        return _datasets(source, datasets.load_dataset(name, subset or None))
    except DataError:
        raise
    except Exception as error:  # the hub's client raises anything from ConnectionError to ValueError
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"no file or folder '{source}' here, and the hub has not given it: {why}") from None


def _datasets(name: str, found: Any) -> dict[str, Table]:
    if isinstance(found, Mapping):
        return {str(split): _dataset(f"{name} {split}", rows) for split, rows in found.items()}
    return {"": _dataset(name, found)}


def _dataset(name: str, found: Any) -> Table:
    return table(name, named(found))


def named(found: Any) -> list[Row]:
    """Rows of a `datasets.Dataset`; classes stored as numbers get their names, -1 (no label) becomes None."""
    rows: list[Row] = found.to_list()
    for column, feature in found.features.items():
        names = getattr(feature, "names", None)
        inner = getattr(getattr(feature, "feature", None), "names", None)
        for row in rows if names or inner else ():
            value = row[column]
            if names and not is_missing(value):
                row[column] = names[value] if value >= 0 else None
            elif inner and value is not None:
                row[column] = [inner[item] for item in value]
    return rows
