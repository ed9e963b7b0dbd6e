"""The results of the recipe: scores of arms on targets, curves, similarities, and the chosen rates."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from torch import Tensor

from softprompts.artifacts.vectors import similarity
from softprompts.recipes import comparison
from softprompts.recipes.comparison import Comparison, format_scores, size_name
from softprompts.recipes.multitask.arms import ARMS, VARIANTS
from softprompts.recipes.multitask.plan import Plan
from softprompts.recipes.multitask.runs import Origins
from softprompts.recipes.run.results import versions


def summarize(
    plan: Plan,
    targets: Comparison,
    sources: Mapping[str, Any],
    origins: Origins,
    teachers: Mapping[str, Tensor],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and of the page.

    Args:
        plan: The plan.
        targets: The runs of all arms on the targets.
        sources: The results of the shared prompts.
        origins: The prompts that targets start from.
        teachers: The prompt of each source [P, D].
        seconds: The duration of the whole recipe.
    """
    titles = [task.title for task in plan.targets]
    about = {name: arm.about for name, arm in ARMS.items()}
    nearest = []
    for (target, shots, seed), weights in origins.nearest.items():
        nearest.append({"target": target, "size": size_name(shots), "seed": seed, "sources": dict(weights)})
    matrix = similarity.similarity_matrix(list(teachers.values())).tolist()
    return {
        "format": 1,
        "title": f"Multitask prompt tuning with {plan.model.name}",
        "task": ", ".join(titles),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "arms": [comparison.scores(targets.results, shots, titles, about) for shots in plan.target.shots],
        "sources": _source_scores(sources),
        "curves": comparison.curves(targets.results),
        "similarity": {"labels": list(teachers), "matrix": matrix},
        "nearest": nearest,
        "rates": list(targets.chosen_rates),
        "config": plan.model_dump(mode="json"),
        "versions": versions(),
        "machine": comparison.machine(targets.results),
        "warnings": comparison.failures(targets.results),
        "next": [f"softprompts inspect {path}" for path in list(origins.teachers.values())[:1]],
    }


def _source_scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores of each variant's prompts on the sources."""
    variants: dict[str, dict[str, Any]] = {}
    for row in results["runs"]:
        variant = variants.setdefault(row["name"], {"variant": row["name"], "loss": row["loss"], "scores": {}})
        if row["after"]:
            variant["scores"][row["task"]] = row["after"]["value"]
    return [variants[name] for name in VARIANTS if name in variants]


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and plots of their page."""
    tables = [comparison.score_table(size, "Targets") for size in results["arms"]]
    tables += [_source_table(results["sources"]), comparison.rate_table(results["rates"])]
    tables.append(_nearest_table(results["nearest"]))
    heatmap = {"title": "Similarity of the sources' prompts (cosine of their mean tokens)", **results["similarity"]}
    plots = [_loss_plot(curve) for curve in results["curves"]]
    return {**results, "tables": tables, "heatmaps": [heatmap], "plots": plots}


def _source_table(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(chain.from_iterable(source["scores"] for source in sources)))
    rows = []
    for source in sources:
        rows.append([source["variant"], source["loss"], *map(source["scores"].get, tasks)])
    columns = ["variant", "last loss", *tasks]
    return {"title": "Shared prompts on their sources", "columns": columns, "rows": rows}


def _nearest_table(nearest: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for line in nearest:
        rows.append([line["target"], line["size"], str(line["seed"]), format_scores(line["sources"])])
    columns = ["target", "size", "seed", "source, weight"]
    return {"title": "Nearest sources (SPoT)", "columns": columns, "rows": rows}


def _loss_plot(curve: Mapping[str, Any]) -> dict[str, Any]:
    """The loss of prompt tuning and of multitask prompt tuning on a target."""
    lines = []
    for arm, look in (("mpt", "after"), ("prompt-tuning", "before")):
        if arm in curve["lines"]:
            lines.append({"name": arm, "points": curve["lines"][arm], "look": look})
    return {"title": f"Loss on {curve['target']}, {curve['size']}", "lines": lines}
