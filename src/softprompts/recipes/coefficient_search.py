"""The coefficient of a task prompt vector, chosen on validation rows (Belanec et al. 2024).

The search evaluates every coefficient of a grid on validation rows, and the chosen one once on test rows.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from softprompts.artifacts import artifact, vectors
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.fingerprint import check_fingerprint
from softprompts.artifacts.vectors import Vector
from softprompts.artifacts.vectors.expression import locate_prompt, parse_expression, read_expression
from softprompts.backbone import fingerprint
from softprompts.config import TaskConfig, parse
from softprompts.errors import ArtifactError, ConfigError
from softprompts.evaluation import page
from softprompts.evaluation.evaluate import evaluation_config
from softprompts.evaluation.metrics import plain_scores
from softprompts.injection import Site
from softprompts.model.setup import load_backbone
from softprompts.model.soft_prompt_model import backbone_config
from softprompts.recipes.evaluate_prompts import Evaluator, load_evaluator
from softprompts.recipes.run.prepare import SILENT, ProgressReporter
from softprompts.recipes.run.results import header, versions

GRID = tuple(round(0.05 * step, 2) for step in range(21))
"""The paper's coefficients: 0, 0.05, ..., 1."""


@dataclass(frozen=True)
class Choice:
    """The chosen coefficient, the validation scores of each task by coefficient, and their means."""

    best: float
    grid: tuple[float, ...]
    scores: Mapping[str, Sequence[float]]
    means: Sequence[float]


def choose_coefficient(
    evaluators: Sequence[Evaluator], total: Vector, start: Tensor, grid: Sequence[float], reporter: ProgressReporter
) -> Choice:
    """Choose the coefficient with the best mean headline score on validation rows; of equal ones the smallest.

    A mean that is not a number is below all others.

    Args:
        evaluators: The tasks whose validation rows choose.
        total: The task prompt vector.
        start: The prompt that it is added to [P, D].
        grid: The coefficients.
        reporter: Shows progress.

    Raises:
        ConfigError: A task has no validation rows, or the grid is empty.
    """
    if not grid:
        raise ConfigError("no coefficients to choose from; give at least one")
    for evaluator in evaluators:
        if not evaluator.task.validation:
            raise ConfigError(f"{evaluator.task.name} has no validation rows to choose by; set its split's fractions")
    prompts = [vectors.apply(total, start, coefficient) for coefficient in grid]
    scores = {}
    for evaluator in evaluators:
        task = evaluator.task
        scores[task.name] = evaluator.scores(prompts, task.validation, task.name, reporter.on_eval)
    means = list(map(fmean, zip(*scores.values(), strict=True)))
    numbers = [-math.inf if math.isnan(mean) else mean for mean in means]
    best = max(range(len(grid)), key=lambda index: (numbers[index], -abs(grid[index])))
    return Choice(grid[best], tuple(grid), scores, means)


def search_coefficient(
    text: str,
    out: str | Path,
    *,
    start: Artifact | None = None,
    on: Sequence[str] = (),
    grid: Sequence[float] = GRID,
    changes: Mapping[str, Any] | None = None,
    reporter: ProgressReporter = SILENT,
) -> dict[str, Any]:
    """Choose the coefficient of a sum of task prompt vectors on validation rows, and evaluate it on test rows.

    The prompt is written to `out/prompt`, and the results to results.json and report.html in `out`.

    Args:
        text: The sum, as an expression of prompts.
        out: The output directory.
        start: The artifact whose prompt the sum is added to; None: the start that all prompts of the sum share.
        on: Prompts whose tasks choose the coefficient; none: those in the sum.
        grid: The coefficients.
        changes: Keys of the section `model` that differ from the prompts' own.
        reporter: Shows progress.

    Returns:
        The content of results.json.

    Raises:
        VectorError, ArtifactError, DataError, BackboneError, ConfigError: An input is wrong. All are raised before any
            evaluation.
    """
    began = time.time()
    total = read_expression(text)
    initial = resolve_start(total, start)
    names = on or parse_expression(text)
    prompts = _prompts_of_tasks({name: artifact.load(locate_prompt(name)) for name in names})
    like = total.reference
    backbone = load_backbone(backbone_config(like, changes=changes), log=reporter.log)
    check_fingerprint(like.fingerprint, fingerprint(backbone), False)
    site = Site(like.site, like.mode, like.placement)
    evaluators = []
    for config, prompt in prompts.values():
        evaluation = evaluation_config(prompt, resamples=100)
        evaluators.append(load_evaluator(backbone, site, like.shape[0], config, evaluation))
    choice = choose_coefficient(evaluators, total, initial, grid, reporter)
    chosen = vectors.to_artifact(total, initial, choice.best)
    assert chosen.prompt is not None
    for index, (_, prompt) in enumerate(prompts.values()):
        evaluators[index] = replace(evaluators[index], config=evaluation_config(prompt))
    test_scores, warnings = _evaluate_on_test(evaluators, chosen.prompt, reporter)
    if all(map(math.isnan, choice.means)):
        warnings.append("no coefficient has a validation score that is a number, so nothing chose among them")
        reporter.log(warnings[-1])
    artifact.save(replace(chosen, scores=test_scores), Path(out) / "prompt")
    rows = {}
    for evaluator in evaluators:
        task = evaluator.task
        rows[task.name] = {"validation": len(task.validation), "test": len(task.test)}
    results = {
        **header(f"How much of {total.name} to add", ", ".join(prompts)),
        "seconds": round(time.time() - began, 1),
        "sum": total.name,
        "coefficient": choice.best,
        "validation": _validation_rows(choice),
        "test": test_scores,
        "evaluated": rows,
        "parents": list(total.parents),
        "versions": versions(),
        "warnings": warnings,
    }
    page.write_results(Path(out) / "results.json", results)
    page.write_page(Path(out) / "report.html", page_of(results))
    return results


def _validation_rows(choice: Choice) -> list[dict[str, Any]]:
    """The validation scores of each coefficient."""
    rows = []
    for index, (coefficient, mean) in enumerate(zip(choice.grid, choice.means, strict=True)):
        scores = {name: values[index] for name, values in choice.scores.items()}
        rows.append({"coefficient": coefficient, "mean": mean, "scores": scores})
    return rows


def _evaluate_on_test(
    evaluators: Sequence[Evaluator], prompt: Tensor, reporter: ProgressReporter
) -> tuple[dict[str, Any], list[str]]:
    """The scores of the prompt [P, D] on each task's test rows, and a warning for each task that has none."""
    scores_of_tasks = {}
    warnings = []
    for evaluator in evaluators:
        task = evaluator.task
        if task.test:
            scores_of_tasks[task.name] = plain_scores(evaluator.evaluate(prompt, task.test).scores)
        else:
            warnings.append(
                f"{task.name} has no test rows, so the coefficient has no score on rows that did not "
                f"choose it; set its split's test_fraction"
            )
            reporter.log(warnings[-1])
    return scores_of_tasks, warnings


def resolve_start(total: Vector, start: Artifact | None) -> Tensor:
    """The prompt [P, D] that a sum is added to: that of `start`, or the start that all prompts of the sum share.

    Raises:
        ConfigError: The prompts share no start.
        ArtifactError: The start has another backbone, length or site.
    """
    if start is not None:
        vectors.check_start(start, total, "the start")
        return start.require_prompt("the start")
    advice = "give a prompt to add it to with --start PROMPT, or the start of a prompt with --start-of PROMPT"
    return vectors.require_common_start(total, advice)


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and the plot of their page."""
    tasks = list(results["evaluated"])
    test_rows = []
    for task, scores in results["test"].items():
        test_rows += [[task, metric, score["value"], score["n"]] for metric, score in scores.items()]
    validation_rows = []
    points = []
    for row in results["validation"]:
        scores = [row["scores"][task] for task in tasks]
        validation_rows.append([f"{row['coefficient']:g}", *scores, row["mean"]])
        points.append((row["coefficient"], row["mean"]))
    test_table = {
        "title": f"Test rows, evaluated once, at coefficient {results['coefficient']:g}",
        "columns": ["task", "metric", "score", "rows"],
        "rows": test_rows,
    }
    validation_table = {
        "title": "Validation rows, by coefficient",
        "columns": ["coefficient", *tasks, "mean"],
        "rows": validation_rows,
    }
    plot = {
        "title": "Mean validation score by coefficient",
        "axis": "coefficient",
        "lines": [{"name": "mean", "points": points, "dots": True}],
    }
    content = {key: value for key, value in results.items() if key != "validation"}
    return {**content, "tables": [test_table, validation_table], "plots": [plot]}


def _prompts_of_tasks(prompts: Mapping[str, Artifact]) -> dict[str, tuple[TaskConfig, Artifact]]:
    """The tasks that prompts were trained on, by name, each once and with the first prompt that was trained on it.

    Raises:
        ArtifactError: A prompt does not name its task.
        ConfigError: Two prompts have different tasks of one name.
    """
    tasks: dict[str, tuple[TaskConfig, Artifact]] = {}
    for name, prompt in prompts.items():
        values = prompt.settings("task")
        if not values:
            raise ArtifactError(
                f"{name} does not name the rows it was trained on, so it cannot choose; name prompts that "
                f"softprompts trained with --on"
            )
        config = parse(values, TaskConfig, f"the task of {name}")
        known, _ = tasks.setdefault(config.title, (config, prompt))
        if known != config:
            raise ConfigError(
                f"two prompts of {config.title} were trained on different rows or words; choose one with --on"
            )
    return tasks
