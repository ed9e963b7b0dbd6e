"""Rows of a file one after the other, for files that are larger than memory."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

from softprompts.data import sources
from softprompts.errors import DataError
from softprompts.types import Row

BATCH = 512
"""Rows of a parquet file that are in memory together."""


def stream_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order, read as they are taken; csv, tsv, jsonl and parquet, other files as a whole.

    Raises DataError as `sources.read_file` does: at once for a file that is missing, empty or of another kind, and for
    a broken row, which it names by its line, once the rows before it have been taken.
    """
    if not path.is_file():
        raise DataError(f"no file {path}")
    if path.suffix.lower() not in sources.READERS:
        raise DataError(f"{path} is none of the files read here: {', '.join(sources.READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    if path.suffix.lower() == ".json":
        return (row for one in sources.read_file(path).values() for row in one.rows)
    rows = _READERS[path.suffix.lower()](path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} has no rows")
    return itertools.chain([first], rows)


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a text file with their ends. Raises DataError, with the line, for what is no UTF-8 text."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise DataError(
                    f"{path}:{number}: a NUL byte; the file is no text, or saved as UTF-16: save it as UTF-8"
                )
            try:
                line.encode()
            except UnicodeEncodeError as error:  # what is no UTF-8 was read as half a surrogate pair
                byte = ord(line[error.start]) - 0xDC00
                raise DataError(f"{path}:{number}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
            yield line


def _csv(path: Path) -> Iterator[Row]:
    return (row for _, row in sources.delimited(path, _lines(path, ""), ",", csv.QUOTE_MINIMAL))


def _tsv(path: Path) -> Iterator[Row]:
    """Quotation marks as `sources` reads them: ordinary characters, unless the file can only be read with quoting."""
    quoting = csv.QUOTE_NONE
    if not _readable(path, csv.QUOTE_NONE) and _readable(path, csv.QUOTE_MINIMAL):
        quoting = csv.QUOTE_MINIMAL
    return (row for _, row in sources.delimited(path, _lines(path, ""), "\t", quoting))


def _readable(path: Path, quoting: int) -> bool:
    """Whether every row of a file with tabs can be read like this; none is kept."""
    try:
        for _ in sources.delimited(path, _lines(path, ""), "\t", quoting):
            pass
    except DataError:
        return False
    return True


def _jsonl(path: Path) -> Iterator[Row]:
    return (row for _, row in sources.objects(path, (line.removesuffix("\n") for line in _lines(path, "\n"))))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet
    from datasets import Dataset

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for part in file.iter_batches(BATCH):
                whole = pyarrow.Table.from_batches([part], schema=file.schema_arrow)
                yield from sources.named(Dataset(whole))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None


_READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
