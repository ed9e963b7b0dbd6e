"""One task of a SoftPromptModel: made from a configuration, or from an artefact, and written back as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from torch import Tensor, nn

import softprompts
from softprompts import artefact, init, inject, peft_format, stored
from softprompts.artefact import Artefact, ArtefactError
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import ConfigError, PromptConfig, closest
from softprompts.inject import Site
from softprompts.methods import build
from softprompts.prompt import Fingerprint, Start

ORDER = "tasks.json"
"""Names the sub-directories of several tasks in the order that task_ids count."""


class Described(Protocol):
    """A configuration in other words, such as peft.PromptTuningConfig."""

    modules_to_save: list[str] | None

    def describe(self, backbone: Backbone) -> tuple[PromptConfig, Start | None]:
        """The same as a PromptConfig, and the start where it has rules of its own."""
        ...


@dataclass(frozen=True)
class Task:
    """What is known of a prompt beside its tensors; `initial [P, D]` is where it began, `found` what it came from."""

    name: str
    site: Site
    config: PromptConfig
    initial: Tensor | None
    found: Artefact | None = None


Made = tuple[Task, nn.Module, nn.Module | None]


def create(
    backbone: Backbone, name: str, config: PromptConfig | Described, modules_to_save: Sequence[str] | None
) -> Made:
    """A new task with its method at its start and a copy of the head."""
    if not name:
        raise ConfigError("a task needs a name")
    start, saved = None, modules_to_save
    if not isinstance(config, PromptConfig):
        saved = config.modules_to_save if saved is None else saved
        config, start = config.describe(backbone)
    site = Site(config.site, config.mode, config.place)
    slot = inject.slot(backbone, site, (name,), config.length)
    if start is None:
        start = init.start(config.init, backbone, site, slot)
    method = build(config.method, config.options, slot, start)
    site = replace(site, place=inject.resolve_place(backbone, site))
    own = dict(backbone.model.named_parameters())
    head = {key: own[key] for key in head_names(backbone, saved)}
    initial = stored.folded(method, name)
    initial = start.prompt.detach().float().cpu().clone() if initial is None else initial
    return Task(name, site, config, initial), method, _tree(head)


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


def key(name: str) -> str:
    """A task's name as torch takes it for a module: no dots, and none of a module's own attributes."""
    safe = name.replace("%", "%25").replace(".", "%2E")
    return f"%{safe}" if hasattr(nn.ModuleDict(), safe) else safe


def restore(
    backbone: Backbone, path: str | Path, name: str | None, allow_other_weights: bool
) -> tuple[Made, list[str]]:
    """The task in an artefact's directory, ready to be used or trained on, and warnings."""
    found = artefact.load(path)
    warnings = artefact.check_fingerprint(found.fingerprint, fingerprint(backbone), allow_other_weights)
    if found.head != backbone.head or found.family not in (None, backbone.family.name):
        raise ArtefactError(
            f"{path} holds a prompt for a {found.family or 'any'} model with head '{found.head}', but "
            f"{type(backbone.model).__name__} is a {backbone.family.name} model with head '{backbone.head}'"
        )
    name, site = name or found.task, Site(found.site, found.mode, found.place)
    slot = inject.slot(backbone, site, (name,), found.shape[0])
    if slot.width != found.shape[1]:
        raise ArtefactError(
            f"{path} holds a prompt of width {found.shape[1]}; site '{site.name}' of this model is {slot.width}"
        )
    method = stored.rebuilt(found, slot, path)
    own = dict(backbone.model.named_parameters())
    wrong = [
        name for name, value in found.heads.items() if name not in backbone.head_names or value.shape != own[name].shape
    ]
    if wrong:
        here = {name: list(own[name].shape) for name in backbone.head_names}
        raise ArtefactError(f"{path}: its head {', '.join(wrong)} does not fit this model's, which is {here}")
    config = PromptConfig.model_validate(
        {"method": found.method, "length": slot.length, "site": site.name, "mode": site.mode, "place": site.place}
        | {"options": found.options}
    )
    task = Task(name, site, config, found.initial, found)
    head = {name: found.heads[name] for name in backbone.head_names if name in found.heads}  # safetensors sorts them
    return (task, method, _tree(head)), warnings


def save(backbone: Backbone, parts: Sequence[tuple[Task, Any, dict[str, Tensor]]], directory: Path) -> None:
    """Write one artefact into `directory`, several into sub-directories of it."""
    weights = fingerprint(backbone)
    made = [_artefact(backbone, weights, *part) for part in parts]
    if len(made) == 1:
        artefact.save(made[0], directory)
        return
    if _holds_one(directory):
        raise ArtefactError(f"{directory} holds a prompt of its own; give another directory for {len(made)} of them")
    folders = [quote(one.task, safe=" ") for one in made]
    folders = [folder.replace(".", "%2E") if not folder.strip(".") else folder for folder in folders]
    for folder, one in zip(folders, made, strict=True):
        artefact.save(one, directory / folder)
    artefact.write_json(directory / ORDER, {"tasks": folders})


def directories(path: Path) -> list[Path]:
    """The artefacts that `save` wrote to `path`, in their order."""
    if not _holds_one(path) and (path / ORDER).is_file():
        values = artefact.read_json(path / ORDER)
        names = values.get("tasks") if isinstance(values, dict) else None
        if not isinstance(names, list) or not all(isinstance(n, str) and n == Path(n).name for n in names):
            raise ArtefactError(f"{path / ORDER} must list the sub-directories of its tasks")
        return [path / name for name in names]
    return [path]


def _holds_one(path: Path) -> bool:
    return any((path / mark).is_file() for mark in (artefact.MANIFEST, peft_format.CONFIG))


def _artefact(backbone: Backbone, weights: Fingerprint, task: Task, method: Any, head: dict[str, Tensor]) -> Artefact:
    found = task.found
    made = Artefact(
        task=task.name,
        prompt=stored.folded(method, task.name),
        initial=task.initial,
        method=task.config.method,
        options=dict(task.config.options),
        state=stored.state(method, task.name),
        heads={name: value.detach().cpu().clone() for name, value in head.items()},
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
        version=softprompts.__version__,
    )
    if found is None:
        return made
    same = stored.unchanged(found, made)
    return replace(made, scores=found.scores if same else {}, parents=found.parents if same else (found.digest,))
