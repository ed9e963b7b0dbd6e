"""Where rows come from: csv, tsv, json, jsonl and parquet files, folders, the hub, and the packaged data sets."""

import csv
import itertools
import json
import os
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

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""The names of each split in sources."""

PARQUET_BATCH = 4096
"""Rows of a parquet file that are in memory together while it is streamed."""

NumberedRows = Iterator[tuple[int, Row]]
"""Rows, each with the line at which it begins, from 1."""


def read_splits(config: TaskConfig) -> Splits:
    """Read the training, validation and test rows from `config.source`.

    A split that `config.split` names is one of the source's, or a file. A split without a name in the configuration is
    the source's own of that name. A missing split is drawn from the training rows by a seeded hash of the text: no text
    is in two splits, and the order of the rows does not matter. The source's own test split stays whole: other splits
    lose the rows with the same text.

    Args:
        config: The task; a packaged source completes it.

    Returns:
        The rows of the three splits, their columns, and notes on rows that were left out.

    Raises:
        DataError: A file, column, split or label is missing, a file is empty or has another delimiter, a row is broken
            (the message has its file and line), or the source is unknown.
    """
    config = packaged.with_packaged_defaults(config)
    tables = _assign_splits(_read_source(config.source), config.split, config.source)
    text_columns: tuple[str, ...] = ()
    for table in tables.values():
        template = default_template(table.columns, config.label) if config.template is None else config.template
        text_columns = (*template_columns(template), *template_columns(config.pair))
        for column in text_columns:
            require_column(column, table.columns, "template", table.name)
        require_column(config.label, table.columns, "label", table.name)
        check_labels(table, config)
    return divide(tables, config, tuple(dict.fromkeys(text_columns or (config.label,))))


def read_file(path: Path) -> dict[str, Table]:
    """Read a whole file.

    Args:
        path: A csv, tsv, jsonl, json or parquet file.

    Returns:
        One table with the name "", or the splits of a JSON object of lists.

    Raises:
        DataError: The file is missing, empty or of another format, or a row is broken.
    """
    suffix = _check_file(path)
    if suffix == ".json":
        return _read_json(path)
    rows, lines = list[Row](), list[int]()
    for line, row in READERS[suffix](path):
        rows.append(row)
        lines.append(line)
    return {"": make_table(str(path), rows, None if suffix == ".parquet" else lines)}


def stream_rows(path: Path) -> Iterator[Row]:
    """Read a file row by row, for files that are larger than memory.

    Args:
        path: A csv, tsv, jsonl or parquet file; a json file is read as a whole.

    Returns:
        The rows in order. Each row is read when it is taken.

    Raises:
        DataError: At once where the file is missing, empty or of another format. The iterator raises it for a broken
            row, after the rows before it, with the message of `read_file`.
    """
    suffix = _check_file(path)
    if suffix == ".json":
        return itertools.chain.from_iterable(table.rows for table in _read_json(path).values())
    rows = (row for _, row in READERS[suffix](path))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} has no rows")
    return itertools.chain([first], rows)


def make_table(name: str, rows: Sequence[Row], lines: Sequence[int] | None = None) -> Table:
    """Make a table with the columns that any of the rows has; a cell that a row lacks is None.

    Args:
        name: The file or split, for messages.
        rows: The rows.
        lines: The line at which each row begins, where it is known.

    Returns:
        The table.

    Raises:
        DataError: There are no rows.
    """
    if not rows:
        raise DataError(f"{name} has no rows")
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    blank = dict.fromkeys(columns)
    complete_rows = [row if len(row) == len(columns) else {**blank, **row} for row in rows]
    return Table(name, complete_rows, tuple(columns), lines)


# Which table is which split


def _assign_splits(tables: Mapping[str, Table], split: SplitConfig, source: str) -> dict[str, Table]:
    """Find the table of each split; missing splits are drawn from "train" later."""
    names = {role: name for role in SPLIT_NAMES if (name := getattr(split, role))}
    for name in names.values():
        if list(names.values()).count(name) > 1:
            raise DataError(f"{source}: '{name}' is named for more than one of train, validation and test")
    assigned: dict[str, Table] = {}
    for role, usual_names in SPLIT_NAMES.items():
        if role in names:
            assigned[role] = _named_split(names[role], role, tables, source)
            continue
        for name in usual_names:
            if name in tables and name not in names.values():
                assigned[role] = tables[name]
                break
    if "train" not in assigned and list(tables) == [""]:
        assigned["train"] = tables[""]
    if "train" not in assigned:
        raise DataError(f"{source} has no split to train on; splits: {', '.join(tables)}; name one with split.train")
    return assigned


def _named_split(name: str, role: str, tables: Mapping[str, Table], source: str) -> Table:
    """The split of a source, or the file, that the configuration names."""
    if name in tables and name:
        return tables[name]
    if _format_of(name) or Path(name).expanduser().exists():
        return _single_table(read_file(Path(name).expanduser()), name)
    splits = f"splits: {', '.join(tables)}" if list(tables) != [""] else "it has no named splits"
    raise DataError(f"{source} has no split '{name}' for {role}{closest(name, tables)} {splits}; or give a file")


def _single_table(tables: Mapping[str, Table], name: str) -> Table:
    if len(tables) != 1:
        raise DataError(f"{name} holds the splits {', '.join(tables)}; give a file with one table for a single split")
    return next(iter(tables.values()))


# Kinds of sources


def _read_source(source: str) -> dict[str, Table]:
    """Every split of a source by its name; "" where it has none."""
    if source in packaged.PACKAGED:
        return {split: make_table(source, rows) for split, rows in packaged.read_rows(source).items()}
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return read_file(path)
    if _format_of(source) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        raise DataError(f"no file {source}{closest(path.name, siblings).removesuffix(';')}")
    if "/" in source:
        return _read_hub(source)
    raise DataError(f"unknown source '{source}'{closest(source, packaged.PACKAGED)} give a file, a folder, a hub name "
                    f"(owner/name), or a packaged set: {', '.join(packaged.PACKAGED)}")  # fmt: skip


def _read_folder(path: Path) -> dict[str, Table]:
    """Read a directory of `save_to_disk`, or one whose files begin with their split: `train.csv`, `test-0.parquet`."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from datasets import load_from_disk

        return _tables_of(str(path), load_from_disk(str(path)))
    files = []
    for file in sorted(path.rglob("*")):
        if _format_of(file.name) and not re.match(r"[._]|dataset_infos?\.", file.name):
            files.append(file)
    if not files:
        raise DataError(f"{path} holds no data set and none of the files read here: {', '.join(FORMATS)}")
    if len(files) == 1:
        return read_file(files[0])
    shards: dict[str, list[Table]] = {}
    for file in files:
        split = re.split(r"[-.]|_\d", file.name)[0]
        shards.setdefault(split, []).append(_single_table(read_file(file), str(file)))
    return {split: _join_shards(str(path / split), tables) for split, tables in shards.items()}


def _join_shards(name: str, shards: Sequence[Table]) -> Table:
    if len(shards) == 1:
        return shards[0]
    return make_table(name, list(itertools.chain.from_iterable(shard.rows for shard in shards)))


def _read_hub(source: str) -> dict[str, Table]:
    """Read a data set of the hub, named `owner/name` or `owner/name:subset`."""
    import datasets

    name, _, subset = source.partition(":")
    try:
        return _tables_of(source, datasets.load_dataset(name, subset or None))
    except DataError:
        raise
    except Exception as error:  # the hub's client raises anything from ConnectionError to ValueError
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"no file or folder '{source}' here, and the hub has not given it: {reason}") from None


def _tables_of(name: str, data: Any) -> dict[str, Table]:
    """The tables of a `datasets.Dataset` or `datasets.DatasetDict`."""
    if isinstance(data, Mapping):
        return {str(split): make_table(f"{name} {split}", _dataset_rows(rows)) for split, rows in data.items()}
    return {"": make_table(name, _dataset_rows(data))}


def _dataset_rows(dataset: Any) -> list[Row]:
    """The rows of a `datasets.Dataset`; a class number becomes its name, and -1 (no label) becomes None."""
    rows: list[Row] = dataset.to_list()
    for column, feature in dataset.features.items():
        class_names = getattr(feature, "names", None)
        item_names = getattr(getattr(feature, "feature", None), "names", None)
        for row in rows if class_names or item_names else ():
            value = row[column]
            if class_names and not is_missing(value):
                row[column] = class_names[value] if value >= 0 else None
            elif item_names and value is not None:
                row[column] = [item_names[item] for item in value]
    return rows


# Readers of files: one for each format, whether the file is read whole or streamed


def _read_csv(path: Path) -> NumberedRows:
    return _read_delimited(path, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> NumberedRows:
    """Read a quotation mark as an ordinary character, unless only quoting makes the file readable.

    Most files with tabs do not quote. The two passes keep no row.
    """
    quoted = not _is_readable(path, "\t", csv.QUOTE_NONE) and _is_readable(path, "\t", csv.QUOTE_MINIMAL)
    return _read_delimited(path, "\t", csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)


def _is_readable(path: Path, delimiter: str, quoting: int) -> bool:
    """Whether every row of the file can be read like this."""
    try:
        for _ in _read_delimited(path, delimiter, quoting):
            pass
    except DataError:
        return False
    return True


def _read_delimited(path: Path, delimiter: str, quoting: Any) -> NumberedRows:
    """Read rows below a header; a row may span several lines."""
    size_limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    line = 1
    is_empty = True
    try:
        for cells in reader:
            if header is None and cells:
                header = list(map(str.strip, cells))
                _check_header(path, header, delimiter)
            elif header is not None and cells:
                if len(cells) != len(header):
                    raise DataError(f"{path}:{line}: {len(cells)} fields, but the header has {len(header)}: "
                                    f"{', '.join(header)}; a field that holds {delimiter!r} needs quotes")  # fmt: skip
                yield line, dict(zip(header, cells, strict=True))
                is_empty = False
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken row: {error}") from None
    finally:
        csv.field_size_limit(size_limit)
    if is_empty:
        raise DataError(f"{path} has no rows" + (" beneath its header" if header else ""))


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    """Raise DataError for a header of another delimiter, and for two columns of the same name."""
    other_delimiters = [other for other in ",;\t|" if other != delimiter and other in header[0]]
    if len(header) == 1 and other_delimiters:
        actual = {"\t": "tabs"}.get(other_delimiters[0], repr(other_delimiters[0]))
        expected = {"\t": "tabs (.tsv)", ",": "commas (.csv)"}[delimiter]
        raise DataError(
            f"{path} looks like it is separated by {actual}, this suffix means {expected}: rename or save it anew"
        )
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path} has two columns called '{name}'")


def _read_jsonl(path: Path) -> NumberedRows:
    """Read one JSON object per line; empty lines do not count."""
    for number, line in enumerate(_lines(path, newline="\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.removesuffix("\n"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: broken row: {error.msg} at column {error.colno}") from None
        yield number, _require_object(value, f"{path}:{number}")


def _read_parquet(path: Path) -> NumberedRows:
    """Read a parquet file batch by batch; the numbers count rows."""
    import pyarrow.parquet
    from datasets import Dataset

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            begin = 1
            for batch in file.iter_batches(PARQUET_BATCH):
                rows = _dataset_rows(Dataset(pyarrow.Table.from_batches([batch], schema=file.schema_arrow)))
                yield from enumerate(rows, begin)
                begin += len(rows)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""The readers of formats that have one table."""

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""The suffixes of the files that are read here."""


def _read_json(path: Path) -> dict[str, Table]:
    """Read a list of objects, or an object with such a list for each split."""
    try:
        value = json.loads("".join(_lines(path, newline="\n")))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}; one object a line is a .jsonl file") from None
    if isinstance(value, list):
        return {"": _json_table(path, value, f"{path} row")}
    if isinstance(value, dict) and value and all(isinstance(values, list) for values in value.values()):
        return {split: _json_table(path, values, f"{path} {split} row") for split, values in value.items()}
    raise DataError(f"{path} must be a list of objects, or an object with such a list for each split")


def _json_table(path: Path, values: Iterable[Any], place: str) -> Table:
    rows = [_require_object(value, f"{place} {number}") for number, value in enumerate(values, 1)]
    return make_table(str(path), rows)


def _require_object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object of columns, found {type(value).__name__}")
    return value


def _lines(path: Path, newline: str) -> Iterator[str]:
    """Read the lines of a text file with their ends.

    Args:
        path: The file.
        newline: What ends a line, as for `open`.

    Yields:
        One line after the other.

    Raises:
        DataError: A line is no UTF-8 text; the message has its number.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise DataError(f"{path}:{number}: a NUL byte; the file is not text, or is UTF-16; save it as UTF-8")
            try:
                line.encode()
            except UnicodeEncodeError as error:  # a byte that is not UTF-8 was read as half a surrogate pair
                byte = ord(line[error.start]) - 0xDC00
                raise DataError(f"{path}:{number}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
            yield line


def _check_file(path: Path) -> str:
    """The suffix of a file that can be read here. Raises DataError where it is missing, empty or of another format."""
    if not path.is_file():
        raise DataError(f"no file {path}")
    suffix = _format_of(path.name)
    if not suffix:
        raise DataError(f"{path} is none of the files read here: {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return suffix


def _format_of(name: str) -> str:
    """The suffix of a file name where it is one of `FORMATS`, else ""."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in FORMATS else ""
