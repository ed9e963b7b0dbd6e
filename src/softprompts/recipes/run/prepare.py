"""From a configuration to a learner that is ready to be trained."""

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
from softprompts.training import objectives
from softprompts.training import weights as finetune
from softprompts.training.checkpoint import Progress
from softprompts.training.distillation import TaskTeacher, load_teachers
from softprompts.types import PromptInit

UNBOUNDED = 1_000_000
"""Room for models with relative positions, which nothing bounds."""


def _silent(*_: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class ProgressReporter:
    """What a person sees while a job runs: plain lines, each training step of each run, rows judged of all rows.

    A run's name is empty where it is the only one.
    """

    log: Callable[[str], None] = _silent
    on_step: Callable[[str, Progress], None] = _silent
    on_eval: Callable[[str, int, int], None] = _silent


SILENT = ProgressReporter()


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs, ready: the learner at its start, its tasks with their encoders and first prompts [P, D].

    Where a method makes a prompt from each text, the first prompt of its tasks is the start that it was given.
    teachers: of each task, where there are objectives that compare with them; weights: what is trained instead of a
    prompt, which then has no start; begin: everything that is trained, by name, as copies of where it begins.
    """

    run: Run
    learner: Learner
    start: PromptInit | None
    tasks: tuple[Task, ...]
    encoders: tuple[ExampleTokenizer, ...]
    initial: tuple[Tensor, ...] = ()
    teachers: tuple[TaskTeacher, ...] = ()
    weights: finetune.Weights | None = None
    begin: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


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


def _check_training(train: TrainConfig, method: str) -> None:
    """Raise ConfigError for settings of the training that contradict each other or the method."""
    objectives.weigh(train.objectives)
    taught = [name for name in objectives.TAUGHT if train.objectives.get(name)]
    if taught and train.distil is None:
        raise ConfigError(f"objective '{taught[0]}' compares with teachers; name them in train.distil.teachers")
    if train.distil is not None and not taught:
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


def _check_run(run: Run, tasks: Sequence[Task]) -> None:
    """Raise ConfigError for what would only be noticed after hours of work."""
    _check_training(run.train, run.prompt.method)
    if run.model.head == "features":
        raise ConfigError("head 'features' has nothing to train on; possible: lm, sequence, token, span")
    if run.model.head != "lm" and len(tasks) > 1:
        raise ConfigError("a classification head is trained for one task at a time; use one task, or model.head: lm")
    _check_place(run, tasks)
    for task in tasks:
        if run.train.evaluate_every is not None and not task.validation:
            raise ConfigError(f"{task.name} has no validation rows to choose by; set task.split.validation_fraction")
        for name in task.template.metrics:
            metric = metrics.METRICS.get(name)
            fitting = [key for key, one in metrics.METRICS.items() if task.template.kind in one.kinds]
            if metric is None or name not in fitting:
                raise ConfigError(
                    f"{task.name}: metric '{name}' is not for kind {task.template.kind}{closest(name, fitting)} "
                    f"possible: {', '.join(fitting)}"
                )


def _check_place(run: Run, tasks: Sequence[Task]) -> None:
    prompt = run.prompt
    slotted = place_of(prompt.place, [task.template for task in tasks]) == "template"
    for task in tasks:
        if prompt.site in ("decoder", "kv") and task.template.chat and task.template.chat_place == "user":
            raise ConfigError(
                f"{task.name}: chat_place is user, but at site '{prompt.site}' nothing can stand before the prompt; "
                f"use chat_place: start, or site input or layers"
            )
        if not slotted or run.train.train != "prompt":
            continue
        sizes = slot_sizes(task.template.templates, prompt.length, task.name)
        if prompt.segments and sizes != prompt.segments:
            raise ConfigError(
                f"{task.name}: the template's slots have {' + '.join(map(str, sizes))} prompt tokens, prompt.segments "
                f"says {' + '.join(map(str, prompt.segments))}; leave prompt.segments out"
            )


def prepare(run: Run, screen: ProgressReporter = SILENT) -> PreparedRun:
    """Load what `run` names: rows, backbone, method at its start.

    Raises DataError, AssetError, BackboneError, ArtifactError or ConfigError before anything is trained or written.
    """
    return prepare_many({"": run}, screen)[""]


def prepare_many(runs: Mapping[str, Run], screen: ProgressReporter = SILENT) -> dict[str, PreparedRun]:
    """The same for runs that share their model, which is loaded once, as are the rows of a task that several have."""
    loaded: dict[str, Task] = {}
    for run in runs.values():
        if run.model.device_map is None:
            devices.choose_device(run.model.device)  # refused before rows are read, where it is not here
        check_site(run.prompt.method, run.prompt.site)
        finetune.check_installed(run.train)
        for config in run.tasks:
            key = config.model_dump_json()
            if key not in loaded:
                loaded[key] = _load_rows(config, screen)
    tasks = {name: tuple(loaded[one.model_dump_json()] for one in run.tasks) for name, run in runs.items()}
    for name, run in runs.items():
        _check_run(run, tasks[name])
    first = next(iter(runs))
    prompts = [run.prompt for run in runs.values() if run.train.train == "prompt"]
    asked = {one for prompt in prompts for one in sentence_encoders(prompt.method, prompt.options)}
    head = head_size(runs[first].model.head, tasks[first][0].template)
    model = load_backbone(runs[first].model, labels=head, say=screen.log)
    sentences = Sentences()
    sentences.fetch(asked, model, screen.log)
    jobs = {name: _job(run, model, tasks[name], sentences) for name, run in runs.items()}
    for name, job in jobs.items():
        if note := _idle_rate(job):
            screen.log(f"{name}: {note}" if name else note)
    return jobs


def _idle_rate(job: PreparedRun) -> str:
    """That `train.rate` was set and nothing learns at it; empty where something does, or it has its default."""
    train, method = job.run.train, job.run.prompt.method
    if job.weights is not None or train.rate == TrainConfig().rate:
        return ""
    names = [name.removeprefix("method.") for name in job.learner.parameters()]
    used = {k: g for k, g in groups(job.learner.method).items() if any(n.startswith(g.parameters) for n in names)}
    if any(group.rate is None and name not in train.rates for name, group in used.items()):
        return ""
    return f"train.rate changes nothing: all of method {method} has rates of its own, train.rates: {', '.join(used)}"


def _load_rows(config: TaskConfig, screen: ProgressReporter) -> Task:
    task = load(config)
    screen.log(
        f"{task.name}: {len(task.train)} rows to train, {len(task.validation)} to choose, {len(task.test)} to judge"
    )
    for note in task.notes:
        screen.log(f"  {note}")
    return task


def _job(run: Run, model: Backbone, tasks: tuple[Task, ...], sentences: Sentences) -> PreparedRun:
    """The run on a backbone and rows that are there."""
    if run.train.train != "prompt":
        return _weights_job(run, model, tasks)
    place = place_of(run.prompt.place, [task.template for task in tasks])
    site = Site(run.prompt.site, run.prompt.mode, place)
    slot = injection.prompt_spec(model, site, tuple(task.name for task in tasks), run.prompt.length, sentences.widths)
    encoders = tuple(encoder_for(model, task.template, run.prompt.length, i, place) for i, task in enumerate(tasks))
    words = tuple(
        f"{task.template.separator}{word}" for task in tasks for word in (task.template.verbalizer or {}).values()
    )
    start = initialization.initialize(run.prompt.init, model, site, slot, seed=run.seed, labels=words)
    torch.manual_seed(run.seed)  # what a method draws for itself
    method = build(run.prompt.method, run.prompt.options, slot, start).to(model.device)
    first = [stored.folded(method, task) for task in slot.tasks]
    initial = tuple(start.prompt.detach().float().cpu() if one is None else one for one in first)
    learner = Learner(model, site, slot, method, copy_head(model), sentences)
    distil = run.train.distil
    teachers = () if distil is None else load_teachers(model, distil, slot.tasks)
    begin = {name: value.detach().clone() for name, value in learner.parameters().items()}
    return PreparedRun(run, learner, start, tasks, encoders, initial, teachers, begin=begin)


def _weights_job(run: Run, model: Backbone, tasks: tuple[Task, ...]) -> PreparedRun:
    """The run that trains weights of a copy of the backbone; no prompt takes room from its texts."""
    weights = finetune.copied(model, run.train, tuple(task.name for task in tasks), run.seed)
    place = place_of(run.prompt.place, [task.template for task in tasks])
    encoders = tuple(encoder_for(model, task.template, 0, i, place) for i, task in enumerate(tasks))
    return PreparedRun(run, weights.judged_with(model.kernels), None, tasks, encoders, weights=weights)


def encoder_for(
    model: Backbone, form: TaskTemplate, length: int, task: int = 0, place: str = "auto"
) -> ExampleTokenizer:
    """The encoder of a task for this backbone, with room for a prompt of `length` tokens.

    place: as of the site; `template` makes slots of the `<prompt>` in the format's templates, without a prompt of none.
    """
    room = UNBOUNDED if model.max_positions is None else model.max_positions - length
    slots: tuple[int, ...] = ()
    if place == "template":
        count = sum(len(split_slots(one)[1]) for one in form.templates)
        slots = slot_sizes(form.templates, length, form.name) if length else (0,) * count
    return ExampleTokenizer(form, model.tokenizer, model.family.name, model.head, room, task, slots)  # type: ignore[arg-type]


def head_size(head: str, form: TaskTemplate) -> int | None:
    """Rows of a classification head for tasks like this one; None where the head or the task has no classes."""
    if head == "sequence" and form.kind == "regression":
        return 1
    return len(classes(form)) or None if head in ("sequence", "token") else None
