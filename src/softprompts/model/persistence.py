"""Prompts made from a configuration, opened from artifacts, and packed into artifacts again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softprompts import __version__, injection
from softprompts.artifacts import artifact, collection, peft_files
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.fingerprint import check_fingerprint
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import PromptConfig, closest
from softprompts.data import TaskTemplate
from softprompts.errors import ArtifactError, ConfigError
from softprompts.injection import Site
from softprompts.methods import (
    PromptMethod,
    build,
    build_tasks,
    check_site,
    find,
    fold,
    sentence_encoders,
)
from softprompts.model import initialization
from softprompts.model.peft.prompt_tuning import PromptTuningConfig
from softprompts.model.registry import NewPrompt, PromptRecord, PromptRegistry
from softprompts.model.sentence_encoders import SentenceEncoders
from softprompts.types import SOURCES, Fingerprint, PromptInit, PromptSpec

AnyConfig = PromptConfig | PromptTuningConfig
"""A configuration of ours, or one under PEFT's names."""


@dataclass(frozen=True)
class Start:
    """Where new prompts begin, beside what their configuration says.

    Attributes:
        init: The start itself; None: what the configuration describes.
        seed: Of the start's random draws and of what the method draws for itself; None: the start is drawn with seed
            0, and the method draws from torch's global generator.
        labels: The tasks' label words, for starts from labels where the configuration names none.
    """

    init: PromptInit | None = None
    seed: int | None = None
    labels: tuple[str, ...] = ()


def prompt_names(config: AnyConfig, task: str, tasks: Sequence[str] | None) -> Sequence[str]:
    """What a model's first prompts are called: `tasks` or, without them, `task`, or places where `config` has several.

    Raises:
        ConfigError: One name is given for several prompts.
    """
    count = 1 if isinstance(config, PromptConfig) else config.count
    if task != "default" and (tasks is not None or count > 1):
        raise ConfigError(f"task '{task}' names one prompt; give the names of all {count} as tasks")
    if tasks is None:
        return (task,) if count == 1 else tuple(map(str, range(count)))
    return tasks


def create(
    backbone: Backbone,
    encoders: SentenceEncoders,
    names: tuple[str, ...],
    config: AnyConfig,
    *,
    start: Start | None = None,
    modules_to_save: Sequence[str] | None = None,
    templates: Sequence[TaskTemplate | None] | None = None,
) -> list[NewPrompt]:
    """New prompts of one method at its start, each with a copy of the head.

    Args:
        backbone: The frozen backbone.
        encoders: Gets the encoders of whole texts that the method reads with.
        names: The prompts' names.
        config: What they are.
        start: Where they begin.
        modules_to_save: Modules of the head that are trained along; None: what `config` says, else all of it.
        templates: The template of each task.

    Raises:
        ConfigError: The configuration makes no sense.
        BackboneError: The model does not have the site.
    """
    count = len(names) if isinstance(config, PromptConfig) else config.count
    if count != len(names):
        raise ConfigError(f"num_tasks is {count}, but {len(names)} are named: {', '.join(names) or 'none'}")
    start = start or Start()
    init = start.init
    if not isinstance(config, PromptConfig):
        modules_to_save = config.modules_to_save if modules_to_save is None else modules_to_save
        config, described = config.describe(backbone)
        init = described if init is None else init
    init_digest = None if init is None else initialization.digest(init)
    check_site(config.method, config.site)
    site = Site(config.site, config.mode, config.placement, config.segments)
    encoders.fetch(sentence_encoders(config.method, config.options), backbone)
    spec = injection.prompt_spec(backbone, site, config.num_virtual_tokens, encoders.widths)
    if init is None:
        init = initialization.initialize(config.init, backbone, site, spec, seed=start.seed or 0, labels=start.labels)
    if start.seed is not None:
        torch.manual_seed(start.seed)
    methods = build_tasks(config.method, config.options, spec, init, names)
    site = replace(site, placement=injection.resolve_placement(backbone, site))
    prompts = []
    for name, template in zip(names, templates or [None] * len(names), strict=True):
        prompt = fold(methods[name])
        initial = init.prompt.detach().float().cpu().clone() if prompt is None else prompt
        record = PromptRecord(
            site, config, initial, template, parents=init.parents, seed=start.seed, init_digest=init_digest
        )
        head = _new_head(backbone, modules_to_save)
        prompts.append(NewPrompt(name, methods[name].to(backbone.device), record, head))
    return prompts


def create_sharing(
    backbone: Backbone,
    registry: PromptRegistry,
    name: str,
    other: str,
    *,
    template: TaskTemplate | None = None,
    seed: int | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> NewPrompt:
    """A new prompt that shares with the prompt `other` what its method shares; its own parameters start anew.

    Args:
        backbone: The frozen backbone.
        registry: The prompts.
        name: The new prompt's name.
        other: The prompt whose configuration it has.
        template: The template of its task.
        seed: Of what the method draws for the new prompt; None: it draws from torch's global generator.
        modules_to_save: Modules of the head that are trained along.
    """
    record, method = registry.records[other], registry.method(other)
    begin = torch.zeros(method.spec.length, method.spec.width) if record.initial is None else record.initial
    init = PromptInit(begin, method.sources)
    if seed is not None:
        torch.manual_seed(seed)
    created = build(record.config.method, record.config.options, method.spec, init, method.shared)
    prompt = fold(created)
    site = replace(record.site, segments=record.config.segments)
    initial = record.initial if prompt is None else prompt
    record = PromptRecord(site, record.config, initial, template, seed=seed)
    return NewPrompt(name, created.to(backbone.device), record, _new_head(backbone, modules_to_save))


def _new_head(backbone: Backbone, modules: Sequence[str] | None) -> nn.Module | None:
    parameters = dict(backbone.model.named_parameters())
    return _tree({name: parameters[name] for name in head_names(backbone, modules)})


def head_names(backbone: Backbone, modules: Sequence[str] | None) -> tuple[str, ...]:
    """Parameters of the classification head that belong to `modules` (their names may be the end of a path); None: all.

    Raises:
        ConfigError: The head does not have such a module.
    """
    if modules is None:
        return backbone.head_names
    known = list(dict.fromkeys(name.rpartition(".")[0] for name in backbone.head_names))
    for name in tuple(known):
        if name.split(".")[0] not in known:
            known.append(name.split(".")[0])
    prefixes: tuple[str, ...] = ()
    for module in modules:
        matching = tuple(f"{name}." for name in known if f".{name}".endswith(f".{module}"))
        if not matching:
            raise ConfigError(
                f"modules_to_save '{module}' is not a module of the head of {type(backbone.model).__name__}"
                f"{closest(module, known)} possible: {', '.join(known) or 'none'}"
            )
        prefixes += matching
    return tuple(name for name in backbone.head_names if name.startswith(prefixes))


def _tree(tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """Trainable float32 copies of `tensors` as a module whose parameters have the same dotted names; None for none."""
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


def open_artifact(
    backbone: Backbone,
    encoders: SentenceEncoders,
    path: str | Path,
    *,
    name: str | None = None,
    member: int | str | None = None,
    allow_other_weights: bool = False,
    trainable: bool = True,
    loaded: Artifact | None = None,
) -> tuple[NewPrompt, list[str]]:
    """The prompt in an artifact's directory, and warnings. Every way to open one is this function.

    Args:
        backbone: The frozen backbone.
        encoders: Gets the encoders of whole texts that the method reads with.
        path: The directory, ours or PEFT's.
        name: The prompt's name; None: the artifact's.
        member: Which of several prompts in the directory, by name or place.
        allow_other_weights: Whether weights of another fingerprint only cost a warning.
        trainable: Whether the method is built as it was trained. If not, a plain prompt is opened as such, whatever
            method trained it.
        loaded: The artifact, where it was read from the directory before.

    Raises:
        ArtifactError: The artifact cannot be read, was made for other weights or does not fit, saying how.
        ConfigError: Its method or options are not known here.
    """
    opened = artifact.load(path, member) if loaded is None else loaded
    warnings = check_fingerprint(opened.fingerprint, fingerprint(backbone), allow_other_weights)
    if opened.head != backbone.head or opened.family not in (None, backbone.family.name):
        raise ArtifactError(
            f"{path} holds a prompt for a {opened.family or 'any'} model with head '{opened.head}', but "
            f"{type(backbone.model).__name__} is a {backbone.family.name} model with head '{backbone.head}'"
        )
    site = Site(opened.site, opened.mode, opened.placement, opened.segments)
    plain = opened.prompt is not None and not trainable
    if not plain:
        encoders.fetch(sentence_encoders(opened.method, opened.options), backbone)
    spec = injection.prompt_spec(backbone, site, opened.shape[0], encoders.widths)
    if spec.width != opened.shape[1]:
        raise ArtifactError(
            f"{path} holds a prompt of width {opened.shape[1]}; site '{site.name}' of this model is {spec.width}"
        )
    name_of_method, options = ("prompt-tuning", {}) if plain else (opened.method, opened.options)
    method = (
        build(name_of_method, {}, spec, PromptInit(opened.require_prompt(path)))
        if plain
        else rebuild(opened, spec, path)
    )
    head = _tree(_fitting_head(opened, backbone, path))
    if not trainable:
        method.requires_grad_(False)
        if head is not None:
            head.requires_grad_(False)
    config = PromptConfig.model_validate(
        {"method": name_of_method, "num_virtual_tokens": spec.length, "site": site.name, "mode": site.mode}
        | {"placement": site.placement, "options": options, "segments": site.segments}
    )
    record = PromptRecord(site, config, opened.initial, artifact=opened)
    return NewPrompt(name or opened.task, method, record, head), warnings


def _fitting_head(opened: Artifact, backbone: Backbone, path: str | Path) -> dict[str, Tensor]:
    """The artifact's head in the model's order; raises ArtifactError where it does not fit the model's."""
    parameters = dict(backbone.model.named_parameters())
    shapes = {name: list(parameters[name].shape) for name in backbone.head_names}
    wrong = [name for name, value in opened.heads.items() if shapes.get(name) != list(value.shape)]
    if wrong:
        raise ArtifactError(f"{path}: its head {', '.join(wrong)} does not fit this model's, which is {shapes}")
    return {name: opened.heads[name] for name in backbone.head_names if name in opened.heads}  # safetensors sorts them


def rebuild(opened: Artifact, spec: PromptSpec, origin: str | Path) -> PromptMethod:
    """The method of an artifact as it was saved; PEFT's starts at its prompt.

    Raises:
        ConfigError: A method or options that are not known here.
        ArtifactError: The state does not fit.
    """
    start = opened.initial if opened.state and opened.initial is not None else opened.require_prompt(origin)
    state = opened.state
    sources = next((value for name, value in state.items() if name.split(".")[-1] == SOURCES), None)
    method = build(opened.method, opened.options, spec, PromptInit(start, sources))
    if not state:
        return method
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        taught = find(opened.method).pretrained
        if taught and all(name.startswith(taught) for name in state):
            raise ArtifactError(
                f"{origin} holds what pretraining taught method {opened.method} and answers no task; train a run "
                f"that begins with it (prompt.init.state)"
            ) from None
        message = " ".join(str(error).split())
        raise ArtifactError(f"{origin}: the tensors of method {opened.method} do not fit: {message}") from None
    return method


def open_directory(
    backbone: Backbone, encoders: SentenceEncoders, path: Path, allow_other_weights: bool
) -> tuple[list[NewPrompt], tuple[str, ...], list[str]]:
    """All prompts in a directory, those of a group with one shared module; their names in order, and warnings.

    Raises:
        ArtifactError: As `open_artifact` does, and where prompts of a group do not share what they should.
    """
    prompts: list[NewPrompt] = []
    warnings: list[str] = []
    places: list[tuple[int, str]] = []
    for unit in collection.member_groups(path):
        group = []
        for member in unit:
            prompt, notes = open_artifact(
                backbone, encoders, member.path, member=member.task, allow_other_weights=allow_other_weights
            )
            group.append(prompt)
            warnings += notes
            places.append((member.position, prompt.name))
        _share(path, group)
        prompts += group
    return prompts, tuple(name for _, name in sorted(places)), warnings


def _share(path: Path, group: Sequence[NewPrompt]) -> None:
    """Give the methods of a group one shared module; raises ArtifactError where what they should share differs."""
    shared = group[0].method.shared
    for prompt in group[1:]:
        module = prompt.method.shared
        tensors = {} if module is None else module.state_dict()
        for name, value in ({} if shared is None else shared.state_dict()).items():
            if not torch.equal(value, tensors.get(name, value[:0])):
                raise ArtifactError(
                    f"{path}: 'shared.{name}', which {group[0].name} and {prompt.name} share, differs between them: "
                    "they were not saved together; load them one by one"
                )
        prompt.method.shared = shared


def plain(opened: Artifact, origin: str | Path) -> Artifact:
    """The artifact's folded prompt as ordinary prompt tuning, to be trained on as such; its parent is the artifact.

    Raises:
        ArtifactError: The prompt depends on the text.
    """
    state = {"prompt": opened.require_prompt(origin).clone()}
    return replace(opened, method="prompt-tuning", options={}, state=state, parents=(opened.digest,))


def pack(
    backbone: Backbone,
    registry: PromptRegistry,
    name: str,
    *,
    task: str | None = None,
    scores: Mapping[str, Any] | None = None,
    weights: Fingerprint | None = None,
) -> Artifact:
    """The artifact of a prompt as it is now, with all that is known of it.

    Args:
        backbone: The frozen backbone.
        registry: The prompts.
        name: Which one.
        task: What the artifact calls the task; None: the prompt's name.
        scores: The scores of the prompt; None: those of the artifact that it came from, where it is the same still.
        weights: The backbone's fingerprint, where it is there already.
    """
    record, method, source = registry.records[name], registry.method(name), registry.records[name].artifact
    template = None if record.template is None else record.template.to_json()
    config = dict(record.run) or {"prompt": record.config.model_dump(mode="json")}
    packed = Artifact(
        task=task or name,
        prompt=fold(method),
        initial=record.initial,
        method=record.config.method,
        options=dict(record.config.options),
        state=_cpu_copies(method.state_dict()),
        heads=_cpu_copies(registry.head(name)),
        site=record.site.name,
        mode=record.site.mode,
        placement=record.site.placement,
        family=backbone.family.name,
        head=backbone.head,
        backbone=backbone.name,
        revision=backbone.revision,
        fingerprint=fingerprint(backbone) if weights is None else weights,
        template=template if source is None or template is not None else source.template,
        config=config if source is None or record.run else source.config,
        scores=dict(scores or {}),
        parents=record.parents,
        version=__version__,
        segments=record.site.segments,
    )
    if source is None:
        return packed
    same = unchanged(source, packed)
    stored_scores = source.scores if same and scores is None else packed.scores
    return replace(packed, scores=stored_scores, parents=source.parents if same else (source.digest,))


def _cpu_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def unchanged(before: Artifact, now: Artifact) -> bool:
    """Whether two artifacts answer alike: the same prompt, or without one the same state, and the same heads."""
    if before.prompt is not None and now.prompt is not None:
        return torch.equal(before.prompt, now.prompt) and _are_equal(before.heads, now.heads)
    return _are_equal(before.state, now.state) and _are_equal(before.heads, now.heads)


def _are_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def save(backbone: Backbone, registry: PromptRegistry, directory: Path) -> None:
    """Write one prompt as an artifact into `directory`, several each into a sub-directory of it.

    Raises:
        ConfigError: There is no prompt.
        ArtifactError: The disk, or what is in the directory, forbids it.
    """
    if not registry.records:
        raise ConfigError("no prompt is loaded; use add_task or load_prompt first")
    weights = fingerprint(backbone)
    packed = {name: pack(backbone, registry, name, weights=weights) for name in registry.names}
    if len(packed) == 1:
        artifact.save(next(iter(packed.values())), directory)
        return
    if collection.is_artifact(directory):
        raise ArtifactError(f"{directory} already holds a prompt; give another directory for these {len(packed)}")
    for name, packed_prompt in packed.items():
        artifact.save(packed_prompt, directory / collection.folder_name(name))
    groups = [group for group in dict.fromkeys(registry.group(name) for name in packed) if len(group) > 1]
    folders = tuple(tuple(map(collection.folder_name, group)) for group in groups)
    peft = _peft([[packed[name] for name in group] for group in groups]) if groups else None
    collection.write_index(
        directory, collection.CollectionIndex(tuple(map(collection.folder_name, packed)), folders), peft
    )


def _peft(groups: Sequence[Sequence[Artifact]]) -> collection.PeftFiles | str:
    """PEFT's files for the prompts that share one, or why PEFT cannot load them."""
    members = groups[0]
    first = members[0]
    if len(groups) > 1:
        return f"{len(groups)} groups: PEFT's files hold one"
    if first.method != peft_files.MULTITASK:
        return f"method {first.method}: PEFT shares a prompt in multitask prompt tuning only"
    reason = artifact.why_not_peft(first)
    if reason is not None:
        return reason
    for member in members:
        if not _are_equal(first.heads, member.heads):
            return f"head {first.head} of each task: PEFT has one for all"
    states = [member.state for member in members]
    ranks = states[0][peft_files.MULTITASK_STATE[1]].shape[1]
    config = peft_files.multitask_config(artifact.peft_config(first), tasks=len(members), ranks=ranks)
    return collection.PeftFiles(config, peft_files.multitask_tensors(states, first.heads))
