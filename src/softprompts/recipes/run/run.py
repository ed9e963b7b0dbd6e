"""Runs from their configuration to artifact, results.json and report page.

A run that trains weights (`training.target`) goes the same way; what it keeps instead of an artifact, finetune.py
writes.
"""

import functools
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softprompts.artifacts import artifact
from softprompts.artifacts.artifact import Artifact
from softprompts.config import Run
from softprompts.config.sweep import sweep
from softprompts.data import EncodedExample
from softprompts.errors import ConfigError, TrainingError
from softprompts.evaluation import evaluate
from softprompts.evaluation import page as report
from softprompts.evaluation.evaluate import Evaluation
from softprompts.model import initialization
from softprompts.model.setup import load_backbone
from softprompts.recipes.run.prepare import SILENT, PreparedRun, ProgressReporter, prepare, prepare_many
from softprompts.recipes.run.results import compare, machine_changes, next_commands, page_of, prompt_directory, versions
from softprompts.training import distillation, weights
from softprompts.training.distillation import TeacherOutputs
from softprompts.training.loop import Progress, TrainingRun, check_checkpoint, is_main_process, train_many
from softprompts.training.shared_batch import label_count

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


def run(run: Run, screen: ProgressReporter = SILENT) -> dict[str, Any]:
    """Do the whole of `run`: judge the stock model, train, judge again, write artifact, results and page into
    run.output_dir.

    Returns what results.json holds. An interrupted run goes on from its checkpoint when called again. With a list
    `runs` all of them train together, each is written to a folder of run.output_dir as it would be alone, and
    results.json and the page of run.output_dir compare them; a run that failed is named there, the others are finished
    all the same. Of several processes that a launcher started, all train, and the first one writes and shows.
    """
    began, main = time.time(), is_main_process()
    screen = screen if main else SILENT
    runs = sweep(run)
    for one in runs.values() if main else ():
        check_writable(Path(one.output_dir))
        weights.kept_at(one.training, one.output_dir)
    jobs = prepare_many(runs, screen)
    rows = _encode(jobs, screen)
    for name, one in runs.items():
        check_checkpoint(one.output_dir, rows[name], one.seed, fixed_settings(jobs[name]))
    before = _judge_stock(jobs, screen)
    histories, failed = _train(jobs, rows, screen)
    pages = {}
    for name, job in jobs.items():
        if name not in failed:
            pages[name] = _finish(name, job, before[name], histories[name], began, screen)
    if not run.runs:
        return _results(pages[""])
    results = compare(run, jobs, pages, histories, failed, time.time() - began)
    if main:
        report.write_results(Path(run.output_dir) / "results.json", results)
        report.write_page(Path(run.output_dir) / "report.html", results)
    return results


def _finish(
    name: str,
    job: PreparedRun,
    before: list[Evaluation | None],
    history: list[Progress],
    began: float,
    screen: ProgressReporter,
) -> list[dict[str, Any]]:
    """Judge a trained run, and write what it trained, results.json and pages; gives the page of each task."""
    out, count = Path(job.run.output_dir), len(job.tasks)
    after = [_judge(name, job, i, screen, "after") for i in range(count)]
    pages = [page_of(job, i, before[i], after[i], history, time.time() - began) for i in range(count)]
    if not is_main_process():
        return pages
    screen.log(f"writing {out}")
    _keep(job, after)
    report.write_results(out / "results.json", _results(pages))
    for page, task in zip(pages, job.tasks, strict=True):
        report.write_page(out / ("report.html" if count == 1 else f"report-{task.name}.html"), page)
    return pages


def _keep(job: PreparedRun, after: list[Evaluation | None]) -> None:
    """Write the run's artifacts; where it trained weights, LoRA's adapter or, if asked for, the model."""
    if job.weights is None:
        for i, scored in enumerate(after):
            one = pack(job, i, scored)
            artifact.save(one, prompt_directory(Path(job.run.output_dir), one.task, len(job.tasks)))
    elif place := weights.kept_at(job.run.training, job.run.output_dir):
        weights.save(job.weights, place)


def _results(pages: list[dict[str, Any]]) -> dict[str, Any]:
    """What results.json holds of a run: its one page, or those of its tasks."""
    several = {"format": 1, "tasks": pages, "next": [line for page in pages for line in page["next"]]}
    return pages[0] if len(pages) == 1 else several


def check_writable(out: Path) -> None:
    """Raise ConfigError now rather than after the work when nothing can be written into `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"softprompts")
    except OSError as error:
        raise ConfigError(f"cannot write into {out}: {error.strerror}; choose another directory with --out") from None


def fixed_settings(job: PreparedRun) -> dict[str, Any]:
    """What must be the same for a run to go on from its checkpoint.

    Artifacts that the run starts from, mixes or learns from may have been made anew since.
    """
    others: Any = {
        "output_dir": True,
        "evaluation": True,
        "runs": True,
        "training": {"save_steps", "lora", "save_model"},
    }
    settings: dict[str, Any] = job.run.model_dump(mode="json", exclude=others)
    given = job.run.prompt.init
    if job.start is not None and (given.sources or given.state or given.kind in initialization.READ):
        parts = (job.start.prompt, job.start.sources, *(job.start.factors or ()), *(job.start.state or {}).values())
        held = b"".join(part.cpu().numpy().tobytes() for part in parts if part is not None)
        settings["start"] = hashlib.sha256(held).hexdigest()
    if job.teachers:
        settings["teachers"] = [teacher.digest for teacher in job.teachers]
    return settings


def _key(job: PreparedRun, index: int) -> str:
    """What the rows of the job's task number `index` are read by: runs with the same key read them alike."""
    encoder = job.encoders[index]
    return f"{index} {encoder.room} {encoder.slots} {job.run.tasks[index].model_dump_json()}"


def _encode(jobs: Mapping[str, PreparedRun], screen: ProgressReporter) -> dict[str, list[EncodedExample]]:
    """The training rows of all tasks of each run as tokens."""
    parts: dict[str, list[EncodedExample]] = {}
    for job in jobs.values():
        for i, (encoder, task) in enumerate(zip(job.encoders, job.tasks, strict=True)):
            if _key(job, i) in parts:
                continue
            rows = parts[_key(job, i)] = [encoder.example(row) for row in task.train]
            cut = sum(row.cut > 0 for row in rows)
            if cut:
                screen.log(f"{task.name}: {cut} of {len(rows)} texts were cut to fit {encoder.budget} tokens")
    return {name: [row for i in range(len(job.tasks)) for row in parts[_key(job, i)]] for name, job in jobs.items()}


def _train(
    jobs: Mapping[str, PreparedRun], rows: Mapping[str, list[EncodedExample]], screen: ProgressReporter
) -> tuple[dict[str, list[Progress]], dict[str, str]]:
    """The history of each run, and why those that failed did; raises TrainingError when none is left."""
    histories: dict[str, list[Progress]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    targets = _targets(jobs, rows, screen)
    try:
        with closing(_steps(jobs, rows, targets)) as steps:
            for name, step in steps:
                histories[name].append(step)
                if step.parity:
                    screen.log(f"first batch: {step.parity}")
                screen.on_step(name, step)
        for name, history in histories.items():
            for line in machine_changes(history):
                screen.log(f"{name}: {line}" if name else line)
    except TrainingError as error:
        if len(error.failed) in (0, len(jobs)):
            raise
        failed = error.failed
        for name, message in failed.items():
            screen.log(f"run '{name}' failed: {message}")
    every = [step for name, history in histories.items() for step in history if jobs[name].weights is None]
    for path, count in Counter(step.path for step in every).most_common(1):
        how = f"in every row ({path})" if path.startswith("concatenation") else "once a batch"
        screen.log(f"the prompt was computed {how} in {count} of {len(every)} steps")
    return histories, failed


def _targets(
    jobs: Mapping[str, PreparedRun], rows: Mapping[str, list[EncodedExample]], screen: ProgressReporter
) -> dict[str, TeacherOutputs | None]:
    """What the teachers of each run make of its rows; computed once for runs that have the same of both."""
    found: dict[str, TeacherOutputs | None] = {}
    known: dict[tuple[Any, ...], TeacherOutputs] = {}
    for name, job in jobs.items():
        config = job.run.training.distillation
        if config is None:
            found[name] = None
            continue
        site = job.model.registry.site_of(job.prompts)
        own, digests = rows[name], tuple(teacher.digest for teacher in job.teachers)
        key = (digests, config.layers, config.temperature, tuple(_key(job, i) for i in range(len(job.tasks))))
        if key not in known:
            file = Path(job.run.output_dir) / distillation.FILE if config.cache is None else Path(config.cache)
            title = f"{name}: teachers" if name else "teachers"
            show, kept = functools.partial(screen.on_eval, title), file if is_main_process() else None
            known[key] = distillation.targets(job.model.backbone, job.teachers, own, config, kept, show)
        for row, states in zip(own, known[key].states, strict=True):
            if len(states) != (count := label_count(row, job.model.backbone, site)):
                task = job.tasks[row.task_id].name
                raise ConfigError(
                    f"{task}: its teacher scores {len(states)} tokens of a row and the student {count}, because one of "
                    f"them has no state in front of the text (site kv); give them the same site"
                )
        found[name] = known[key]
    return found


def _steps(
    jobs: Mapping[str, PreparedRun],
    rows: Mapping[str, list[EncodedExample]],
    targets: Mapping[str, TeacherOutputs | None],
) -> Generator[tuple[str, Progress], None, None]:
    """The steps of all runs; one that trains weights is always alone."""
    pad = next(iter(jobs.values())).model.backbone.tokenizer.pad_token_id or 0
    for name, job in jobs.items():
        if job.weights is not None:
            run, validate = job.run, _validate(job)
            fitting = weights.fit(job.weights, rows[name], run.training, pad=pad, seed=run.seed, validate=validate)
            with closing(fitting) as steps:
                yield from ((name, step) for step in steps)
            return
    yield from train_many([_trainee(name, job, rows[name], targets[name]) for name, job in jobs.items()], pad=pad)


def _trainee(name: str, job: PreparedRun, rows: list[EncodedExample], targets: TeacherOutputs | None) -> TrainingRun:
    run = job.run
    return TrainingRun(
        name,
        job.model,
        job.prompts,
        rows,
        run.training,
        run.seed,
        _validate(job),
        run.output_dir,
        fixed_settings(job),
        targets,
    )


def _validate(job: PreparedRun) -> Callable[[], float] | None:
    """What scores the validation rows, where the run asks for that."""
    return (lambda: _validation(job)) if job.run.training.eval_steps is not None else None


def _validation(job: PreparedRun) -> float:
    """The mean headline score over the tasks' validation rows."""
    values = []
    config = job.run.evaluation.model_copy(update={"resamples": 100})
    for i, (encoder, task) in enumerate(zip(job.encoders, job.tasks, strict=True)):
        scored = evaluate.evaluate(job.model, task.validation, prompt=job.prompt(i), encoder=encoder, config=config)
        values.append(scored.headline.value)
    return sum(values) / len(values)


def _judge_stock(jobs: Mapping[str, PreparedRun], screen: ProgressReporter) -> dict[str, list[Evaluation | None]]:
    """The stock model's scores on the test rows of each run's tasks; tasks that runs judge alike are judged once."""
    found: dict[str, Evaluation | None] = {}
    for job in jobs.values():
        for i in range(len(job.tasks)):
            key = _key(job, i) + job.run.evaluation.model_dump_json()
            if key not in found:
                found[key] = _judge("", job, i, screen, "before", stock=True)
    return {
        name: [found[_key(job, i) + job.run.evaluation.model_dump_json()] for i in range(len(job.tasks))]
        for name, job in jobs.items()
    }


def _judge(
    name: str, job: PreparedRun, index: int, screen: ProgressReporter, when: str, stock: bool = False
) -> Evaluation | None:
    """Scores on the test rows; None for the stock model where its head has not been trained either."""
    model, rows = job.model, job.tasks[index].test
    title = f"{name}: {job.tasks[index].name}" if name else job.tasks[index].name
    if not rows and not stock:
        screen.log(f"{title} has no test rows: nothing is judged")
    if not rows or (stock and model.backbone.head_names):
        return None

    def progress(done: int) -> None:
        screen.on_eval(f"{title} {when}", done, len(rows))

    encoder, run, prompt = job.encoders[index], job.run, None if stock else job.prompt(index)
    found = evaluate.evaluate(
        model, rows, prompt=prompt, encoder=encoder, config=run.evaluation, seed=run.seed, progress=progress
    )
    screen.log(f"{title}: {next(iter(found.scores))} {found.headline.value:.3f} {when} training")
    return found


def pack(job: PreparedRun, index: int, scored: Evaluation | None) -> Artifact:
    """The artifact of the run's task number `index`: what was trained, where it began, and all that belongs to it."""
    scores = {} if scored is None else {name: asdict(score) for name, score in scored.scores.items()}
    return job.model.pack(job.prompts[index], task=job.tasks[index].name, scores=scores)
