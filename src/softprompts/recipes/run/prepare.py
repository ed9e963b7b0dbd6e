"""From a configuration to a run that can be trained: rows, backbone, method at its start, and every check of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softprompts import injection
from softprompts.backbone import Backbone, devices
from softprompts.config import Run, TaskConfig, TrainConfig, closest
from softprompts.data import ExampleTokenizer, Task, load_task, resolve_placement
from softprompts.data.templates import slot_sizes
from softprompts.errors import ConfigError
from softprompts.evaluation import metrics
from softprompts.injection import Site
from softprompts.methods.registry import check_site, find, sentence_encoders
from softprompts.model import SoftPromptModel, initialization
from softprompts.model.persistence import Start
from softprompts.model.setup import example_tokenizer, head_size, load_backbone
from softprompts.model.soft_prompt_model import label_words
from softprompts.training import backbone_weights, checkpoint, objectives
from softprompts.training.backbone_weights import BackboneWeights
from softprompts.training.distillation import TaskTeacher, load_teachers
from softprompts.types import Progress, PromptInit


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
    """Everything that a run needs, at the start of its training. Runs that share a batch have one model.

    Attributes:
        run: The configuration.
        model: What is evaluated: the backbone with the run's prompts, or the copy of it whose weights are trained.
        prompts: The name of each task's prompt in the model; none where weights are trained.
        init: The start of the prompts; None where weights are trained.
        tasks: The tasks with their rows.
        encoders: The tokenizer of each task's examples.
        teachers: The teacher of each task, where an objective compares with one.
        weights: The copy of the backbone and its trained weights, where no prompt is trained.
        initial_parameters: Copies of the trained parameters before training, by name.
    """

    run: Run
    model: SoftPromptModel
    prompts: tuple[str, ...]
    init: PromptInit | None
    tasks: tuple[Task, ...]
    encoders: tuple[ExampleTokenizer, ...]
    teachers: tuple[TaskTeacher, ...] = ()
    weights: BackboneWeights | None = None
    initial_parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def prompt(self, index: int) -> str | None:
        """The prompt of the task with this number; None where weights are trained."""
        return self.prompts[index] if self.prompts else None


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
        backbone_weights.check_installed(run.training)
    tasks = _load_tasks(runs, reporter)
    for name, run in runs.items():
        _check_run(run, tasks[name])
    first_name, first = next(iter(runs.items()))
    class_count = head_size(first.model.head, tasks[first_name][0].template)
    model = SoftPromptModel(load_backbone(first.model, labels=class_count, log=reporter.log))
    encoders_of_texts: set[str] = set()
    for run in runs.values():
        if run.training.target == "prompt":
            encoders_of_texts.update(sentence_encoders(run.prompt.method, run.prompt.options))
    model.registry.encoders.fetch(encoders_of_texts, model.backbone, reporter.log)
    prepared = {}
    for name, run in runs.items():
        if run.training.target == "prompt":
            prepared[name] = _prepare_prompts(name, run, model, tasks[name])
        else:
            prepared[name] = _prepare_weights(run, model.backbone, tasks[name])
        if note := _unused_rate(prepared[name]):
            reporter.log(f"{name}: {note}" if name else note)
    return prepared


def _load_tasks(runs: Mapping[str, Run], reporter: ProgressReporter) -> dict[str, tuple[Task, ...]]:
    """The tasks of each run; rows that several runs have are loaded once."""
    loaded: dict[str, Task] = {}
    tasks: dict[str, tuple[Task, ...]] = {}
    for name, run in runs.items():
        tasks[name] = ()
        for config in run.tasks:
            key = config.model_dump_json()
            if key not in loaded:
                loaded[key] = _load_task(config, reporter)
            tasks[name] += (loaded[key],)
    return tasks


def _load_task(config: TaskConfig, reporter: ProgressReporter) -> Task:
    task = load_task(config)
    reporter.log(
        f"{task.name}: {len(task.train):,} train / {len(task.validation):,} validation / {len(task.test):,} test "
        f"examples"
    )
    for note in task.notes:
        reporter.log(f"  {note}")
    return task


def _prepare_prompts(name: str, run: Run, model: SoftPromptModel, tasks: tuple[Task, ...]) -> PreparedRun:
    """The run with a prompt in the model for each of its tasks, at its start, named `RUN/TASK`."""
    backbone, length = model.backbone, run.prompt.num_virtual_tokens
    templates = [task.template for task in tasks]
    config = run.prompt.model_copy(update={"placement": _placement(run, tasks)})
    site = Site(config.site, config.mode, config.placement)
    spec = injection.prompt_spec(backbone, site, length, model.registry.encoders.widths)
    encoders = _encoders(backbone, tasks, length, site.placement)
    words: list[str] = []
    for template in templates:
        words += label_words(template)
    init = initialization.initialize(config.init, backbone, site, spec, seed=run.seed, labels=words)
    prompts = tuple(f"{name}/{task.name}" if name else task.name for task in tasks)
    model.add_prompts(prompts, config, templates, start=Start(init, run.seed))
    run_settings = run.model_dump(mode="json", exclude={"tasks", "runs"})
    for prompt, encoder, task_config in zip(prompts, encoders, run.tasks, strict=True):
        segments = encoder.segment_lengths if len(encoder.segment_lengths) > 1 else ()
        model.registry.describe(prompt, segments, {**run_settings, "task": task_config.model_dump(mode="json")})
    teachers: tuple[TaskTeacher, ...] = ()
    if run.training.distillation is not None:
        teachers = load_teachers(backbone, run.training.distillation, [task.name for task in tasks])
    return PreparedRun(
        run=run,
        model=model,
        prompts=prompts,
        init=init,
        tasks=tasks,
        encoders=encoders,
        teachers=teachers,
        initial_parameters=checkpoint.copies(model.trainable(prompts)),
    )


def _prepare_weights(run: Run, backbone: Backbone, tasks: tuple[Task, ...]) -> PreparedRun:
    """The run that trains the weights of a copy of the backbone; no prompt takes room from its texts."""
    weights = backbone_weights.copy_backbone(backbone, run.training, run.seed)
    # The kernels of evaluation are faster and equal up to rounding.
    model = SoftPromptModel(weights.with_kernels(backbone.kernels))
    encoders = _encoders(backbone, tasks, 0, _placement(run, tasks))
    return PreparedRun(run, model, (), None, tasks, encoders, weights=weights)


def _placement(run: Run, tasks: Sequence[Task]) -> str:
    """The placement of the run's prompts in its tasks."""
    return resolve_placement(run.prompt.placement, [task.template for task in tasks])


def _encoders(backbone: Backbone, tasks: Sequence[Task], length: int, place: str) -> tuple[ExampleTokenizer, ...]:
    """The tokenizer of each task's examples."""
    return tuple(example_tokenizer(backbone, task.template, length, index, place) for index, task in enumerate(tasks))


def _check_run(run: Run, tasks: Sequence[Task]) -> None:
    """Raise ConfigError for what would only fail after hours of work."""
    _check_training(run.training, run.prompt.method)
    _check_placement(run, tasks)
    for task in tasks:
        if run.training.eval_steps is not None and not task.validation:
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
    """Raise ConfigError for objectives that do not exist, and rates of groups that the method does not have."""
    objectives.weigh(train.objectives)
    known = find(method).groups
    for name in train.learning_rates:
        if name not in known:
            raise ConfigError(
                f"training.learning_rates: method {method} has no group '{name}'{closest(name, known)} groups: "
                f"{', '.join(known)}"
            )


def _check_placement(run: Run, tasks: Sequence[Task]) -> None:
    """Raise ConfigError where a task's template does not fit the place of the prompt."""
    prompt = run.prompt
    if _placement(run, tasks) != "template" or run.training.target != "prompt":
        return
    for task in tasks:
        sizes = slot_sizes(task.template.templates, prompt.num_virtual_tokens, task.name)
        if prompt.segments and sizes != prompt.segments:
            raise ConfigError(
                f"{task.name}: the template's slots have {' + '.join(map(str, sizes))} prompt tokens, prompt.segments "
                f"says {' + '.join(map(str, prompt.segments))}; leave prompt.segments out"
            )


def _unused_rate(prepared: PreparedRun) -> str:
    """A note that the learning rate was set and no parameter learns at it; empty where one does, or at the default."""
    train, method = prepared.run.training, prepared.run.prompt.method
    if prepared.weights is not None or train.learning_rate == TrainConfig().learning_rate:
        return ""
    trainable = prepared.model.trainable(prepared.prompts)
    tensors = [name.split(".", 2)[2] for name in trainable if name.startswith("prompts.")]
    used = []
    for group_name, group in prepared.model.registry.method(prepared.prompts[0]).groups.items():
        if not any(tensor.startswith(group.parameters) for tensor in tensors):
            continue
        if group.rate is None and group_name not in train.learning_rates:
            return ""
        used.append(group_name)
    return (
        f"training.learning_rate changes nothing: all parameters of method {method} have separate rates, "
        f"training.learning_rates: {', '.join(used)}"
    )
