"""A run from its configuration to prompt, results.json and report.html.

A run that trains weights (`training.target`) goes the same way, and keeps weights instead of a prompt.
"""

import functools
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from softprompts.artifacts import artifact
from softprompts.artifacts.artifact import Artifact
from softprompts.config import Run
from softprompts.config.sweep import sweep
from softprompts.data import EncodedExample
from softprompts.errors import ConfigError, TrainingError
from softprompts.evaluation import evaluate, page
from softprompts.evaluation.evaluate import Evaluation
from softprompts.evaluation.metrics import plain_scores
from softprompts.model import initialization
from softprompts.model.setup import load_backbone
from softprompts.recipes.run.prepare import SILENT, PreparedRun, ProgressReporter, prepare, prepare_many
from softprompts.recipes.run.results import compare, machine_changes, next_commands, page_of, prompt_directory, versions
from softprompts.training import backbone_weights, checkpoint, distillation
from softprompts.training.distillation import TeacherOutputs
from softprompts.training.loop import TrainingRun, is_main_process, train_many
from softprompts.training.trainables import Trainable, TrainablePrompts, TrainableWeights
from softprompts.types import Progress

__all__ = [
    "PreparedRun",
    "ProgressReporter",
    "fixed_settings",
    "is_main_process",
    "load_backbone",
    "next_commands",
    "pack",
    "prepare",
    "run",
    "versions",
]


def run(run: Run, reporter: ProgressReporter = SILENT) -> dict[str, Any]:
    """Evaluate the stock model, train, evaluate again; write prompt, results.json and report.html to `run.output_dir`.

    An interrupted run continues from its checkpoint when it is called again. The runs of a list `runs` train together.
    Each is written to a folder of `run.output_dir` as it would be alone; results.json and report.html beside these
    folders compare the runs. A run that fails is named there, and the others are finished all the same. Of several
    processes that a launcher started, all train, and the first one writes and shows.

    Args:
        run: The configuration.
        reporter: Shows a person how far the run is.

    Returns:
        The content of results.json.

    Raises:
        ConfigError, DataError, AssetError, BackboneError, ArtifactError: The run would fail; nothing was trained.
        TrainingError: No run could be trained, or a checkpoint belongs to a run with other settings.
    """
    started = time.time()
    reporter = reporter if is_main_process() else SILENT
    configs = sweep(run)
    _check_directories(configs)
    prepared = prepare_many(configs, reporter)
    training_runs = _training_runs(prepared, reporter)
    for training_run in training_runs.values():
        training_run.check_checkpoint()
    before = _evaluate_stock(prepared, reporter)
    trainable = _trainable(prepared, training_runs, reporter)
    histories: dict[str, list[Progress]] = {name: [] for name in prepared}
    failed: dict[str, str] = {}
    try:
        with closing(train_many(trainable, list(training_runs.values()))) as steps:
            for name, progress in steps:
                histories[name].append(progress)
                if progress.equivalence:
                    reporter.log(f"first batch: {progress.equivalence}")
                reporter.on_step(name, progress)
    except TrainingError as error:
        if len(error.failed) in (0, len(prepared)):
            raise
        failed = error.failed
    _log_training(prepared, histories, failed, reporter)
    pages = {}
    for name, prepared_run in prepared.items():
        if name not in failed:
            after = _evaluate_trained(name, prepared_run, reporter)
            seconds = time.time() - started
            pages[name] = _write(prepared_run, before[name], after, histories[name], seconds, reporter)
    if not run.runs:
        return _results(pages[""])
    results = compare(run, prepared, pages, histories, failed, time.time() - started)
    if is_main_process():
        page.write_results(Path(run.output_dir) / "results.json", results)
        page.write_page(Path(run.output_dir) / "report.html", results)
    return results


def check_writable(directory: Path) -> None:
    """Raise ConfigError before the work, and not after it, where nothing can be written into a directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"softprompts")
    except OSError as error:
        raise ConfigError(
            f"cannot write into {directory}: {error.strerror}; choose another directory with --out"
        ) from None


def _check_directories(configs: Mapping[str, Run]) -> None:
    """Raise ConfigError where the first process cannot write the results of a run."""
    if is_main_process():
        for config in configs.values():
            check_writable(Path(config.output_dir))
            backbone_weights.weights_directory(config.training, config.output_dir)


def _training_runs(prepared: Mapping[str, PreparedRun], reporter: ProgressReporter) -> dict[str, TrainingRun]:
    """The runs as the loop takes them; rows that several runs read alike are tokenized once."""
    encoded: dict[str, list[EncodedExample]] = {}
    training_runs = {}
    for name, prepared_run in prepared.items():
        examples = []
        for index, (encoder, task) in enumerate(zip(prepared_run.encoders, prepared_run.tasks, strict=True)):
            key = _reading_key(prepared_run, index)
            if key not in encoded:
                encoded[key] = list(map(encoder.example, task.train))
                truncated = sum(example.truncated_tokens > 0 for example in encoded[key])
                if truncated:
                    reporter.log(
                        f"{task.name}: {truncated} of {len(encoded[key])} texts were cut to fit {encoder.budget} tokens"
                    )
            examples += encoded[key]
        config = prepared_run.run
        validate = functools.partial(_validation_score, prepared_run) if config.training.eval_steps else None
        settings = fixed_settings(prepared_run)
        training_runs[name] = TrainingRun(
            name,
            examples,
            config.training,
            config.seed,
            validate=validate,
            directory=config.output_dir,
            settings=settings,
        )
    return training_runs


def _reading_key(prepared: PreparedRun, index: int) -> str:
    """Everything on which the tokens of a task's rows depend."""
    encoder = prepared.encoders[index]
    return f"{index} {encoder.room} {encoder.segment_lengths} {prepared.run.tasks[index].model_dump_json()}"


def fixed_settings(prepared: PreparedRun) -> dict[str, Any]:
    """What must be the same when a run is continued from its checkpoint.

    The artifacts that a run starts from, mixes or learns from may have been replaced in the meantime.
    """
    settings: dict[str, Any] = prepared.run.model_dump(
        mode="json", exclude={"output_dir", "evaluation", "runs", "training"}
    )
    settings["training"] = checkpoint.training_settings(prepared.run.training)
    config, init = prepared.run.prompt.init, prepared.init
    if init is not None and (config.sources or config.state or config.kind in initialization.READ):
        settings["start"] = initialization.digest(init)
    if prepared.teachers:
        settings["teachers"] = [teacher.digest for teacher in prepared.teachers]
    return settings


def _trainable(
    prepared: Mapping[str, PreparedRun], training_runs: Mapping[str, TrainingRun], reporter: ProgressReporter
) -> Trainable:
    """What the runs train: their prompts together, or the weights of the only run."""
    for prepared_run in prepared.values():
        if prepared_run.weights is not None:
            return TrainableWeights(prepared_run.weights, prepared_run.run.training.target)
    model = next(iter(prepared.values())).model
    prompts = {name: prepared_run.prompts for name, prepared_run in prepared.items()}
    trainable = TrainablePrompts(model, prompts, _teacher_outputs(prepared, training_runs, reporter))
    for name, outputs in trainable.teachers.items():
        for example, states in zip(outputs.examples, outputs.states, strict=True):
            count = trainable.label_count(name, example)
            if len(states) != count:
                raise ConfigError(
                    f"{prepared[name].tasks[example.task_id].name}: its teacher scores {len(states)} tokens of a row "
                    f"and the student {count}, because one of them has no state in front of the text (site kv); give "
                    f"them the same site"
                )
    return trainable


def _teacher_outputs(
    prepared: Mapping[str, PreparedRun], training_runs: Mapping[str, TrainingRun], reporter: ProgressReporter
) -> dict[str, TeacherOutputs]:
    """The teachers' outputs for the examples of each run; computed once for runs with equal teachers and examples."""
    computed: dict[tuple[Any, ...], TeacherOutputs] = {}
    outputs = {}
    for name, prepared_run in prepared.items():
        config = prepared_run.run.training.distillation
        if config is None:
            continue
        digests = tuple(teacher.digest for teacher in prepared_run.teachers)
        reading = tuple(_reading_key(prepared_run, index) for index in range(len(prepared_run.tasks)))
        key = (digests, config.layers, config.temperature, reading)
        if key not in computed:
            directory = Path(prepared_run.run.output_dir)
            file = directory / distillation.FILE if config.cache is None else Path(config.cache)
            computed[key] = distillation.targets(
                prepared_run.model.backbone,
                prepared_run.teachers,
                training_runs[name].examples,
                config,
                file=file if is_main_process() else None,
                progress=functools.partial(reporter.on_eval, f"{name}: teachers" if name else "teachers"),
            )
        outputs[name] = computed[key]
    return outputs


def _validation_score(prepared: PreparedRun) -> float:
    """The mean of the tasks' headline scores on their validation rows."""
    config = prepared.run.evaluation.model_copy(update={"resamples": 100})
    scores = []
    for index, (encoder, task) in enumerate(zip(prepared.encoders, prepared.tasks, strict=True)):
        evaluation = evaluate.evaluate(
            prepared.model, task.validation, prompt=prepared.prompt(index), encoder=encoder, config=config
        )
        scores.append(evaluation.headline.value)
    return sum(scores) / len(scores)


def _evaluate_stock(
    prepared: Mapping[str, PreparedRun], reporter: ProgressReporter
) -> dict[str, list[Evaluation | None]]:
    """The stock model's evaluation on each task of each run; tasks that runs evaluate alike are evaluated once."""
    known: dict[str, Evaluation | None] = {}
    evaluations: dict[str, list[Evaluation | None]] = {name: [] for name in prepared}
    for name, prepared_run in prepared.items():
        for index in range(len(prepared_run.tasks)):
            key = _reading_key(prepared_run, index) + prepared_run.run.evaluation.model_dump_json()
            if key not in known:
                known[key] = _evaluate("", prepared_run, index, "before", reporter)
            evaluations[name].append(known[key])
    return evaluations


def _evaluate_trained(name: str, prepared: PreparedRun, reporter: ProgressReporter) -> list[Evaluation | None]:
    """The evaluation of what a run trained, on each of its tasks."""
    return [_evaluate(name, prepared, index, "after", reporter) for index in range(len(prepared.tasks))]


def _evaluate(name: str, prepared: PreparedRun, index: int, when: str, reporter: ProgressReporter) -> Evaluation | None:
    """Evaluate a task's test rows.

    Args:
        name: The name of the run.
        prepared: The run.
        index: The number of the task.
        when: `before` evaluates the stock model, `after` what was trained.
        reporter: Shows the rows that are done, and the score.

    Returns:
        The evaluation; None without test rows, and for a stock model whose classification head nobody has trained.
    """
    model, task, run = prepared.model, prepared.tasks[index], prepared.run
    title = f"{name}: {task.name}" if name else task.name
    if when == "before":
        if not task.test or model.backbone.head_names:
            return None
    elif not task.test:
        reporter.log(f"{title} has no test rows, so nothing is evaluated")
        return None

    def progress(done: int) -> None:
        reporter.on_eval(f"{title} {when} training", done, len(task.test))

    evaluation = evaluate.evaluate(
        model,
        task.test,
        prompt=None if when == "before" else prepared.prompt(index),
        encoder=prepared.encoders[index],
        config=run.evaluation,
        seed=run.seed,
        progress=progress,
    )
    metric = next(iter(evaluation.scores))
    reporter.log(f"{title}: {metric} {evaluation.headline.value:.3f} {when} training")
    return evaluation


def _log_training(
    prepared: Mapping[str, PreparedRun],
    histories: Mapping[str, Sequence[Progress]],
    failed: Mapping[str, str],
    reporter: ProgressReporter,
) -> None:
    """Show which runs failed, where the machine changed on the way, and how the prompt was computed."""
    for name, message in failed.items():
        reporter.log(f"run '{name}' failed: {message}")
    paths: Counter[str] = Counter()
    for name, history in histories.items():
        for line in machine_changes(history):
            reporter.log(f"{name}: {line}" if name else line)
        if prepared[name].weights is None:
            paths.update(progress.path for progress in history)
    for path, count in paths.most_common(1):
        how = f"in every row ({path})" if path.startswith("concatenation") else "once a batch"
        reporter.log(f"the prompt was computed {how} in {count} of {paths.total()} steps")


def _write(
    prepared: PreparedRun,
    before: Sequence[Evaluation | None],
    after: Sequence[Evaluation | None],
    history: Sequence[Progress],
    seconds: float,
    reporter: ProgressReporter,
) -> list[dict[str, Any]]:
    """Write what a run trained, results.json and report pages, and give the page of each task."""
    directory, tasks = Path(prepared.run.output_dir), prepared.tasks
    pages = []
    for index in range(len(tasks)):
        pages.append(page_of(prepared, index, before[index], after[index], history, seconds))
    if not is_main_process():
        return pages
    reporter.log(f"writing {directory}")
    _write_trained(prepared, after)
    page.write_results(directory / "results.json", _results(pages))
    for content, task in zip(pages, tasks, strict=True):
        page.write_page(directory / ("report.html" if len(tasks) == 1 else f"report-{task.name}.html"), content)
    return pages


def _write_trained(prepared: PreparedRun, after: Sequence[Evaluation | None]) -> None:
    """Write the artifact of each task; for trained weights LoRA's adapter or, where asked for, the model."""
    if prepared.weights is None:
        for index, evaluation in enumerate(after):
            directory = prompt_directory(Path(prepared.run.output_dir), prepared.tasks[index].name, len(prepared.tasks))
            artifact.save(pack(prepared, index, evaluation), directory)
    elif weights_directory := backbone_weights.weights_directory(prepared.run.training, prepared.run.output_dir):
        backbone_weights.save(prepared.weights, weights_directory)


def _results(pages: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a run's results.json: its one page, or the pages of its tasks."""
    if len(pages) == 1:
        return pages[0]
    commands = []
    for content in pages:
        commands += content["next"]
    return {"format": 1, "tasks": pages, "next": commands}


def pack(prepared: PreparedRun, index: int, evaluation: Evaluation | None) -> Artifact:
    """The artifact of a task of a run: its prompt, where that began, and everything that belongs to it.

    Args:
        prepared: The run, which trains prompts.
        index: The number of the task.
        evaluation: The evaluation of the trained prompt.
    """
    scores = {} if evaluation is None else plain_scores(evaluation.scores)
    return prepared.model.pack(prepared.prompts[index], task=prepared.tasks[index].name, scores=scores)
