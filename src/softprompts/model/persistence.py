"""The tasks of a SoftPromptModel: made from a configuration, or from artifacts, and written back as one each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from softprompts import __version__, injection
from softprompts.artifacts import artifact, collection, peft_files
from softprompts.artifacts.artifact import Artifact
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import PromptConfig, closest
from softprompts.errors import ArtifactError, ConfigError
from softprompts.injection import Site
from softprompts.methods import build, check_site, sentence_encoders
from softprompts.model import initialization, stored
from softprompts.model.registry import Held, Made, Task, absorb
from softprompts.model.sentence_encoders import Sentences
from softprompts.types import SOURCES, Fingerprint, PromptInit


class Described(Protocol):
    """A configuration in other words, such as peft.PromptTuningConfig."""

    modules_to_save: list[str] | None

    @property
    def count(self) -> int:
        """Number of tasks that share what their method shares."""
        ...

    def describe(self, backbone: Backbone) -> tuple[PromptConfig, PromptInit | None]:
        """The same as a PromptConfig, and the start where it has rules of its own."""
        ...


def names_of(config: PromptConfig | Described, task: str, tasks: Sequence[str] | None) -> Sequence[str]:
    """What a model's first prompts are called: `tasks` or, without them, `task`, or places where `config` has several.

    Raises ConfigError where one name is given for several prompts.
    """
    count = 1 if isinstance(config, PromptConfig) else config.count
    if task != "default" and (tasks is not None or count > 1):
        raise ConfigError(f"task '{task}' names one prompt; give the names of all {count} as tasks")
    if tasks is None:
        return (task,) if count == 1 else tuple(map(str, range(count)))
    return tasks


def create(
    backbone: Backbone,
    sentences: Sentences,
    names: tuple[str, ...],
    config: PromptConfig | Described,
    modules_to_save: Sequence[str] | None,
) -> Made:
    """New tasks of one method at its start, each with a copy of the head.

    sentences: gets the encoders of whole texts that the method reads with.
    """
    count = len(names) if isinstance(config, PromptConfig) else config.count
    if count != len(names):
        raise ConfigError(f"num_tasks is {count}, but {len(names)} are named: {', '.join(names) or 'none'}")
    start, saved = None, modules_to_save
    if not isinstance(config, PromptConfig):
        saved = config.modules_to_save if saved is None else saved
        config, start = config.describe(backbone)
    check_site(config.method, config.site)
    site = Site(config.site, config.mode, config.place, config.segments)
    sentences.fetch(sentence_encoders(config.method, config.options), backbone)
    slot = injection.prompt_spec(backbone, site, names, config.length, sentences.widths)
    if start is None:
        start = initialization.initialize(config.init, backbone, site, slot)
    method = build(config.method, config.options, slot, start).to(backbone.device)
    if count > 1 and not hasattr(method, "per_task"):
        raise ConfigError(f"method {config.method} does not say which parameters are one task's; add tasks one by one")
    site = replace(site, place=injection.resolve_place(backbone, site))
    firsts = [stored.folded(method, name) for name in names]
    given = start.prompt.detach().float().cpu()
    tasks = [
        Task(name, site, config, given.clone() if first is None else first, names)
        for name, first in zip(names, firsts, strict=True)
    ]
    return Made(tasks, method, [_new_head(backbone, saved) for _ in names])


def alike(backbone: Backbone, held: Held, name: str, old: str, modules_to_save: Sequence[str] | None) -> Made:
    """A new task for the method that holds the task `old`, its own parameters where the method lets them start."""
    task, method = held.tasks[old], held.method(old)
    # Only what is the new task's own will be kept: factors at one, or a prompt that starts where the other did.
    begin = torch.zeros(method.slot.length, method.slot.width) if task.initial is None else task.initial
    start = PromptInit(begin, getattr(method, SOURCES, None))
    made = build(task.config.method, task.config.options, replace(method.slot, tasks=(name,)), start)
    new = replace(task, name=name, initial=None, found=None)
    return Made([new], made.to(backbone.device), [_new_head(backbone, modules_to_save)])


def _new_head(backbone: Backbone, modules: Sequence[str] | None) -> nn.Module | None:
    own = dict(backbone.model.named_parameters())
    return _tree({key: own[key] for key in head_names(backbone, modules)})


def head_names(backbone: Backbone, modules: Sequence[str] | None) -> tuple[str, ...]:
    """Parameters of the classification head that belong to `modules` (their names may be the end of a path); None: all.

    Raises ConfigError for a module that the head does not have.
    """
    if modules is None:
        return backbone.head_names
    known = list(dict.fromkeys(name.rpartition(".")[0] for name in backbone.head_names))
    known += [part for name in known for part in (name.split(".")[0],) if part not in known]
    for module in modules:
        if not any(name == module or name.endswith(f".{module}") for name in known):
            raise ConfigError(
                f"modules_to_save '{module}' is no module of the head of {type(backbone.model).__name__}"
                f"{closest(module, known)} possible: {', '.join(known) or 'none'}"
            )
    inside = [m for m in known if any(m == module or m.endswith(f".{module}") for module in modules)]
    return tuple(name for name in backbone.head_names if any(name.startswith(f"{m}.") for m in inside))


def _tree(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """Trainable float32 copies of `tensors` as a module whose parameters bear the same dotted names; None for none."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(tensor.detach().clone().float()))
    return root if tensors else None


def restore(
    backbone: Backbone,
    sentences: Sentences,
    path: str | Path,
    name: str | None,
    allow_other_weights: bool,
    place: int | None = None,
) -> tuple[Made, list[str]]:
    """The task in an artifact's directory, ready to be used or trained on, and warnings; `place`: which of several.

    sentences: gets the encoders of whole texts that its method reads with.
    """
    found = artifact.load(path, place)
    warnings = artifact.check_fingerprint(found.fingerprint, fingerprint(backbone), allow_other_weights)
    if found.head != backbone.head or found.family not in (None, backbone.family.name):
        raise ArtifactError(
            f"{path} holds a prompt for a {found.family or 'any'} model with head '{found.head}', but "
            f"{type(backbone.model).__name__} is a {backbone.family.name} model with head '{backbone.head}'"
        )
    name, site = name or found.task, Site(found.site, found.mode, found.place, found.segments)
    sentences.fetch(sentence_encoders(found.method, found.options), backbone)
    slot = injection.prompt_spec(backbone, site, (name,), found.shape[0], sentences.widths)
    if slot.width != found.shape[1]:
        raise ArtifactError(
            f"{path} holds a prompt of width {found.shape[1]}; site '{site.name}' of this model is {slot.width}"
        )
    method = stored.rebuilt(found, slot, path)
    own = dict(backbone.model.named_parameters())
    wrong = [
        name for name, value in found.heads.items() if name not in backbone.head_names or value.shape != own[name].shape
    ]
    if wrong:
        here = {name: list(own[name].shape) for name in backbone.head_names}
        raise ArtifactError(f"{path}: its head {', '.join(wrong)} does not fit this model's, which is {here}")
    config = PromptConfig.model_validate(
        {"method": found.method, "length": slot.length, "site": site.name, "mode": site.mode, "place": site.place}
        | {"options": found.options, "segments": site.segments}
    )
    head = {key: found.heads[key] for key in backbone.head_names if key in found.heads}  # safetensors sorts them
    return Made([Task(name, site, config, found.initial, (name,), found)], method, [_tree(head)]), warnings


def restore_all(
    backbone: Backbone, sentences: Sentences, path: Path, allow_other_weights: bool
) -> tuple[list[Made], tuple[str, ...], list[str]]:
    """All tasks in a directory, those of a group with one method; their names in their order, and warnings.

    Raises ArtifactError as `restore` does, and where tasks of a group do not share what they should.
    """
    found: list[Made] = []
    warnings: list[str] = []
    places: list[tuple[int, str]] = []
    for unit in collection.units(path):
        parts = [restore(backbone, sentences, part.path, None, allow_other_weights, part.task) for part in unit]
        places += [(part.place, made.tasks[0].name) for part, (made, _) in zip(unit, parts, strict=True)]
        warnings += [warning for _, said in parts for warning in said]
        found.append(_together(path, [made for made, _ in parts]))
    return found, tuple(name for _, name in sorted(places)), warnings


def _together(path: Path, parts: Sequence[Made]) -> Made:
    """One method for the tasks of all parts; raises ArtifactError where what they should share differs."""
    method, group = parts[0].method, tuple(made.tasks[0].name for made in parts)
    for made, name in zip(parts[1:], group[1:], strict=True):
        theirs = made.method.state_dict()
        for key, value in method.state_dict().items():
            if key.partition(".")[0] in method.per_task:
                continue
            if not torch.equal(value, theirs.get(key, value[:0])):
                raise ArtifactError(
                    f"{path}: '{key}', which {group[0]} and {name} share, differs between them: they were not saved "
                    "together; load them one by one"
                )
        absorb(method, made.method)
    tasks = [replace(made.tasks[0], group=group) for made in parts]
    return Made(tasks, method, [made.heads[0] for made in parts])


def save(backbone: Backbone, held: Held, directory: Path) -> None:
    """Write one artifact into `directory`, several into sub-directories of it."""
    if not held.tasks:
        raise ConfigError("no prompt is loaded; use add_task or load_prompt first")
    weights = fingerprint(backbone)
    made = {name: _artifact(backbone, weights, held, name) for name in held.tasks}
    if len(made) == 1:
        artifact.save(next(iter(made.values())), directory)
        return
    if collection.holds_one(directory):
        raise ArtifactError(f"{directory} holds a prompt of its own; give another directory for {len(made)} of them")
    for name, one in made.items():
        artifact.save(one, directory / collection.folder(name))
    groups = [group for group in dict.fromkeys(task.group for task in held.tasks.values()) if len(group) > 1]
    folders = tuple(tuple(map(collection.folder, group)) for group in groups)
    peft = _peft([[made[name] for name in group] for group in groups]) if groups else None
    collection.write(directory, collection.CollectionIndex(tuple(map(collection.folder, made)), folders), peft)


def _peft(groups: Sequence[Sequence[Artifact]]) -> collection.PeftFiles | str:
    """PEFT's files for the tasks that share a prompt, or why it cannot reproduce them."""
    first = groups[0][0]
    if len(groups) > 1:
        return f"{len(groups)} groups: PEFT's files hold one"
    if first.method != peft_files.MULTITASK:
        return f"method {first.method}: PEFT shares a prompt in multitask prompt tuning only"
    reason = peft_files.obstacle(first.site, first.place, first.family, first.head, first.heads, first.format)
    if reason is not None:
        return reason
    if any(not torch.equal(value, one.heads[key]) for one in groups[0] for key, value in first.heads.items()):
        return f"head {first.head} of each task: PEFT has one for all"
    facts = first.fingerprint.architecture if first.fingerprint else {}
    shape = (first.shape[0], first.shape[1])
    place = (first.family, first.head, first.heads, first.backbone, first.revision, facts)
    states = [one.state for one in groups[0]]
    ranks = states[0][peft_files.STATE[1]].shape[1]
    config = peft_files.shared_config(peft_files.config(shape, *place), len(states), ranks)
    return collection.PeftFiles(config, peft_files.shared_tensors(states, first.heads))


def _artifact(backbone: Backbone, weights: Fingerprint, held: Held, name: str) -> Artifact:
    task, method, head = held.tasks[name], held.method(name), held.head(name)
    found = task.found
    made = Artifact(
        task=task.name,
        prompt=stored.folded(method, task.name),
        initial=task.initial,
        method=task.config.method,
        options=dict(task.config.options),
        state=stored.state(method, name),
        heads={key: value.detach().cpu().clone() for key, value in head.items()},
        site=task.site.name,
        mode=task.site.mode,
        place=task.site.place,
        family=backbone.family.name,
        head=backbone.head,
        backbone=backbone.name,
        revision=backbone.revision,
        fingerprint=weights,
        format=None if found is None else found.format,
        config={"prompt": task.config.model_dump(mode="json")} if found is None else found.config,
        scores={},
        parents=(),
        version=__version__,
        segments=task.site.segments,
    )
    if found is None:
        return made
    same = stored.unchanged(found, made)
    return replace(made, scores=found.scores if same else {}, parents=found.parents if same else (found.digest,))
