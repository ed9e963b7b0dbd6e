"""Several prompts in one directory: a sub-directory each, their order, and which of them one method holds together.

The format is specified in docs/artifact.md.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from torch import Tensor

from softprompts.artifacts import peft_files
from softprompts.artifacts.io import read_bytes, read_json, write_json, write_tensors
from softprompts.artifacts.manifest import MANIFEST
from softprompts.config import closest
from softprompts.errors import ArtifactError

ORDER = "tasks.json"


class CollectionMember(NamedTuple):
    """Where one prompt is: a directory, and which of those in it; `place` counts all that were found."""

    place: int
    path: Path
    task: int | None


@dataclass(frozen=True)
class PeftFiles:
    """PEFT's two files for a group."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class CollectionIndex:
    """Sub-directories in the order that task_ids count; groups: those of them that one method holds together."""

    tasks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()


def write(path: Path, order: CollectionIndex, peft: PeftFiles | str | None) -> None:
    """Write `tasks.json`, and PEFT's files for the group beside it, or why there are none.

    Raises ArtifactError for a disk that does not take them.
    """
    values: dict[str, Any] = {"tasks": list(order.tasks)}
    if order.groups:
        values["groups"] = [list(group) for group in order.groups]
    if isinstance(peft, PeftFiles):
        write_tensors(path / peft_files.TENSORS, peft.tensors, {"format": "pt"})
        write_json(path / peft_files.CONFIG, peft.config)
        values |= {"peft": True, "sha256": {peft_files.TENSORS: _sum(path / peft_files.TENSORS)}}
    elif peft is not None:
        values["peft"] = peft
    if not isinstance(peft, PeftFiles) and (path / ORDER).is_file():  # a group may have been saved here before
        for name in (peft_files.TENSORS, peft_files.CONFIG):
            (path / name).unlink(missing_ok=True)
    write_json(path / ORDER, values)


def read(path: Path) -> CollectionIndex | None:
    """What `tasks.json` says; None where there is none, or the directory is one artifact itself.

    Raises ArtifactError for what `write` did not write, and where PEFT saved over its tensor file later.
    """
    if (path / MANIFEST).is_file() or not (path / ORDER).is_file():
        return None
    values = read_json(path / ORDER)
    tasks: Any = values.get("tasks") if isinstance(values, dict) else None
    if not _names(tasks):
        raise ArtifactError(f"{path / ORDER} must list the sub-directories of its tasks")
    groups: Any = values.get("groups", [])
    grouped = [name for group in groups for name in group] if _lists(groups) else [""]
    if len(set(grouped)) != len(grouped) or not set(grouped) <= set(tasks):
        raise ArtifactError(f"{path / ORDER}: each of groups must list some of its tasks, and no task twice")
    theirs, sums = path / peft_files.TENSORS, values.get("sha256")
    if theirs.is_file() and _sum(theirs) != (sums.get(theirs.name) if isinstance(sums, dict) else None):
        raise ArtifactError(
            f"{theirs} was not written by softprompts: PEFT saved here later; delete {ORDER} to load PEFT's prompts, "
            f"or {peft_files.CONFIG} and {theirs.name} to load ours"
        )
    return CollectionIndex(tuple(tasks), tuple(map(tuple, groups)))


def units(path: Path) -> list[list[CollectionMember]]:
    """The prompts in a directory, ours or PEFT's, those together that one method holds.

    Raises ArtifactError as `read` does.
    """
    order = read(path)
    if order is not None:
        parts = {name: CollectionMember(place, path / name, None) for place, name in enumerate(order.tasks)}
        group_of = {name: group for group in order.groups for name in group}
        return [[parts[n] for n in group] for group in dict.fromkeys(group_of.get(n, (n,)) for n in order.tasks)]
    count = 1
    if not (path / MANIFEST).is_file() and (path / peft_files.CONFIG).is_file():
        count = peft_files.count(read_json(path / peft_files.CONFIG))
    return [[CollectionMember(place, path, place if count > 1 else None) for place in range(count)]]


def find(path: Path, task: int | str | None) -> tuple[Path, int | str | None]:
    """The directory that holds `task`, by name or place, and what is left to choose in it.

    Raises ArtifactError where it is none of several, or which one is not said, and for a missing directory.
    """
    if not os.path.isdir(path):
        raise ArtifactError(_missing(path))
    order = read(path)
    if order is None:
        return path, task
    if isinstance(task, int) and 0 <= task < len(order.tasks):
        return path / order.tasks[task], None
    if isinstance(task, str) and folder(task) in order.tasks:
        return path / folder(task), None
    here = f"its prompts are in {', '.join(order.tasks)}"
    if task is None:
        raise ArtifactError(f"{path} holds {len(order.tasks)} prompts; give the directory of one: {here}")
    raise ArtifactError(f"{path} holds no prompt {task!r}{closest(str(task), order.tasks)} {here}")


def refuse(path: Path) -> None:
    """Raise ArtifactError where one artifact would be written among the sub-directories of several."""
    if read(path) is not None:
        raise ArtifactError(f"{path} is not empty and is not an artifact: it holds several; give another directory")


def is_ours(path: Path) -> bool:
    """Whether the directory is an artifact of ours, or holds several in their order."""
    return (path / MANIFEST).is_file() or (path / ORDER).is_file()


def holds_one(path: Path) -> bool:
    """Whether the directory itself is an artifact, ours or PEFT's."""
    if (path / MANIFEST).is_file():
        return True
    return (path / peft_files.CONFIG).is_file() and not (path / ORDER).is_file()


def folder(task: str) -> str:
    """A task's name as the name of its sub-directory."""
    quoted = quote(task, safe=" ")
    return quoted if quoted.strip(".") else quoted.replace(".", "%2E")


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, str) and n == Path(n).name and n.strip(".") for n in value)


def _lists(value: Any) -> bool:
    return isinstance(value, list) and all(_names(part) for part in value)


def _sum(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def _missing(path: Path) -> str:
    if os.path.exists(path):
        return f"{path} is a file; give the directory of an artifact"
    # a save that is killed between its two renames leaves the old artifact under this name
    kept: list[Path] = []
    with contextlib.suppress(OSError):
        kept = sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name}.old-"))
    return f"no directory {path}" + (f"; an interrupted save left the artifact in {kept[-1]}" if kept else "")
