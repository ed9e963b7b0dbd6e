"""Pretraining of what reads a text: a method's table and encoder learn to tell topics apart (Jiang et al. 2022).

A linear classifier, which is thrown away afterwards, reads the method's `features` of a text and is trained with them
by cross-entropy. The frozen backbone gives token ids and, where asked, embeddings; it is never run on a row.
"""

import math
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.artifacts import artifact
from softprompts.artifacts.artifact import Artifact
from softprompts.config import Run, TrainConfig
from softprompts.data import EncodedExample, ExampleBatches, classes, collate, evaluation_order
from softprompts.errors import ConfigError, TrainingError
from softprompts.evaluation import evaluate, metrics
from softprompts.evaluation import page as report
from softprompts.methods import PromptMethod, find, names
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.run import (
    PreparedRun,
    ProgressReporter,
    check_writable,
    fixed_settings,
    pack,
    prepare,
    versions,
)
from softprompts.training import checkpoint
from softprompts.training.checkpoint import Progress
from softprompts.training.optimizer import build_optimizer, set_rates
from softprompts.types import Batch, in_mode

USED = (
    *("max_steps", "batch_size", "optimizer", "learning_rate", "learning_rate_unit", "learning_rates"),
    *("head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps"),
    "save_steps",
)
"""The keys of a run's section `training` that pretraining goes by; `head_learning_rate` is the classifier's."""


@dataclass(frozen=True)
class Pupil:
    """A method of a run with a classifier over its features; what is trained of both, by name, and the rows.

    Rows are texts without their answers, labeled with the numbers of their classes.
    """

    job: PreparedRun
    head: nn.Linear
    trained: dict[str, nn.Parameter]
    train: Sequence[EncodedExample]
    validation: Sequence[EncodedExample]
    test: Sequence[EncodedExample]

    def scores(self, rows: Sequence[EncodedExample]) -> Tensor:
        """The classifier's scores of texts, [B, C]."""
        scores: Tensor = self.head(_features(self.job, rows))
        return scores

    def answers(self, rows: Sequence[EncodedExample]) -> list[int]:
        """The class of each text."""
        found = [0] * len(rows)
        with torch.no_grad(), in_mode(_method(self.job), False):
            for index in evaluation_order([len(row.input_ids) for row in rows], self.job.run.training.batch_size):
                best = self.scores([rows[i] for i in index]).argmax(1).tolist()
                for i, one in zip(index, best, strict=True):
                    found[i] = one
        return found


def execute(run: Run, screen: ProgressReporter = SILENT) -> dict[str, Any]:
    """Pretrain the method of `run` on its task's classes; write what `prompt.init.state` takes to
    `run.output_dir`/prompt.

    results.json and report.html beside it tell the classifier's scores on the test rows; their content is returned. An
    interrupted run goes on from its checkpoint, bit for bit.
    Raises ConfigError for a method without anything to pretrain and for settings that mean nothing here, TrainingError
    when the loss stops being a number or a checkpoint belongs to other settings, else as `prepare`.
    """
    began, history = time.time(), []
    _check(run)
    check_writable(Path(run.output_dir))
    pupil = _pupil(prepare(run, screen))
    with closing(_fit(pupil)) as steps:
        for step in steps:
            history.append(step)
            screen.on_step("", step)
    page = _page(pupil, history, began)
    screen.log(f"writing {run.output_dir}")
    artifact.save(_packed(pupil, page["scores"]), Path(run.output_dir) / "prompt")
    report.write_results(Path(run.output_dir) / "results.json", page)
    report.write_page(Path(run.output_dir) / "report.html", page)
    return page


def _check(run: Run) -> None:
    """Raise ConfigError for what pretraining could not use."""
    if not find(run.prompt.method).pretrained:
        possible = ", ".join(name for name in names() if find(name).pretrained)
        raise ConfigError(f"method {run.prompt.method} has nothing to pretrain; possible: {possible}")
    if len(run.tasks) > 1 or run.runs:
        raise ConfigError("pretraining takes one task and no list of runs; give each a command of its own")
    if run.model.head != "lm":
        raise ConfigError(f"pretraining has a classifier of its own; leave model.head at lm, not {run.model.head}")
    for key in sorted(run.training.model_fields_set - set(USED)):
        if getattr(run.training, key) != getattr(TrainConfig(), key):
            raise ConfigError(f"training.{key} means nothing in pretraining; possible: {', '.join(USED)}")


def _pupil(job: PreparedRun) -> Pupil:
    encoder, task = job.encoders[0], job.tasks[0]
    if task.template.kind != "label":
        raise ConfigError(f"pretraining tells classes apart, and {task.name} is of kind {task.template.kind}")
    parts = _method(job).pretrained
    trained = {
        name: value for name, value in job.model.trainable(job.prompts).items() if _tensor(name).startswith(parts)
    }
    number = {label: i for i, label in enumerate(classes(task.template))}
    train, validation, test = (
        [replace(encoder.encode(row), labels=number[evaluate.reference(encoder, row)]) for row in rows]
        for rows in (task.train, task.validation, task.test)
    )
    torch.manual_seed(job.run.seed)
    with torch.no_grad():
        width = _features(job, train[:1]).shape[1]
    head = nn.Linear(width, len(number)).to(job.model.backbone.device)
    trained |= {f"heads.classifier.{name}": value for name, value in head.named_parameters()}
    return Pupil(job, head, trained, train, validation, test)


def _method(job: PreparedRun) -> PromptMethod:
    return job.model.registry.method(job.prompts[0])


def _features(job: PreparedRun, rows: Sequence[EncodedExample]) -> Tensor:
    """What the method's encoder makes of texts, [B, F]."""
    return _method(job).features(job.model.context(_batch(job, rows)))


def _tensor(name: str) -> str:
    """The tensor of `prompts.TASK.TENSOR`."""
    return name.split(".", 2)[2]


def _batch(job: PreparedRun, rows: Sequence[EncodedExample]) -> Batch:
    """Texts alone: their classes are no labels of the language model."""
    pad = job.model.backbone.tokenizer.pad_token_id or 0
    return replace(collate(rows, pad), labels=None).to(job.model.backbone.device)


def _gold(rows: Sequence[EncodedExample]) -> list[int]:
    return [row.labels for row in rows if isinstance(row.labels, int)]


def _fit(pupil: Pupil) -> Generator[Progress, None, None]:
    """Train in place, one Report a step, those of steps before a resume first; afterwards the best stand in place."""
    job, run = pupil.job, pupil.job.run
    optimizer = build_optimizer(_method(job).groups, pupil.trained, run.training, job.model.backbone.embedding_rms)
    batches = ExampleBatches(pupil.train, run.training.batch_size, run.seed)
    written = checkpoint.place(run.output_dir, pupil.train, run.seed, {**fixed_settings(job), "pretraining": True})
    assert written is not None
    state = checkpoint.capture(None, pupil.trained, optimizer)
    if written.file.exists():
        state = checkpoint.read(written)
        checkpoint.restore(state, pupil.trained, optimizer)
    yield from state.history
    try:
        while state.step < run.training.max_steps:
            state = checkpoint.capture(
                state, pupil.trained, optimizer, _step(pupil, batches.at(state.step), optimizer, state.step + 1)
            )
            if state.step % run.training.save_steps == 0:
                checkpoint.write([(written, state)])
            yield state.history[-1]
    finally:
        checkpoint.write([(written, state)])
    with torch.no_grad():
        for name, parameter in pupil.trained.items():
            parameter.copy_(state.tensors.get(f"best.{name}", parameter))


def _step(pupil: Pupil, rows: Sequence[EncodedExample], optimizer: Any, number: int) -> Progress:
    """Make step `number`, counted from 1, on `rows`, and score the validation rows where that is due."""
    config, backbone, began = pupil.job.run.training, pupil.job.model.backbone, time.perf_counter()
    with in_mode(_method(pupil.job), True):
        loss = nn.functional.cross_entropy(pupil.scores(rows), torch.tensor(_gold(rows), device=backbone.device))
    loss.backward()
    value = float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_(list(pupil.trained.values()), config.max_grad_norm or math.inf))
    if not math.isfinite(value + norm):
        raise TrainingError(
            f"the loss of step {number} is not a number; the state before it is kept in {pupil.job.run.output_dir}. "
            f"Try a lower rate (training.learning_rate was {config.learning_rate:g} {config.learning_rate_unit}) in "
            "another output directory"
        )
    rate = set_rates(optimizer, config, number - 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    score = None
    if config.eval_steps and number % config.eval_steps == 0:
        found = zip(pupil.answers(pupil.validation), _gold(pupil.validation), strict=True)
        score = fmean(float(one == other) for one, other in found)
    tokens, spent = sum(len(row.input_ids) for row in rows), time.perf_counter() - began
    machine = checkpoint.machine_line(backbone) if number == 1 else ""
    return Progress(number, config.max_steps, value, rate, None, tokens, spent, score, machine=machine)


def _packed(pupil: Pupil, scores: dict[str, Any]) -> Artifact:
    """What was trained of the method, as `prompt.init.state` takes it: it makes no prompts, and answers no task."""
    made = pack(pupil.job, 0, None)
    taught = {_tensor(name) for name in pupil.trained if name.startswith("prompts.")}
    state = {name: value for name, value in made.state.items() if name in taught}
    return replace(made, prompt=None, state=state, template=None, scores=scores)


def _page(pupil: Pupil, history: Sequence[Progress], began: float) -> dict[str, Any]:
    """What results.json and the page hold."""
    run, task = pupil.job.run, pupil.job.tasks[0]
    told = _judged(pupil)
    seconds = sum(step.seconds for step in history)
    method = {name: value for name, value in pupil.trained.items() if name in pupil.job.begin}
    return {
        "format": 1,
        "title": f"{run.prompt.method} pretrained on {task.name}",
        "task": task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": {
            "metric": next(iter(told["scores"]), None),
            "before": None,
            "after": next(iter(told["scores"].values()), None),
            "steps": len(history),
            "seconds": round(time.time() - began, 1),
            "trainable": sum(value.numel() for value in method.values()),
            "moved": sum(int((value != pupil.job.begin[name]).sum()) for name, value in method.items()),
            "tokens_per_second": sum(step.tokens for step in history) / seconds if seconds else None,
        },
        "curve": [asdict(step) for step in history],
        "validation": [{"step": step.step, "value": step.score} for step in history if step.score is not None],
        **told,
        "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        "config": run.model_dump(mode="json", exclude={"runs"}),
        "versions": versions(),
        "machine": checkpoint.machine_of(pupil.job.model.backbone),
        "warnings": list(task.notes),
        "next": [f"softprompts train --config RUN.yaml --set prompt.init.state={run.output_dir}/prompt"],
    }


def _judged(pupil: Pupil) -> dict[str, Any]:
    """The classifier's scores on the test rows, and what always answering the most common class would reach."""
    run, form = pupil.job.run, pupil.job.tasks[0].template
    if not pupil.test:
        return {"scores": {}, "majority": None}
    labels = classes(form)
    found = [labels[i] for i in pupil.answers(pupil.test)]
    gold = [labels[i] for i in _gold(pupil.test)]
    common = labels[Counter(_gold(pupil.train)).most_common(1)[0][0]]
    options: dict[str, Any] = {"resamples": run.evaluation.resamples, "seed": run.seed, "kind": "label"}
    wanted = form.metrics or metrics.default_metrics("label")
    return {
        "scores": {
            name: asdict(metrics.score(name, found, gold, positive=form.positive, **options)) for name in wanted
        },
        "majority": gold.count(common) / len(gold),
        "per_class": [asdict(one) for one in metrics.per_class(found, gold, labels)],
        "confusion": {"labels": list(labels), "matrix": metrics.confusion(found, gold, labels).tolist()},
    }
