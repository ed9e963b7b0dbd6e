"""Teachers: the outputs of the frozen backbone for each training row behind the trained prompt of its task.

Neither a teacher nor the backbone changes, so its outputs are computed once, before training, and cached in a file. The
cache stores hidden states [H], not logits [V]. The frozen head reproduces the logits exactly, and the cache is a
hundred times smaller.
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
from softprompts.artifacts.fingerprint import check_fingerprint
from softprompts.artifacts.io import read_tensors, write_tensors
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import DistillationConfig, closest
from softprompts.data.collation import collate
from softprompts.data.encoding import EncodedExample
from softprompts.data.sampling import evaluation_order
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.training.checkpoint import machine_of
from softprompts.training.shared_batch import pad_token
from softprompts.types import Output, Prompt, TeacherBatch

FILE = "teacher-states.safetensors"

BATCH_TOKENS = 4096
"""Text tokens that a teacher reads at once."""

LayerKey = tuple[str, int]
"""The side of a model (text or target) and the number of a layer."""


@dataclass(frozen=True)
class TaskTeacher:
    """The trained prompt [P, D] of a task, where it enters, and its artifact's digest."""

    task: str
    prompt: Tensor = field(repr=False)
    site: Site
    digest: str


@dataclass(frozen=True)
class TeacherOutputs:
    """The teachers' outputs for the examples of a run.

    Attributes:
        examples: The examples.
        states: Of each example, the states [n, H] that score its n labels.
        layers: Of each asked layer and each example, the states [m, H] of its m text tokens.
        temperature: The temperature of both softmaxes.
        index: The place of each example, by its identity.
    """

    examples: Sequence[EncodedExample]
    states: Sequence[Tensor] = field(repr=False)
    layers: Mapping[LayerKey, Sequence[Tensor]] = field(repr=False)
    temperature: float = 1.0
    index: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.index.update({id(example): place for place, example in enumerate(self.examples)})

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The numbers of the layers with states."""
        return tuple(dict.fromkeys(number for _, number in self.layers))

    def of(self, examples: Sequence[EncodedExample], device: torch.device) -> TeacherBatch:
        """The teachers' outputs for a batch of these very examples."""
        places = [self.index[id(example)] for example in examples]

        def join(states: Sequence[Tensor]) -> Tensor:
            return torch.cat([states[place] for place in places]).to(device)

        layers = {key: join(states) for key, states in self.layers.items()}
        return TeacherBatch(join(self.states), layers, self.temperature)


def load_teachers(backbone: Backbone, config: DistillationConfig, tasks: Sequence[str]) -> tuple[TaskTeacher, ...]:
    """Load the teacher of each task, in the order of the tasks.

    Raises:
        ConfigError: A task has no teacher, a teacher has no task, or a teacher is no plain prompt of this model's
            language-model head.
        ArtifactError: A teacher cannot be read, or belongs to other weights.
    """
    for name in config.teachers:
        if name not in tasks:
            raise ConfigError(
                f"training.distillation.teachers: no task '{name}'{closest(name, tasks)} tasks: {', '.join(tasks)}"
            )
    if missing := [name for name in tasks if name not in config.teachers]:
        raise ConfigError(
            f"no teacher for {', '.join(missing)}: name the directory of its trained prompt in "
            f"training.distillation.teachers"
        )
    injection.check_layers(backbone, config.layers)
    weights = fingerprint(backbone)
    return tuple(_load_teacher(backbone, task, config.teachers[task], weights) for task in tasks)


def _load_teacher(backbone: Backbone, task: str, path: str, weights: Any) -> TaskTeacher:
    loaded = artifact.load(path)
    check_fingerprint(loaded.fingerprint, weights, False)
    if loaded.head != backbone.head or backbone.head != "lm":
        raise ConfigError(
            f"the teacher of {task}, {path}, reads head '{loaded.head}' and the model has '{backbone.head}'; teachers "
            f"and students need a language model's head (model.head: lm)"
        )
    site = Site(loaded.site, loaded.mode, loaded.placement, loaded.segments)
    width = injection.prompt_width(backbone, site)
    if loaded.shape[1] != width:
        raise ConfigError(
            f"the teacher of {task}, {path}, has rows of width {loaded.shape[1]}; site '{site.name}' of "
            f"{backbone.name} takes {width}"
        )
    return TaskTeacher(task, loaded.require_prompt(path), site, loaded.digest)


def targets(
    backbone: Backbone,
    teachers: Sequence[TaskTeacher],
    examples: Sequence[EncodedExample],
    config: DistillationConfig,
    file: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherOutputs:
    """The teachers' outputs for examples, from a file where it holds exactly these, else computed and written there.

    Args:
        backbone: The frozen backbone of teachers and student.
        teachers: The teachers, by the task number of the examples.
        examples: The examples; one with n labels and m tokens takes n·H + layers·m·H numbers in the backbone's dtype.
        config: The layers and the temperature.
        file: The cache.
        progress: Called with the number of examples that are done, and of all.

    Returns:
        The outputs.
    """
    key = _cache_key(backbone, teachers, examples, config.layers)
    if file is not None and file.exists():
        tensors, metadata = read_tensors(file)
        if metadata.get("key") == key:
            progress(len(examples), len(examples))
            return _outputs(examples, tensors, config.temperature)
    tensors = _compute(backbone, teachers, examples, config.layers, progress)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors, {"key": key})
    return _outputs(examples, tensors, config.temperature)


def _outputs(examples: Sequence[EncodedExample], tensors: Mapping[str, Tensor], temperature: float) -> TeacherOutputs:
    """The outputs from the tensors of the cache."""
    states = tensors["states"].split(tensors["states.counts"].tolist())
    layers: dict[LayerKey, Sequence[Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, side, number = name.split(".")
            layers[side, int(number)] = tensor.split(tensors[f"tokens.{side}"].tolist())
    return TeacherOutputs(examples, states, layers, temperature)


def _compute(
    backbone: Backbone,
    teachers: Sequence[TaskTeacher],
    examples: Sequence[EncodedExample],
    layers: Collection[int],
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """The tensors of the cache: those of all examples, one behind the other, and how many belong to each example."""
    of_examples: list[dict[str, Tensor]] = [{}] * len(examples)
    done = 0
    for task_id, teacher in enumerate(teachers):
        places = [place for place, example in enumerate(examples) if example.task_id == task_id]
        for batch in evaluation_order([len(examples[place].input_ids) for place in places], 512, BATCH_TOKENS):
            batch_places = [places[index] for index in batch]
            output = _read(backbone, teacher, [examples[place] for place in batch_places], layers)
            for place, tensors in zip(batch_places, _by_row(output, len(batch_places)), strict=True):
                of_examples[place] = tensors
            done += len(batch_places)
            progress(done, len(examples))
    cache = {}
    for name in of_examples[0]:
        states = [tensors[name] for tensors in of_examples]
        counts = f"tokens.{name.split('.')[1]}" if name.startswith("layers.") else f"{name}.counts"
        cache[name] = torch.cat(states)
        cache[counts] = torch.tensor(list(map(len, states)))
    return cache


def _read(
    backbone: Backbone, teacher: TaskTeacher, examples: Sequence[EncodedExample], layers: Collection[int]
) -> Output:
    """The backbone's output for examples behind the prompt of their teacher."""
    batch = collate(examples, pad_token(backbone)).to(backbone.device)
    if batch.segment_lengths is not None and teacher.site.placement != "template":
        # The slots of the rows are for the student's prompt.
        batch = replace(batch, prompt_offsets=None, segment_lengths=None)
    values = teacher.prompt[None].to(backbone.device)
    mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    prompt = Prompt(values, mask, torch.zeros(len(examples), dtype=torch.long, device=values.device))
    with torch.no_grad():
        return injection.score(backbone, batch, prompt, teacher.site, return_logits=False, layers=layers)


def _by_row(output: Output, rows: int) -> list[dict[str, Tensor]]:
    """The tensors of each row, on the CPU."""
    assert output.label_states is not None
    counts = torch.bincount(output.batch_rows, minlength=rows).tolist()
    split = {"states": output.label_states.cpu().split(counts)}
    for (side, number), states in output.layer_states.items():
        split[f"layers.{side}.{number}"] = states.cpu().split(output.token_counts[side].tolist())
    return [dict(zip(split, tensors, strict=True)) for tensors in zip(*split.values(), strict=True)]


def _cache_key(
    backbone: Backbone,
    teachers: Sequence[TaskTeacher],
    examples: Sequence[EncodedExample],
    layers: Collection[int],
) -> str:
    """A digest of everything on which the cached states depend."""
    digest = hashlib.sha256()
    facts = [machine_of(backbone), list(layers), [teacher.digest for teacher in teachers]]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for example in examples:
        fields = [
            example.input_ids,
            example.labels,
            example.token_type_ids,
            example.prompt_offsets,
            example.task_id,
            example.segment_lengths,
        ]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()
