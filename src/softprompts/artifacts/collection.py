"""Several prompts in one directory: a sub-directory each, their order, and which of them share a method's tensors.

docs/artifact.md specifies the format.
"""

import contextlib
import hashlib
import itertools
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

INDEX = "tasks.json"


class CollectionMember(NamedTuple):
    """One prompt of a directory.

    Attributes:
        position: The position of the prompt among all prompts of the collection.
        path: The directory with its files.
        task: Its position in that directory, where PEFT's files hold several prompts; else None.
    """

    position: int
    path: Path
    task: int | None


@dataclass(frozen=True)
class PeftFiles:
    """PEFT's two files for the tasks of a group.

    Attributes:
        config: The values of `adapter_config.json`.
        tensors: The tensors of `adapter_model.safetensors`.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class CollectionIndex:
    """The contents of `tasks.json`.

    Attributes:
        tasks: The sub-directories, in the order of `task_ids`.
        groups: The sub-directories whose prompts share tensors of one method, for each such group.
    """

    tasks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()


def write_index(path: Path, index: CollectionIndex, peft: PeftFiles | str | None) -> None:
    """Write `tasks.json`, and PEFT's files for the group beside it.

    Args:
        path: The directory of the collection.
        index: The sub-directories and groups.
        peft: PEFT's files for the group, or why there are none; None where there is no group.

    Raises:
        ArtifactError: The disk does not take the files.
    """
    values: dict[str, Any] = {"tasks": list(index.tasks)}
    if index.groups:
        values["groups"] = list(map(list, index.groups))
    if isinstance(peft, PeftFiles):
        write_tensors(path / peft_files.TENSORS, peft.tensors, {"format": "pt"})
        write_json(path / peft_files.CONFIG, peft.config)
        values["peft"] = True
        values["sha256"] = {peft_files.TENSORS: _sha256(path / peft_files.TENSORS)}
    else:
        if peft is not None:
            values["peft"] = peft
        if (path / INDEX).is_file():  # an earlier save may have left PEFT's files of a group
            for name in (peft_files.TENSORS, peft_files.CONFIG):
                (path / name).unlink(missing_ok=True)
    write_json(path / INDEX, values)


def read_index(path: Path) -> CollectionIndex | None:
    """The contents of `tasks.json`; None where there is none, or where the directory itself is one artifact.

    Raises:
        ArtifactError: The file is not as `write_index` writes it, or PEFT saved over its tensor file later.
    """
    if (path / MANIFEST).is_file() or not (path / INDEX).is_file():
        return None
    values = read_json(path / INDEX)
    tasks: Any = values.get("tasks") if isinstance(values, dict) else None
    if not _are_names(tasks):
        raise ArtifactError(f"{path / INDEX} must list the sub-directories of its tasks")
    groups: Any = values.get("groups", [])
    if not _are_groups(groups, tasks):
        raise ArtifactError(f"{path / INDEX}: each of groups must list some of its tasks, and no task twice")
    adapter, sums = path / peft_files.TENSORS, values.get("sha256")
    expected = sums.get(adapter.name) if isinstance(sums, dict) else None
    if adapter.is_file() and _sha256(adapter) != expected:
        raise ArtifactError(
            f"{adapter} was not written by softprompts: PEFT saved here later; delete {INDEX} to load PEFT's prompts, "
            f"or {peft_files.CONFIG} and {adapter.name} to load ours"
        )
    return CollectionIndex(tuple(tasks), tuple(map(tuple, groups)))


def member_groups(path: Path) -> list[list[CollectionMember]]:
    """The prompts in a directory, written by softprompts or PEFT; those that share a method's tensors are together.

    Raises:
        ArtifactError: As in `read_index`.
    """
    index = read_index(path)
    if index is not None:
        members = {name: CollectionMember(i, path / name, None) for i, name in enumerate(index.tasks)}
        group_of: dict[str, tuple[str, ...]] = {name: (name,) for name in index.tasks}
        for group in index.groups:
            group_of |= dict.fromkeys(group, group)
        return [[members[name] for name in group] for group in dict.fromkeys(group_of.values())]
    count = 1
    if not (path / MANIFEST).is_file() and (path / peft_files.CONFIG).is_file():
        count = peft_files.count_tasks(read_json(path / peft_files.CONFIG))
    if count == 1:
        return [[CollectionMember(0, path, None)]]
    return [[CollectionMember(position, path, position) for position in range(count)]]


def find_task(path: Path, task: int | str | None) -> tuple[Path, int | str | None]:
    """The directory that holds a task's prompt, and what remains to be chosen in it.

    Args:
        path: The directory of one artifact, or of several.
        task: The name or position of the task; None where there is only one.

    Raises:
        ArtifactError: The directory is missing, has no such task, or has several and `task` is None.
    """
    if not os.path.isdir(path):
        raise ArtifactError(_missing(path))
    index = read_index(path)
    if index is None:
        return path, task
    if isinstance(task, int) and 0 <= task < len(index.tasks):
        return path / index.tasks[task], None
    if isinstance(task, str) and folder_name(task) in index.tasks:
        return path / folder_name(task), None
    prompts = f"its prompts are in {', '.join(index.tasks)}"
    if task is None:
        raise ArtifactError(f"{path} holds {len(index.tasks)} prompts; give the directory of one: {prompts}")
    raise ArtifactError(f"{path} holds no prompt {task!r}{closest(str(task), index.tasks)} {prompts}")


def refuse_collection(path: Path) -> None:
    """Raise ArtifactError where one artifact would be written among the sub-directories of several."""
    if read_index(path) is not None:
        raise ArtifactError(f"{path} is not empty and is not an artifact: it holds several; give another directory")


def written_by_softprompts(path: Path) -> bool:
    """Whether softprompts wrote the directory: one artifact or several."""
    return (path / MANIFEST).is_file() or (path / INDEX).is_file()


def is_artifact(path: Path) -> bool:
    """Whether the directory itself is an artifact, written by softprompts or PEFT."""
    if (path / MANIFEST).is_file():
        return True
    return (path / peft_files.CONFIG).is_file() and not (path / INDEX).is_file()


def folder_name(task: str) -> str:
    """The name of a task's sub-directory: its own name, percent-encoded."""
    quoted = quote(task, safe=" ")
    return quoted if quoted.strip(".") else quoted.replace(".", "%2E")


def _are_names(value: Any) -> bool:
    """Whether a JSON value is a list of names of sub-directories."""
    if not isinstance(value, list):
        return False
    return all(isinstance(name, str) and name == Path(name).name and name.strip(".") for name in value)


def _are_groups(value: Any, tasks: list[str]) -> bool:
    """Whether a JSON value is a list of lists with names of tasks, each at most once."""
    if not isinstance(value, list) or not all(map(_are_names, value)):
        return False
    names = list(itertools.chain.from_iterable(value))
    return len(set(names)) == len(names) and set(names) <= set(tasks)


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def _missing(path: Path) -> str:
    """What is wrong with a path that is not a directory."""
    if os.path.exists(path):
        return f"{path} is a file; give the directory of an artifact"
    # A save that is killed between its two renames leaves the old artifact under this name.
    old: list[Path] = []
    with contextlib.suppress(OSError):
        old = sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name}.old-"))
    return f"no directory {path}" + (f"; an interrupted save left the artifact in {old[-1]}" if old else "")
