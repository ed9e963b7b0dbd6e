"""One run from its configuration to artefact, results.json and report page; `open_artefact` is the way back."""

import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softprompts import __version__, artefact, backbone, evaluate, inject, report
from softprompts.artefact import Artefact
from softprompts.config import ConfigError, Run
from softprompts.data import Encoded
from softprompts.evaluate import Evaluation
from softprompts.prepare import (
    SILENT,
    Job,
    Opened,
    Screen,
    judging_of,
    load_backbone,
    open_artefacts,
    prepare,
    settings_of,
)
from softprompts.results import next_commands, page_of, prompt_directory, versions
from softprompts.train import Report, check_checkpoint, fit

__all__ = [
    "Job",
    "Opened",
    "Screen",
    "execute",
    "judging_of",
    "load_backbone",
    "next_commands",
    "open_artefacts",
    "pack",
    "prepare",
    "settings_of",
    "versions",
]


def execute(run: Run, screen: Screen = SILENT) -> dict[str, Any]:
    """Do the whole of `run`: judge the stock model, train, judge again, write artefact, results and page into run.out.

    Returns what results.json holds. An interrupted run goes on from its checkpoint when called again.
    """
    out, began = Path(run.out), time.time()
    _check_writable(out)
    job = prepare(run, screen)
    rows = _encode(job, screen)
    check_checkpoint(out, rows, run.seed, _settings(run))
    before = [_judge(job, i, screen, "before", stock=True) for i in range(len(job.tasks))]
    history = _train(job, rows, out, screen)
    after = [_judge(job, i, screen, "after") for i in range(len(job.tasks))]
    made = [pack(job, i, after[i]) for i in range(len(job.tasks))]
    screen.say(f"writing {out}")
    for one in made:
        artefact.save(one, prompt_directory(out, one.task, len(made)))
    pages = [page_of(job, i, before[i], after[i], history, time.time() - began) for i in range(len(job.tasks))]
    several = {"format": 1, "tasks": pages, "next": [line for page in pages for line in page["next"]]}
    results = pages[0] if len(pages) == 1 else several
    report.write_results(out / "results.json", results)
    for page, task in zip(pages, job.tasks, strict=True):
        report.write_page(out / ("report.html" if len(pages) == 1 else f"report-{task.name}.html"), page)
    return results


def _check_writable(out: Path) -> None:
    """Raise ConfigError now rather than after the work when nothing can be written into `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"softprompts")
    except OSError as error:
        raise ConfigError(f"cannot write into {out}: {error.strerror}; choose another directory with --out") from None


def _settings(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on from its checkpoint."""
    return run.model_dump(mode="json", exclude={"out": True, "evaluate": True, "train": {"checkpoint_every"}})


def _encode(job: Job, screen: Screen) -> list[Encoded]:
    """The training rows of all tasks as tokens."""
    rows = [e.example(row) for e, task in zip(job.encoders, job.tasks, strict=True) for row in task.train]
    cut = sum(row.cut > 0 for row in rows)
    if cut:
        screen.say(f"{cut} of {len(rows)} texts were cut to fit {job.encoders[0].budget} tokens")
    return rows


def _train(job: Job, rows: list[Encoded], out: Path, screen: Screen) -> list[Report]:
    run, learner = job.run, job.learner
    history: list[Report] = []
    pad = learner.backbone.tokenizer.pad_token_id or 0
    steps = fit(
        learner,
        rows,
        run.train,
        pad=pad,
        seed=run.seed,
        validate=(lambda: _validation(job)) if run.train.evaluate_every is not None else None,
        directory=out,
        settings=_settings(run),
    )
    with closing(steps):
        for step in steps:
            history.append(step)
            screen.step(step)
    paths = Counter(step.path for step in history)
    for path, count in paths.most_common(1):
        how = "once a batch" if path == "shared" else f"in every row ({path})"
        screen.say(f"the prompt was computed {how} in {count} of {len(history)} steps")
    return history


def _validation(job: Job) -> float:
    """The mean headline score over the tasks' validation rows."""
    values = []
    config = job.run.evaluate.model_copy(update={"resamples": 100})
    for encoder, task in zip(job.encoders, job.tasks, strict=True):
        values.append(evaluate.evaluate(job.learner, encoder, task.validation, config).headline.value)
    return sum(values) / len(values)


def _judge(job: Job, index: int, screen: Screen, when: str, stock: bool = False) -> Evaluation | None:
    """Scores on the test rows; None for the stock model where its head has not been trained either."""
    learner, rows = job.learner, job.tasks[index].test
    if not rows and not stock:
        screen.say(f"{job.tasks[index].name} has no test rows: nothing is judged")
    if not rows or (stock and learner.head is not None):
        return None

    def progress(done: int) -> None:
        screen.judged(f"{job.tasks[index].name} {when}", done, len(rows))

    chosen = learner.stock() if stock else learner
    encoder, run = job.encoders[index], job.run
    found = evaluate.evaluate(chosen, encoder, rows, run.evaluate, seed=run.seed, progress=progress)
    screen.say(f"{job.tasks[index].name}: {next(iter(found.scores))} {found.headline.value:.3f} {when} training")
    return found


def pack(job: Job, index: int, scored: Evaluation | None) -> Artefact:
    """The artefact of the job's task number `index`: what was trained, where it began, and all that belongs to it."""
    learner, run, task = job.learner, job.run, job.tasks[index]
    tasks = run.tasks[index].model_dump(mode="json")
    config = {**run.model_dump(mode="json", exclude={"tasks"}), "task": tasks}
    return Artefact(
        task=task.name,
        prompt=learner.method.fold(task.name).float().cpu(),
        initial=job.start.prompt.float().cpu(),
        method=run.prompt.method,
        options=dict(run.prompt.options),
        state={k: v.detach().cpu() for k, v in learner.method.state_dict().items()},
        heads={k: v.detach().cpu() for k, v in (learner.head or {}).items()},
        site=learner.site.name,
        mode=learner.site.mode,
        place=inject.resolve_place(learner.backbone, learner.site),
        family=learner.backbone.family.name,
        head=learner.backbone.head,
        backbone=learner.backbone.name,
        revision=learner.backbone.revision,
        fingerprint=backbone.fingerprint(learner.backbone),
        format=task.format.to_json(),
        config=config,
        scores={} if scored is None else {k: asdict(v) for k, v in scored.scores.items()},
        parents=(),
        version=__version__,
    )
