"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861) under PEFT's names.

A new prompt may begin at a trained one, its `Source`: PEFT's file, or a directory of PEFT's or ours.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from softprompts.artifacts import artifact, collection, peft_files
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.fingerprint import check_fingerprint
from softprompts.artifacts.io import read_tensors
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import InitConfig, PromptConfig, closest
from softprompts.errors import ArtifactError, ConfigError
from softprompts.methods.registry import build_tasks
from softprompts.model.peft.prompt_tuning import (
    PeftType,
    PromptTuningConfig,
    check_width,
    first_rows,
    known,
    missing,
    positive,
)
from softprompts.types import Fingerprint, PromptInit, PromptSpec

SOURCE_FIELD = "prompt_tuning_init_state_dict_path"


class FactorsInit(enum.StrEnum):
    """Where the factors of a task start."""

    ONES = "ones"
    NORMAL = "normal"


class MultitaskPromptTuningInit(enum.StrEnum):
    """Where a multitask prompt starts: as a plain one, its factors at `factors_init`, or from a source."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"
    CLASS_LABELS = "CLASS_LABELS"
    ARTIFACT = "ARTIFACT"
    RANDOM_NORMAL = "RANDOM_NORMAL"
    RANDOM_UNIFORM = "RANDOM_UNIFORM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"  # the source's shared prompt, the mean of its columns, of its rows
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"  # the source's shared prompt and the factors of one of its tasks
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"  # the source's shared prompt


_FACTORS = (MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS, MultitaskPromptTuningInit.EXACT_SOURCE_TASK)
_SOURCES = (*_FACTORS, MultitaskPromptTuningInit.ONLY_SOURCE_SHARED)
_RECORDED = dict(zip(_SOURCES, ("average", "task", "ones"), strict=True))  # as InitConfig has them


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """The configuration of a MultitaskPromptEmbedding, or of a SoftPromptModel with `num_tasks` tasks.

    prompt_tuning_init_state_dict_path: PEFT's adapter_model.safetensors of a trained multitask prompt, or a directory,
    PEFT's or ours; needed for the starts from a source. prompt_tuning_init_task: which of its tasks, by place or, where
    a directory knows them, by name. num_ranks: the rank of the factors' product. factors_init: `ones` or PEFT's
    `normal`, for factors that do not come from a source.
    Raises ConfigError as PromptTuningConfig does, for a start that lacks its path, and for several tasks that are to
    start from one.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | str | None = 0
    num_ranks: int = 1
    num_tasks: int = 1
    factors_init: FactorsInit | str = FactorsInit.ONES

    _type: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING
    _starts: ClassVar[type[enum.StrEnum]] = MultitaskPromptTuningInit

    def __post_init__(self) -> None:
        super().__post_init__()
        self.factors_init = known("factors_init", self.factors_init, FactorsInit)
        for field in ("num_ranks", "num_tasks"):
            if not positive(getattr(self, field)):
                raise ConfigError(f"{field} must be a positive number, given {getattr(self, field)!r}")
        if not self.reads_source:
            return
        kind = MultitaskPromptTuningInit(self.prompt_tuning_init)
        if self.prompt_tuning_init_state_dict_path is None:
            raise ConfigError(missing(kind, "prompt_tuning_init_state_dict_path", None))
        if kind in _FACTORS and self.num_tasks != 1:
            raise ConfigError(
                f"{kind.value} starts one task, but num_tasks is {self.num_tasks}; set it to 1, or start several with "
                f"{MultitaskPromptTuningInit.ONLY_SOURCE_SHARED.value}"
            )

    @property
    def count(self) -> int:
        """Number of tasks."""
        return self.num_tasks

    @property
    def reads_source(self) -> bool:
        """Whether training begins at a trained multitask prompt; in `inference_mode` nothing is read."""
        return self.prompt_tuning_init in _SOURCES and not self.inference_mode

    def describe(self, backbone: Backbone) -> tuple[PromptConfig, PromptInit | None]:
        """As PromptTuningConfig.describe; the start also brings a source's factors.

        Raises ConfigError where the source does not fit the model or this configuration.
        """
        plain, start = super().describe(backbone)
        options = {"ranks": self.num_ranks, "start": str(self.factors_init)}
        config = plain.model_copy(update={"method": "multitask-prompt-tuning", "options": options})
        return config, self.from_source(self.length, backbone.embedding_size, backbone) if self.reads_source else start

    def from_source(self, rows: int, width: int, backbone: Backbone | None = None) -> PromptInit:
        """The start for a prompt of `rows` and `width` in the source.

        Raises ConfigError where it does not fit, and ArtifactError where it was made for another `backbone`.
        """
        loaded = load_source(str(self.prompt_tuning_init_state_dict_path)).fit(rows, width)
        if backbone is not None:
            check_fingerprint(loaded.fingerprint, fingerprint(backbone))
        if self.prompt_tuning_init not in _FACTORS:
            return PromptInit(loaded.shared)
        if loaded.columns.shape[-1] != self.num_ranks:
            raise ConfigError(
                f"{loaded.path} holds factors of rank {loaded.columns.shape[-1]}, but rank {self.num_ranks} is needed; "
                f"set num_ranks to match, or take {MultitaskPromptTuningInit.ONLY_SOURCE_SHARED.value}"
            )
        if self.prompt_tuning_init == MultitaskPromptTuningInit.EXACT_SOURCE_TASK:
            index = loaded.index(self.prompt_tuning_init_task)
            return PromptInit(loaded.shared, factors=(loaded.columns[index], loaded.rows[index]))
        return PromptInit(loaded.shared, factors=(loaded.columns.mean(0), loaded.rows.mean(0)))

    def _init(self) -> InitConfig:
        if self.prompt_tuning_init not in _SOURCES:
            return super()._init()
        if not self.reads_source:
            return InitConfig(kind="random")
        task = str(self.prompt_tuning_init_task)
        record = {
            "path": self.prompt_tuning_init_state_dict_path,
            "factors": _RECORDED[MultitaskPromptTuningInit(self.prompt_tuning_init)],
        }
        return InitConfig.model_validate({"kind": "multitask", "task": task, **record})


class MultitaskPromptEmbedding(nn.Module):
    """The model that encodes virtual tokens into the prompt embeddings of several tasks.

    config: a MultitaskPromptTuningConfig; word_embeddings: the base model's (its device is taken, its weights only
    read). With R = num_virtual_tokens * num_transformer_submodules rows and r = num_ranks, all float32:
    embedding: nn.Embedding [R, token_dim], the shared prompt; prefix_task_cols [num_tasks, R, r]; prefix_task_rows
    [num_tasks, r, token_dim].
    With `inference_mode` neither tokenizer nor source is read, as the tensors will be loaded.
    Raises ConfigError as PromptEmbedding does, and for a source that does not fit.
    """

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: Any) -> None:
        super().__init__()
        with torch.no_grad():
            start = _start(config, word_embeddings)
        count, width = start.prompt.shape
        options = {"ranks": config.num_ranks, "start": str(config.factors_init)}
        names = tuple(map(str, range(config.num_tasks)))
        methods = build_tasks(peft_files.MULTITASK, options, PromptSpec(count, width, width), start, names)
        states = [methods[name].state_dict() for name in names]
        prompt, columns, rows = peft_files.MULTITASK_STATE
        device = word_embeddings.weight.device
        self.embedding = nn.Embedding(count, width, _weight=states[0][prompt].to(device))
        self.prefix_task_cols = nn.Parameter(torch.stack([state[columns] for state in states]).to(device))
        self.prefix_task_rows = nn.Parameter(torch.stack([state[rows] for state in states]).to(device))

    def forward(self, indices: Tensor, task_ids: Tensor | None) -> Tensor:
        """indices (batch, virtual_tokens), task_ids (batch) or one for all -> (batch, virtual_tokens, token_dim).

        Raises ConfigError without task_ids, and for ids of tasks that are not there.
        """
        if task_ids is None:
            raise ConfigError("task_ids cannot be None")
        tasks = task_ids.reshape(-1)
        count = len(self.prefix_task_cols)
        if bool(((tasks < 0) | (tasks >= count)).any()):
            raise ConfigError(f"task_ids {tasks.tolist()} name tasks that do not exist; num_tasks is {count}")
        columns = self.prefix_task_cols[tasks[:, None], indices]
        embeddings: Tensor = self.embedding(indices) * (columns @ self.prefix_task_rows[tasks])
        return embeddings


def _start(config: MultitaskPromptTuningConfig, embed: Any) -> PromptInit:
    count = config.length * (config.num_transformer_submodules or 1)
    if not config.reads_source:
        return PromptInit(first_rows(config, embed, count))
    width = embed(torch.zeros(1, dtype=torch.long, device=embed.weight.device)).shape[-1]
    check_width(config.token_dim, width)
    return config.from_source(count, width)


@dataclass(frozen=True, eq=False)
class Source:
    """A trained multitask prompt, in float32.

    Attributes:
        path: Where it was read.
        shared: [R, D], the shared prompt.
        columns: [K, R, r], a factor of each of K tasks.
        rows: [K, r, D], the other factor of each task.
        names: The names of the tasks.
        copies: The number of prompts behind each other in R: 2 where PEFT also trained one for the decoder.
        fingerprint: The weights that the prompt was made for, where that is known.
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


def load_source(location: str) -> Source:
    """The multitask prompt at `location`: a .safetensors file with PEFT's names, or a directory of PEFT's or ours.

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
        raise ConfigError(f"{SOURCE_FIELD}: {error}") from None


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
        raise ConfigError(f"{SOURCE_FIELD}: {path}: {error}") from None


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
