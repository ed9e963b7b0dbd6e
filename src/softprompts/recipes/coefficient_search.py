"""How much of a task prompt vector to add: the coefficient that validation rows choose (Belanec et al. 2024).

A grid of coefficients is judged on validation rows; test rows are judged once, with the coefficient that was chosen.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from softprompts.artifacts import artifact, vectors
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.vectors import Vector
from softprompts.backbone import fingerprint
from softprompts.config import ModelConfig, TaskConfig, parse
from softprompts.errors import ArtifactError, ConfigError
from softprompts.evaluation import page
from softprompts.evaluation.evaluate import evaluation_config
from softprompts.injection import Site
from softprompts.model.setup import load_backbone
from softprompts.model.soft_prompt_model import backbone_config
from softprompts.recipes.evaluator import Evaluator, load_evaluator
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.run import ProgressReporter, versions

GRID = tuple(round(0.05 * step, 2) for step in range(21))
"""The paper's coefficients: 0, 0.05, ..., 1."""


@dataclass(frozen=True)
class Choice:
    """The coefficient that was chosen, and by what: each task's scores by coefficient, and their means."""

    best: float
    grid: tuple[float, ...]
    scores: Mapping[str, Sequence[float]]
    means: Sequence[float]


def choose_coefficient(
    judges: Sequence[Evaluator], total: Vector, start: Tensor, grid: Sequence[float], screen: ProgressReporter
) -> Choice:
    """The coefficient with the best mean headline score over the judges' validation rows; of equal ones the smallest.

    Raises ConfigError for a judge without validation rows, and for an empty grid.
    """
    if not grid:
        raise ConfigError("there are no coefficients to choose from; give at least one")
    for one in judges:
        if not one.task.validation:
            raise ConfigError(f"{one.task.name} has no validation rows to choose by; set its split's fractions")
    prompts = [vectors.apply(total, start, coefficient) for coefficient in grid]
    scores = {one.task.name: one.scores(prompts, one.task.validation, one.task.name, screen.on_eval) for one in judges}
    means = [fmean(values) for values in zip(*scores.values(), strict=True)]
    best = max(range(len(grid)), key=lambda place: (means[place], -abs(grid[place])))
    return Choice(grid[best], tuple(grid), scores, means)


def search(
    text: str,
    out: str | Path,
    *,
    start: Artifact | None = None,
    on: Sequence[str] = (),
    grid: Sequence[float] = GRID,
    model: ModelConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    screen: ProgressReporter = SILENT,
) -> dict[str, Any]:
    """Choose the coefficient of the sum `text` on validation rows, judge the prompt it makes on test rows, write all.

    The prompt goes to `out/prompt`, what was found to results.json and report.html. start: an artifact whose prompt the
    sum is added to (None: the start that all have in common); on: names of prompts whose tasks judge (none: those in
    the sum); model: the backbone, where it is not where the prompts say; changes: keys of the section `model` that
    differ from what the prompts say. Returns what results.json holds.
    Raises VectorError, ArtifactError, DataError, BackboneError and ConfigError before anything is judged.
    """
    began = time.time()
    total = vectors.read_expression(text)
    begins = resolve_start(total, start)
    found = {name: artifact.load(vectors.locate_prompt(name)) for name in (on or vectors.parse_expression(text))}
    tasks, like = _tasks(found), total.reference
    base = load_backbone(backbone_config(like, model, changes), log=screen.log)
    artifact.check_fingerprint(like.fingerprint, fingerprint(base), False)
    site = Site(like.site, like.mode, like.placement)
    judges = [
        load_evaluator(base, site, like.shape[0], config, evaluation_config(own, resamples=100))
        for config, own in tasks.values()
    ]
    choice = choose_coefficient(judges, total, begins, grid, screen)
    made = vectors.to_artifact(total, begins, choice.best)
    assert made.prompt is not None
    exact = [replace(one, config=evaluation_config(own)) for one, (_, own) in zip(judges, tasks.values(), strict=True)]
    told, warnings = _tested(exact, made.prompt, screen)
    artifact.save(replace(made, scores=told), Path(out) / "prompt")
    results = {
        "format": 1,
        "title": f"How much of {total.name} to add",
        "task": ", ".join(tasks),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began, 1),
        "sum": total.name,
        "coefficient": choice.best,
        "validation": [
            {"coefficient": at, "mean": mean, "scores": {name: values[place] for name, values in choice.scores.items()}}
            for place, (at, mean) in enumerate(zip(choice.grid, choice.means, strict=True))
        ],
        "test": told,
        "judged": {
            one.task.name: {"validation": len(one.task.validation), "test": len(one.task.test)} for one in judges
        },
        "parents": list(total.parents),
        "versions": versions(),
        "warnings": warnings,
    }
    page.write_results(Path(out) / "results.json", results)
    page.write_page(Path(out) / "report.html", page_of(results))
    return results


def _tested(judges: Sequence[Evaluator], prompt: Tensor, screen: ProgressReporter) -> tuple[dict[str, Any], list[str]]:
    """The scores of the prompt `[P, D]` on each judge's test rows; and which have none, so that nothing is known."""
    told, warnings = {}, []
    for one in judges:
        if one.task.test:
            scores = one.evaluate(prompt, one.task.test).scores
            told[one.task.name] = {metric: asdict(score) for metric, score in scores.items()}
        else:
            warnings.append(
                f"{one.task.name} has no test rows: what the coefficient is worth on rows that did not choose it is "
                f"not known; set its split's test_fraction"
            )
            screen.log(warnings[-1])
    return told, warnings


def resolve_start(total: Vector, start: Artifact | None) -> Tensor:
    """What the sum is added to: the prompt of `start`, or the start that all its prompts have in common.

    Raises ConfigError where they have none, ArtifactError for a start of another backbone, length or site.
    """
    if start is not None:
        vectors.check_start(start, total, "the start")
        return start.require_prompt("the start")
    common = vectors.common_start(total)
    if common is None and not total.summands:
        raise ConfigError(
            "the sum is zero, so no prompt of it says where to begin; say what to add it to: --start PROMPT, or "
            "--start-of PROMPT for where the training of that prompt began"
        )
    if common is None:
        raise ConfigError(
            f"the prompts of '{total.name}' did not all begin at the same start; say what to add their sum to: --start "
            f"PROMPT, or --start-of PROMPT for where the training of that prompt began"
        )
    return common


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and the picture of their page."""
    names = list(results["judged"])
    tested = [[name, metric, one["value"], one["n"]] for name, each in results["test"].items()
              for metric, one in each.items()]  # fmt: skip
    rows = [[f"{at['coefficient']:g}", *(at["scores"][name] for name in names), at["mean"]]
            for at in results["validation"]]  # fmt: skip
    points = [(at["coefficient"], at["mean"]) for at in results["validation"]]
    return {
        **{key: value for key, value in results.items() if key != "validation"},
        "tables": [
            {"title": f"Test rows, judged once, at coefficient {results['coefficient']:g}",
             "columns": ["task", "metric", "score", "rows"], "rows": tested},
            {"title": "Validation rows, by coefficient", "columns": ["coefficient", *names, "mean"], "rows": rows},
        ],
        "plots": [{"title": "Mean validation score by coefficient", "axis": "coefficient",
                   "lines": [{"name": "mean", "points": points, "dots": True}]}],
    }  # fmt: skip


def _tasks(found: Mapping[str, Artifact]) -> dict[str, tuple[TaskConfig, Artifact]]:
    """The tasks that prompts were trained on, by name, each once, with a prompt that says how it is judged."""
    tasks: dict[str, tuple[TaskConfig, Artifact]] = {}
    for name, one in found.items():
        values = one.settings("task")
        if not values:
            raise ArtifactError(
                f"{name} does not say on which rows it was trained, so it cannot choose; name prompts that "
                f"softprompts trained with --on"
            )
        config = parse(values, TaskConfig, f"the task of {name}")
        known, _ = tasks.setdefault(config.title, (config, one))
        if known != config:
            raise ConfigError(
                f"two prompts of {config.title} were trained on different rows or words; say by which to choose: --on"
            )
    return tasks
