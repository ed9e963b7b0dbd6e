"""Teachers: what the frozen backbone makes of each training row behind the trained prompt of its task.

Neither a teacher nor the backbone ever changes, so this is computed once, before training, and kept in a file. Kept are
not the scores [V] but the states [H] from which the frozen head makes them: exact, and a hundred times smaller.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompts import injection
from softprompts.artifacts import artifact
from softprompts.artifacts.io import read_tensors, write_tensors
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import DistillationConfig, closest
from softprompts.data import EncodedExample, collate, evaluation_order
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.training.checkpoint import machine_of
from softprompts.types import Output, Prompt, TeacherBatch

FILE = "teacher-states.safetensors"
BATCH_TOKENS = 4096
"""Text tokens that a teacher reads at once."""

Key = tuple[str, int]


@dataclass(frozen=True)
class TaskTeacher:
    """The trained prompt [P, D] of a task, where it enters, and its artifact's digest."""

    task: str
    prompt: Tensor = field(repr=False)
    site: Site
    digest: str


@dataclass(frozen=True)
class TeacherOutputs:
    """Of each of `rows`: the states [n, H] that score its n labels, and the asked layers' states of its text [m, H]."""

    rows: Sequence[EncodedExample]
    states: Sequence[Tensor] = field(repr=False)
    layers: Mapping[Key, Sequence[Tensor]] = field(repr=False)
    temperature: float = 1.0
    place: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.place.update({id(row): number for number, row in enumerate(self.rows)})

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers whose states are there."""
        return tuple(dict.fromkeys(number for _, number in self.layers))

    def of(self, rows: Sequence[EncodedExample], device: torch.device) -> TeacherBatch:
        """The teachers' states for a batch of these very rows."""
        at = [self.place[id(row)] for row in rows]
        layers = {key: torch.cat([each[i] for i in at]).to(device) for key, each in self.layers.items()}
        return TeacherBatch(torch.cat([self.states[i] for i in at]).to(device), layers, self.temperature)


def load_teachers(backbone: Backbone, config: DistillationConfig, tasks: Sequence[str]) -> tuple[TaskTeacher, ...]:
    """The teacher of each of `tasks`, in their order.

    Raises ConfigError when one is missing or names no task, and when a teacher is no plain prompt of this model's
    language-model head; ArtifactError when it cannot be read or was made for other weights.
    """
    for name in config.teachers:
        if name not in tasks:
            raise ConfigError(
                f"training.distillation.teachers: there is no task '{name}'{closest(name, tasks)} tasks: "
                f"{', '.join(tasks)}"
            )
    if missing := [name for name in tasks if name not in config.teachers]:
        raise ConfigError(
            f"no teacher for {', '.join(missing)}: name the directory of its trained prompt in "
            "training.distillation.teachers"
        )
    injection.check_layers(backbone, config.layers)
    weights = fingerprint(backbone)
    return tuple(_load(backbone, task, config.teachers[task], weights) for task in tasks)


def _load(backbone: Backbone, task: str, path: str, weights: Any) -> TaskTeacher:
    found = artifact.load(path)
    artifact.check_fingerprint(found.fingerprint, weights, False)
    if found.head != backbone.head or backbone.head != "lm":
        raise ConfigError(
            f"the teacher of {task}, {path}, reads head '{found.head}' and the model has '{backbone.head}'; teachers "
            f"and students need a language model's head (model.head: lm)"
        )
    site = Site(found.site, found.mode, found.placement, found.segments)
    width = injection.prompt_width(backbone, site)
    if found.shape[1] != width:
        raise ConfigError(
            f"the teacher of {task}, {path}, has rows of width {found.shape[1]}; site '{site.name}' of "
            f"{backbone.name} takes {width}"
        )
    return TaskTeacher(task, found.require_prompt(path), site, found.digest)


def targets(
    backbone: Backbone,
    teachers: Sequence[TaskTeacher],
    rows: Sequence[EncodedExample],
    config: DistillationConfig,
    file: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> TeacherOutputs:
    """What the teachers make of `rows`, read from `file` where it holds just this, else computed and written there.

    teachers: by the rows' task number; progress: told how many rows are done, of how many. Kept in the model's number
    format: for a row of n labels and m tokens n·H + layers·m·H numbers.
    """
    key = _key(backbone, teachers, rows, config.layers)
    if file is not None and file.exists():
        tensors, metadata = read_tensors(file)
        if metadata.get("key") == key:
            progress(len(rows), len(rows))
            return _targets(rows, tensors, config.temperature)
    tensors = _compute(backbone, teachers, rows, config.layers, progress)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors, {"key": key})
    return _targets(rows, tensors, config.temperature)


def _targets(rows: Sequence[EncodedExample], tensors: Mapping[str, Tensor], temperature: float) -> TeacherOutputs:
    states = tensors["states"].split(tensors["states.counts"].tolist())
    layers: dict[Key, Sequence[Tensor]] = {}
    for name in (name for name in tensors if name.startswith("layers.")):
        _, side, number = name.split(".")
        layers[side, int(number)] = tensors[name].split(tensors[f"tokens.{side}"].tolist())
    return TeacherOutputs(rows, states, layers, temperature)


def _compute(
    backbone: Backbone,
    teachers: Sequence[TaskTeacher],
    rows: Sequence[EncodedExample],
    layers: Collection[int],
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Tensors by the names they have in the file: those of all rows behind each other, and how many belong to each."""
    found: list[dict[str, Tensor]] = [{}] * len(rows)
    done = 0
    for number, teacher in enumerate(teachers):
        own = [i for i, row in enumerate(rows) if row.task_id == number]
        for part in evaluation_order([len(rows[i].input_ids) for i in own], 512, BATCH_TOKENS):
            at = [own[i] for i in part]
            output = _read(backbone, teacher, [rows[i] for i in at], layers)
            for i, one in zip(at, _by_row(output, len(at)), strict=True):
                found[i] = one
            done += len(at)
            progress(done, len(rows))
    counts = {"states": "states.counts"} | {
        name: f"tokens.{name.split('.')[1]}" for name in found[0] if name.startswith("layers.")
    }
    sizes = {count: torch.tensor([len(one[name]) for one in found]) for name, count in counts.items()}
    return {name: torch.cat([one[name] for one in found]) for name in counts} | sizes


def _read(backbone: Backbone, teacher: TaskTeacher, rows: Sequence[EncodedExample], layers: Collection[int]) -> Output:
    pad = 0 if backbone.tokenizer is None else backbone.tokenizer.pad_token_id or 0
    batch = collate(rows, pad).to(backbone.device)
    if batch.segment_lengths is not None and teacher.site.place != "template":
        batch = replace(
            batch, prompt_offsets=None, segment_lengths=None
        )  # the rows' slots are for the student's prompt
    values = teacher.prompt[None].to(backbone.device)
    mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    prompt = Prompt(values, mask, torch.zeros(len(rows), dtype=torch.long, device=values.device))
    with torch.no_grad():
        return injection.score(backbone, batch, prompt, teacher.site, return_logits=False, layers=layers)


def _by_row(output: Output, rows: int) -> list[dict[str, Tensor]]:
    """The tensors of each row, on the CPU."""
    assert output.label_states is not None
    counts = torch.bincount(output.batch_rows, minlength=rows).tolist()
    named = {"states": output.label_states.cpu().split(counts)}
    for (side, number), states in output.layer_states.items():
        named[f"layers.{side}.{number}"] = states.cpu().split(output.token_counts[side].tolist())
    return [{name: parts[i] for name, parts in named.items()} for i in range(rows)]


def _key(
    backbone: Backbone, teachers: Sequence[TaskTeacher], rows: Sequence[EncodedExample], layers: Collection[int]
) -> str:
    """What must be the same for kept states to be the ones that would be computed."""
    digest = hashlib.sha256()
    facts = [machine_of(backbone), list(layers), [teacher.digest for teacher in teachers]]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(
            json.dumps(
                [row.input_ids, row.labels, row.token_type_ids, row.prompt_offsets, row.task_id, row.segment_lengths]
            ).encode()
        )
    return digest.hexdigest()
