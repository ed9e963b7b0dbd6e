"""The evaluation of trained prompts on labeled rows: those of their own task, or those of another data set.

`evaluate_prompts` opens stored prompts. An `Evaluator` compares many prompts [P, D] on the rows of one task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.config import EvaluationConfig, PromptConfig, SplitConfig, TaskConfig, parse
from softprompts.data import ExampleTokenizer, Row, Task, load_task, resolve_placement
from softprompts.errors import BackboneError, ConfigError
from softprompts.evaluation import metrics
from softprompts.evaluation.evaluate import Evaluation, evaluate, evaluation_config
from softprompts.injection import Site
from softprompts.model import SoftPromptModel
from softprompts.model.registry import PromptRecord
from softprompts.model.setup import example_tokenizer
from softprompts.model.soft_prompt_model import open_prompts
from softprompts.recipes.run.prepare import SILENT, ProgressReporter
from softprompts.types import PromptInit

OnEval = Callable[[str, int, int], None]
"""Called with a title, the number of prompts that are evaluated, and the number of all."""


def evaluate_prompts(
    paths: Sequence[str | Path],
    *,
    data: str | None = None,
    split: str | None = None,
    label: str | None = None,
    mapping: Mapping[str, str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    allow_other_weights: bool = False,
    reporter: ProgressReporter = SILENT,
) -> dict[str, Any]:
    """Evaluate a trained prompt on rows with labels; several prompts vote.

    Args:
        paths: The directories of the prompts.
        data: Another data set than the prompt's own: a packaged set, a file, a directory or a name on the hub.
        split: `train`, `validation` or `test`; None: the test rows, and all rows of other data without a test split.
        label: The label column of `data`; None: that of the prompt's task.
        mapping: What the task's labels are called in `data`.
        evaluation: Keys of the section `evaluation` that differ from the run that made the prompt; None values do not.
        model: Keys of the section `model` that differ from that run.
        allow_other_weights: Whether prompts that were made for other weights only cost a warning.
        reporter: Shows progress.

    Returns:
        `task` and `split`, the names of the rows, and `scores`, each score by its metric.

    Raises:
        ArtifactError, BackboneError, AssetError, DataError: The prompts, their model or the rows cannot be opened.
        ConfigError: The prompt holds no task, the rows are not known, or there is no such split.
    """
    opened, warnings = open_prompts(paths, changes=model, allow_other_weights=allow_other_weights, log=reporter.log)
    for warning in warnings:
        reporter.log(f"warning: {warning}")
    record = opened.registry.records[opened.tasks[0]]
    artifact = record.artifact
    if artifact is None or record.task_template is None:
        raise ConfigError(f"{paths[0]} holds no task (template and label words), so its answers cannot be scored")
    task = load_test_rows(record, paths[0], data=data, label=label, whole=split is None, renamed=mapping is not None)
    split, rows = choose_rows(task, split)
    total = len(rows)
    result = evaluate(
        opened,
        rows,
        prompt=opened.tasks,
        config=evaluation_config(artifact, **(evaluation or {})),
        mapping=mapping,
        progress=lambda done: reporter.on_eval(task.name, done, total),
    )
    return {"task": task.name, "split": split, "scores": {name: vars(score) for name, score in result.scores.items()}}


def load_test_rows(
    record: PromptRecord, path: str | Path, *, data: str | None, label: str | None, whole: bool, renamed: bool
) -> Task:
    """The task that a prompt is evaluated on.

    Args:
        record: The prompt.
        path: The prompt's directory, for messages.
        data: Another data set, read with the template of the prompt's task; None: the rows of its own task.
        label: The label column of `data`; None: that of the task.
        whole: Whether nothing of `data` is held back: these are not the rows that were trained on.
        renamed: Whether the labels in `data` have other names, so that the task's verbalizer does not apply to them.
    """
    template = record.task_template
    assert record.artifact is not None
    assert template is not None
    stored = record.artifact.settings("task")
    if data is None:
        if not stored:
            raise ConfigError(f"{path} does not name the data it was trained on; give --data")
        return load_task(parse(stored, TaskConfig, str(path)))
    config = TaskConfig(
        source=data,
        kind=template.kind,
        template=template.template,
        pair=template.pair,
        label=label or template.label,
        verbalizer=None if renamed else template.verbalizer,
        split=SplitConfig(validation_fraction=0, test_fraction=0) if whole else SplitConfig(),
    )
    return load_task(config)


def choose_rows(task: Task, split: str | None) -> tuple[str, Sequence[Row]]:
    """The rows of a split, with its name; None: the test rows, or all rows where nothing is for the test.

    Raises:
        ConfigError: There are no such rows.
    """
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    rows = splits.get(split, ()) if split is not None else task.test or task.train
    if not rows:
        possible = ", ".join(name for name, part in splits.items() if part)
        raise ConfigError(f"{task.name} has no rows in split '{split or 'test'}'; possible: {possible}")
    return split or ("test" if task.test else "all"), rows


@dataclass(frozen=True)
class Evaluator:
    """A task and the frozen backbone that answers its rows, with prompts of `length` tokens at `site`."""

    backbone: Backbone
    site: Site
    length: int
    task: Task
    encoder: ExampleTokenizer
    config: EvaluationConfig

    def evaluate(self, prompt: Tensor | None, rows: Sequence[Row]) -> Evaluation:
        """Answer `rows` behind a prompt and score the answers.

        Args:
            prompt: The prompt [P, D]; None: the stock model answers.
            rows: Rows of the task.
        """
        model = SoftPromptModel(self.backbone)
        name = None
        if prompt is not None:
            name = self.task.name
            site = {"site": self.site.name, "mode": self.site.mode, "placement": self.site.placement}
            config = PromptConfig.model_validate({"num_virtual_tokens": self.length, **site})
            model.add_prompt(name, config, init=PromptInit(prompt))
        return evaluate(model, rows, prompt=name, encoder=self.encoder, config=self.config)

    def scores(self, prompts: Sequence[Tensor], rows: Sequence[Row], title: str, on_eval: OnEval) -> list[float]:
        """The headline score of each of `prompts` [P, D] on `rows`."""
        scores: list[float] = []
        for prompt in prompts:
            scores.append(self.evaluate(prompt, rows).headline.value)
            on_eval(f"{title}, prompts", len(scores), len(prompts))
        return scores

    @property
    def metric(self) -> str:
        """The name of the headline score."""
        names = self.task.template.metrics or metrics.default_metrics(self.task.template.kind)
        return names[0]


def load_evaluator(
    backbone: Backbone, site: Site, length: int, config: TaskConfig, evaluation: EvaluationConfig
) -> Evaluator:
    """Load the rows of a task and prepare their evaluation.

    Args:
        backbone: The frozen language model.
        site: Where prompts enter.
        length: The number of prompt tokens.
        config: The task.
        evaluation: How rows are answered and answers scored.

    Raises:
        DataError: The rows cannot be read.
        BackboneError: The backbone has a classification head.
    """
    if backbone.head != "lm":
        raise BackboneError(
            f"prompts are evaluated by the words of a language model, and this model has head '{backbone.head}'"
        )
    task = load_task(config)
    site = replace(site, placement=resolve_placement(site.placement, [task.template]))
    encoder = example_tokenizer(backbone, task.template, length, place=site.placement)
    return Evaluator(backbone, site, length, task, encoder, evaluation)
