"""Answers written to a file line by line, so that an interrupted run goes on where it stopped."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from softprompts.cli.screen import finite
from softprompts.errors import ConfigError

Row = dict[str, Any]


@contextlib.contextmanager
def writing(
    out: Path | None, rows: Iterator[Row], columns: tuple[str, ...], made_by: Mapping[str, Any]
) -> Iterator[tuple[int, Callable[[Row], None]]]:
    """How many of `rows` are answered already, and what writes the next answer; these rows are taken off `rows`.

    out: the file, None for standard output. Lines go to `out` with `.partial` behind its name, which becomes `out` when
    all is done; an interrupted run leaves it, and the next one goes on behind it if it has the same first `rows`, told
    by `columns`, and is `made_by` the same (strict JSON, kept beside it).
    Raises ConfigError where that is not so.
    """
    if out is None:
        yield 0, lambda line: print(_json(line), flush=True)
        return
    partial, beside = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")
    done = 0
    if partial.exists():
        done = _taken_up(partial, beside, rows, columns, made_by)
    else:
        beside.write_text(json.dumps(made_by), encoding="utf-8")
    with partial.open("a", encoding="utf-8", newline="\n") as file:

        def write(line: Row) -> None:
            file.write(_json(line) + "\n")
            file.flush()

        yield done, write
        os.fsync(file.fileno())
    os.replace(partial, out)
    beside.unlink(missing_ok=True)


def digest(folder: Path) -> str:
    """What tells one saved prompt from another: a hash of its tensors and of what it says about itself."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json")):
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _json(line: Row) -> str:
    return json.dumps(finite(line), ensure_ascii=False)


def _taken_up(
    partial: Path, beside: Path, rows: Iterator[Row], columns: tuple[str, ...], made_by: Mapping[str, Any]
) -> int:
    """The lines of `partial`, once they are found to answer the first of `rows`; half a line at its end goes."""
    else_ = "; delete it, or give another --out"
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    differs = [key for key in made_by if before.get(key) != made_by[key]]
    if differs:
        raise ConfigError(f"{partial} was begun with another {', '.join(differs)}{else_}")
    count = end = 0
    with partial.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
            row = next(rows, None)
            if row is None or not _answers(line, row, columns):
                raise ConfigError(f"{partial}:{count} answers another row than the one that is given now{else_}")
        file.truncate(end)
    return count


def _answers(line: bytes, row: Row, columns: tuple[str, ...]) -> bool:
    """Whether a written line is the answer to `row`."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    wanted = json.loads(_json({column: row[column] for column in columns}))
    return isinstance(found, dict) and {column: found.get(column) for column in columns} == wanted
