"""A trained multitask prompt as the start of another: read from PEFT's file, from PEFT's directory or from ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompts.artifacts import artifact, collection, peft_files
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.io import read_tensors
from softprompts.config import closest
from softprompts.errors import ArtifactError, ConfigError
from softprompts.types import Fingerprint

FIELD = "prompt_tuning_init_state_dict_path"


@dataclass(frozen=True, eq=False)
class Source:
    """shared [R, D], columns [K, R, r] and rows [K, r, D] of the tasks called `names`, in float32.

    copies: how many prompts follow each other in R, 2 where PEFT also trained one for the decoder; fingerprint:
    of the weights that they were made for, where that is known.
    """

    path: str
    shared: Tensor
    columns: Tensor
    rows: Tensor
    names: tuple[str, ...]
    copies: int = 1
    fingerprint: Fingerprint | None = None

    def fit(self, rows: int, width: int) -> "Source":
        """The same for a prompt of `rows` and `width`, the decoder's part left out where none is wanted.

        Raises ConfigError where it has another length or width.
        """
        if self.shared.shape[1] != width:
            raise ConfigError(
                f"{self.path} holds a prompt of width {self.shared.shape[1]}, but width {width} is needed"
            )
        count = len(self.shared)
        if count == rows:
            return self
        if count != rows * self.copies:
            raise ConfigError(
                f"{self.path} holds a prompt of {count // self.copies} tokens, but {rows} are needed; set "
                f"num_virtual_tokens to match"
            )
        return replace(self, shared=self.shared[:rows], columns=self.columns[:, :rows], copies=1)

    def index(self, task: int | str | None) -> int:
        """The place of a task given by place or name; raises ConfigError for one that is not there."""
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(self.names):
            return task
        if isinstance(task, str) and task in self.names:
            return self.names.index(task)
        here = ", ".join(f"{i} {name}" if str(i) != name else name for i, name in enumerate(self.names))
        hint = closest(task, self.names) if isinstance(task, str) else ";"
        raise ConfigError(f"prompt_tuning_init_task {task!r} is not a task of {self.path}{hint} its tasks: {here}")


def load(location: str) -> Source:
    """The multitask prompt at `given`: a .safetensors file with PEFT's names, or a directory of PEFT's or ours.

    Raises ConfigError for anything else, with how to convert a torch pickle, which is never opened.
    """
    path = Path(location)
    try:
        if path.is_dir():
            return _of_directory(path)
        if path.name == peft_files.TENSORS and (path.with_name(peft_files.CONFIG).is_file()):
            return _of_directory(path.parent)
        if path.is_file() and path.suffix != ".safetensors":
            raise ConfigError(
                f"{path} is not a .safetensors file; a torch pickle can execute code when read and is not opened: "
                "convert it where you trust it with safetensors.torch.save_file(torch.load(path, weights_only=True), "
                "'source.safetensors')"
            )
        stored, _ = read_tensors(path)
        return _checked(path, lambda: _of_peft(path, {}, stored))
    except ArtifactError as error:
        raise ConfigError(f"{FIELD}: {error}") from None


def _of_directory(path: Path) -> Source:
    if collection.written_by_softprompts(path):
        return _of_ours(path, [[artifact.load(part.path) for part in unit] for unit in collection.member_groups(path)])
    if (path / peft_files.CONFIG).is_file():
        values, stored = artifact.read_peft_files(path)
        return _checked(path, lambda: _of_peft(path, values, stored))
    # what a run of several tasks leaves
    parts = sorted(part.parent for part in path.glob(f"*/{artifact.MANIFEST}"))
    return _of_ours(
        path, [[opened for part in parts if (opened := artifact.load(part)).method == peft_files.MULTITASK]]
    )


def _checked(path: Path, read: Callable[[], Source]) -> Source:
    try:
        return read()
    except ValueError as error:
        raise ConfigError(f"{FIELD}: {path}: {error}") from None


def _of_peft(path: Path, values: dict[str, Any], stored: dict[str, Tensor]) -> Source:
    factors = peft_files.read_multitask(values, stored)
    names = tuple(map(str, range(len(factors.columns))))
    copies = peft_files.count_prompt_copies(values) if values else 1
    return Source(str(path), factors.shared, factors.columns, factors.rows, names, copies)


def _of_ours(path: Path, groups: Sequence[Sequence[Artifact]]) -> Source:
    """From the artifacts of one group, or of one task alone; plain prompts beside them are passed over."""
    groups = [group for group in groups if group and all(opened.method == peft_files.MULTITASK for opened in group)]
    if len(groups) != 1:
        raise ArtifactError(f"{path} holds {len(groups) or 'no'} multitask prompts; one is needed")
    return _stacked(path, groups[0])


def _stacked(path: Path, group: Sequence[Artifact]) -> Source:
    try:
        states = [{name: opened.state[name].float() for name in peft_files.MULTITASK_STATE} for opened in group]
        shared, columns, rows = (torch.stack([state[name] for state in states]) for name in peft_files.MULTITASK_STATE)
    except (KeyError, RuntimeError):
        raise ArtifactError(f"{path}: the tensors of {peft_files.MULTITASK} are missing or differ in shape") from None
    if not bool((shared == shared[0]).all()):
        raise ArtifactError(f"{path}: its tasks hold different shared prompts; they were not saved together")
    return Source(str(path), shared[0], columns, rows, tuple(opened.task for opened in group), 1, group[0].fingerprint)
