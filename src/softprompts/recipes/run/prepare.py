"""From a configuration to a model that is ready to be trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softprompts import injection
from softprompts.backbone import Backbone, devices
from softprompts.config import Run, TaskConfig, TrainConfig, closest
from softprompts.data import ExampleTokenizer, Task, load, place_of
from softprompts.data.templates import slot_sizes
from softprompts.errors import ConfigError
from softprompts.evaluation import metrics
from softprompts.injection import Site
from softprompts.methods import check_site, find, sentence_encoders
from softprompts.model import SoftPromptModel, initialization
from softprompts.model.persistence import Start
from softprompts.model.setup import example_tokenizer, head_size, load_backbone
from softprompts.model.soft_prompt_model import label_words
from softprompts.training import objectives
from softprompts.training import weights as finetune
from softprompts.training.checkpoint import Progress
from softprompts.training.distillation import TaskTeacher, load_teachers
from softprompts.types import PromptInit


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
    """All that a run needs, ready: the model with the prompt of each task at its start, the tasks and their encoders.

    Runs that share a batch have one model. prompts: of each task, by name; none where weights are trained. teachers: of
    each task, where there are objectives that compare with them; weights: what is trained instead of a prompt, which
    then has no start; begin: everything that is trained, by name, as copies of where it begins.
    """

    run: Run
    model: SoftPromptModel
    prompts: tuple[str, ...]
    start: PromptInit | None
    tasks: tuple[Task, ...]
    encoders: tuple[ExampleTokenizer, ...]
    teachers: tuple[TaskTeacher, ...] = ()
    weights: finetune.Weights | None = None
    begin: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def prompt(self, index: int) -> str | None:
        """The prompt of the task number `index`; None where weights are trained."""
        return self.prompts[index] if self.prompts else None


def _check_training(train: TrainConfig, method: str) -> None:
    """Raise ConfigError for settings of the training that contradict each other or the method."""
    objectives.weigh(train.objectives)
    known = find(method).groups
    for name in train.learning_rates:
        if name not in known:
            raise ConfigError(
                f"training.learning_rates: method {method} has no group '{name}'{closest(name, known)} groups: "
                f"{', '.join(known)}"
            )


def _check_run(run: Run, tasks: Sequence[Task]) -> None:
    """Raise ConfigError for what would only be noticed after hours of work."""
    _check_training(run.training, run.prompt.method)
    _check_place(run, tasks)
    for task in tasks:
        if run.training.eval_steps is not None and not task.validation:
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
    slotted = place_of(prompt.placement, [task.template for task in tasks]) == "template"
    for task in tasks:
        if not slotted or run.training.target != "prompt":
            continue
        sizes = slot_sizes(task.template.templates, prompt.num_virtual_tokens, task.name)
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
        finetune.check_installed(run.training)
        for config in run.tasks:
            key = config.model_dump_json()
            if key not in loaded:
                loaded[key] = _load_rows(config, screen)
    tasks = {name: tuple(loaded[one.model_dump_json()] for one in run.tasks) for name, run in runs.items()}
    for name, run in runs.items():
        _check_run(run, tasks[name])
    first = next(iter(runs))
    prompts = [run.prompt for run in runs.values() if run.training.target == "prompt"]
    asked = {one for prompt in prompts for one in sentence_encoders(prompt.method, prompt.options)}
    head = head_size(runs[first].model.head, tasks[first][0].template)
    model = SoftPromptModel(load_backbone(runs[first].model, labels=head, log=screen.log))
    model.registry.encoders.fetch(asked, model.backbone, screen.log)
    jobs = {name: _prepared(name, run, model, tasks[name]) for name, run in runs.items()}
    for name, job in jobs.items():
        if note := _idle_rate(job):
            screen.log(f"{name}: {note}" if name else note)
    return jobs


def _idle_rate(job: PreparedRun) -> str:
    """A warning that nothing learns at the `training.learning_rate` that was set; empty where something does."""
    train, method = job.run.training, job.run.prompt.method
    if job.weights is not None or train.learning_rate == TrainConfig().learning_rate:
        return ""
    names = [name.split(".", 2)[2] for name in job.model.trainable(job.prompts) if name.startswith("prompts.")]
    groups = job.model.registry.method(job.prompts[0]).groups
    used = {name: group for name, group in groups.items() if any(n.startswith(group.parameters) for n in names)}
    if any(group.rate is None and name not in train.learning_rates for name, group in used.items()):
        return ""
    return (
        f"training.learning_rate changes nothing: all of method {method} has rates of its own, "
        f"training.learning_rates: {', '.join(used)}"
    )


def _load_rows(config: TaskConfig, screen: ProgressReporter) -> Task:
    task = load(config)
    screen.log(
        f"{task.name}: {len(task.train)} rows to train, {len(task.validation)} to choose, {len(task.test)} to judge"
    )
    for note in task.notes:
        screen.log(f"  {note}")
    return task


def _prepared(name: str, run: Run, model: SoftPromptModel, tasks: tuple[Task, ...]) -> PreparedRun:
    """The run on a model and rows that are there; its prompts are called as its tasks, behind its own name."""
    if run.training.target != "prompt":
        return _weights_run(run, model.backbone, tasks)
    backbone, length = model.backbone, run.prompt.num_virtual_tokens
    templates = [task.template for task in tasks]
    place = place_of(run.prompt.placement, templates)
    site = Site(run.prompt.site, run.prompt.mode, place)
    spec = injection.prompt_spec(backbone, site, length, model.registry.encoders.widths)
    encoders = tuple(example_tokenizer(backbone, form, length, i, place) for i, form in enumerate(templates))
    words = [word for form in templates for word in label_words(form)]
    init = initialization.initialize(run.prompt.init, backbone, site, spec, seed=run.seed, labels=words)
    prompts = tuple(f"{name}/{task.name}" if name else task.name for task in tasks)
    config = run.prompt.model_copy(update={"placement": place})
    model.add_prompts(prompts, config, templates, start=Start(init, run.seed))
    shared = run.model_dump(mode="json", exclude={"tasks", "runs"})
    for prompt, encoder, task in zip(prompts, encoders, run.tasks, strict=True):
        segments = encoder.slots if len(encoder.slots) > 1 else ()
        model.registry.describe(prompt, segments, {**shared, "task": task.model_dump(mode="json")})
    distillation, names = run.training.distillation, tuple(task.name for task in tasks)
    teachers = () if distillation is None else load_teachers(backbone, distillation, names)
    begin = {name: value.detach().clone() for name, value in model.trainable(prompts).items()}
    return PreparedRun(run, model, prompts, init, tasks, encoders, teachers, begin=begin)


def _weights_run(run: Run, backbone: Backbone, tasks: tuple[Task, ...]) -> PreparedRun:
    """The run that trains weights of a copy of the backbone; no prompt takes room from its texts."""
    weights = finetune.copied(backbone, run.training, run.seed)
    place = place_of(run.prompt.placement, [task.template for task in tasks])
    encoders = tuple(example_tokenizer(backbone, task.template, 0, i, place) for i, task in enumerate(tasks))
    return PreparedRun(run, weights.judged_with(backbone.kernels), (), None, tasks, encoders, weights=weights)
