"""Pretraining of a method's encoder: its table and encoder learn to tell topics apart (Jiang et al. 2022).

A linear classifier on the method's `features` of a text is trained with them by cross-entropy, and thrown away. The
frozen backbone gives token ids and, where asked, embeddings; no row goes through it.
"""

import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from softprompts.artifacts import artifact
from softprompts.artifacts.artifact import Artifact
from softprompts.config import Run, TrainConfig
from softprompts.data import ExampleTokenizer, Row, classes
from softprompts.data.encoding import EncodedExample
from softprompts.errors import ConfigError
from softprompts.evaluation import evaluate, metrics, page
from softprompts.methods.registry import find, names
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.results import header, tokens_per_second, validation_curve
from softprompts.recipes.run.run import (
    PreparedRun,
    ProgressReporter,
    check_writable,
    fixed_settings,
    pack,
    prepare,
    versions,
)
from softprompts.training.checkpoint import machine_of
from softprompts.training.loop import TrainingRun, train_run
from softprompts.training.trainables import TrainableClassifier
from softprompts.types import Progress

USED = (
    *("max_steps", "batch_size", "optimizer", "learning_rate", "learning_rate_unit", "learning_rates"),
    *("head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps"),
    "save_steps",
)
"""The keys of `training` that pretraining uses; `head_learning_rate` is the classifier's."""


def pretrain(run: Run, reporter: ProgressReporter = SILENT) -> dict[str, Any]:
    """Pretrain a run's method on the classes of its task; write what `prompt.init.state` takes to `output_dir/prompt`.

    results.json and report.html beside it have the classifier's scores on the test rows. An interrupted run continues
    from its checkpoint, bit for bit.

    Args:
        run: The configuration, with one task of classes.
        reporter: Shows a person how far the run is.

    Returns:
        The content of results.json.

    Raises:
        ConfigError: The method has nothing to pretrain, or a setting has no meaning here.
        TrainingError: The loss was not finite, or a checkpoint belongs to a run with other settings.
    """
    started = time.time()
    _check(run)
    check_writable(Path(run.output_dir))
    prepared = prepare(run, reporter)
    examples = _class_examples(prepared)
    count = len(classes(prepared.tasks[0].template))
    classifier = TrainableClassifier(
        prepared.model, prepared.prompts[0], count, example=examples["train"][0], seed=run.seed
    )
    settings = {**fixed_settings(prepared), "pretraining": True}
    validate = functools.partial(_accuracy, classifier, examples["validation"], run.training.batch_size)
    training_run = TrainingRun("", examples["train"], run.training, run.seed, validate, run.output_dir, settings)
    history = []
    with closing(train_run(classifier, training_run)) as steps:
        for progress in steps:
            history.append(progress)
            reporter.on_step("", progress)
    content = _page(prepared, classifier, examples, history, time.time() - started)
    reporter.log(f"writing {run.output_dir}")
    artifact.save(_pack(prepared, classifier, content["scores"]), Path(run.output_dir) / "prompt")
    page.write_results(Path(run.output_dir) / "results.json", content)
    page.write_page(Path(run.output_dir) / "report.html", content)
    return content


def _check(run: Run) -> None:
    """Raise ConfigError for settings that pretraining cannot use."""
    if not find(run.prompt.method).pretrained:
        possible = ", ".join(name for name in names() if find(name).pretrained)
        raise ConfigError(f"method {run.prompt.method} has nothing to pretrain; possible: {possible}")
    if len(run.tasks) > 1 or run.runs:
        raise ConfigError("pretraining takes one task and no list of runs; start each with a separate command")
    if run.model.head != "lm":
        raise ConfigError(f"pretraining adds its own classifier; leave model.head at lm, not {run.model.head}")
    for key in sorted(run.training.model_fields_set - set(USED)):
        if getattr(run.training, key) != getattr(TrainConfig(), key):
            raise ConfigError(f"training.{key} means nothing in pretraining; possible: {', '.join(USED)}")


def _class_examples(prepared: PreparedRun) -> dict[str, list[EncodedExample]]:
    """The texts of each split without their answers, labeled with the numbers of their classes."""
    encoder, task = prepared.encoders[0], prepared.tasks[0]
    if task.template.kind != "label":
        raise ConfigError(f"pretraining tells classes apart, and {task.name} is of kind {task.template.kind}")
    labels = classes(task.template)
    numbers = dict(zip(labels, range(len(labels)), strict=True))
    examples = {}
    for split, rows in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        examples[split] = [_class_example(encoder, row, numbers) for row in rows]
    return examples


def _class_example(encoder: ExampleTokenizer, row: Row, numbers: Mapping[str, int]) -> EncodedExample:
    return replace(encoder.encode(row), labels=numbers[evaluate.reference(encoder, row)])


def _class_numbers(examples: Sequence[EncodedExample]) -> list[int]:
    return [example.labels for example in examples if isinstance(example.labels, int)]


def _accuracy(classifier: TrainableClassifier, examples: Sequence[EncodedExample], batch_size: int) -> float:
    """The share of texts whose class the classifier finds."""
    predictions = classifier.predict(examples, batch_size)
    pairs = zip(predictions, _class_numbers(examples), strict=True)
    return fmean(float(prediction == reference) for prediction, reference in pairs)


def _pack(prepared: PreparedRun, classifier: TrainableClassifier, scores: dict[str, Any]) -> Artifact:
    """The pretrained tensors as `prompt.init.state` takes them: they make no prompts, and answer no task."""
    whole = pack(prepared, 0, None)
    pretrained = classifier.method_parameters()
    state = {name: value for name, value in whole.state.items() if name in pretrained}
    return replace(whole, prompt=None, state=state, template=None, scores=scores)


def _page(
    prepared: PreparedRun,
    classifier: TrainableClassifier,
    examples: Mapping[str, Sequence[EncodedExample]],
    history: Sequence[Progress],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and of the page."""
    run, task = prepared.run, prepared.tasks[0]
    evaluation = _evaluate(prepared, classifier, examples)
    parameters = classifier.method_parameters()
    moved = 0
    for name, initial in prepared.initial_parameters.items():
        tensor = name.split(".", 2)[2]
        if name.startswith("prompts.") and tensor in parameters:
            moved += int((parameters[tensor] != initial).sum())
    return {
        **header(f"{run.prompt.method} pretrained on {task.name}", task.name),
        "summary": {
            "metric": next(iter(evaluation["scores"]), None),
            "before": None,
            "after": next(iter(evaluation["scores"].values()), None),
            "steps": len(history),
            "seconds": round(seconds, 1),
            "trainable": sum(map(torch.numel, parameters.values())),
            "moved": moved,
            "tokens_per_second": tokens_per_second(history),
        },
        "curve": list(map(asdict, history)),
        "validation": validation_curve(history),
        **evaluation,
        "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        "config": run.model_dump(mode="json", exclude={"runs"}),
        "versions": versions(),
        "machine": machine_of(prepared.model.backbone),
        "warnings": list(task.notes),
        "next": [f"softprompts train --config RUN.yaml --set prompt.init.state={run.output_dir}/prompt"],
    }


def _evaluate(
    prepared: PreparedRun, classifier: TrainableClassifier, examples: Mapping[str, Sequence[EncodedExample]]
) -> dict[str, Any]:
    """The classifier's scores on the test rows, and the score of the most common class of the training rows."""
    run, template = prepared.run, prepared.tasks[0].template
    if not examples["test"]:
        return {"scores": {}, "majority": None}
    labels = classes(template)
    predictions = [labels[number] for number in classifier.predict(examples["test"], run.training.batch_size)]
    references = [labels[number] for number in _class_numbers(examples["test"])]
    ((most_common, _),) = Counter(_class_numbers(examples["train"])).most_common(1)
    options: dict[str, Any] = {"resamples": run.evaluation.resamples, "seed": run.seed, "kind": "label"}
    scores = {}
    for name in template.metrics or metrics.default_metrics("label"):
        scores[name] = metrics.score(name, predictions, references, positive=template.positive, **options)
    return {
        "scores": metrics.plain_scores(scores),
        "majority": references.count(labels[most_common]) / len(references),
        **metrics.class_tables(predictions, references, labels),
    }
