"""What the study leaves to read: the table of arms and targets, curves, similarities, the rates that were chosen."""

from collections.abc import Mapping
from datetime import UTC, datetime
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
    filled: Comparison,
    sources: Mapping[str, Any],
    origins: Origins,
    teachers: Mapping[str, Tensor],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and of the page."""
    targets, about = [task.title for task in plan.targets], {name: arm.about for name, arm in ARMS.items()}
    return {
        "format": 1,
        "title": f"Multitask prompt tuning with {plan.model.name}",
        "task": ", ".join(task.title for task in plan.targets),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "arms": [comparison.scores(filled.results, shots, targets, about) for shots in plan.target.shots],
        "sources": _sources(sources),
        "curves": comparison.curves(filled.results),
        "similarity": {
            "labels": list(teachers),
            "matrix": similarity.similarity_matrix(list(teachers.values())).tolist(),
        },
        "nearest": [
            {"target": target, "size": size_name(shots), "seed": seed, "sources": dict(near)}
            for (target, shots, seed), near in origins.nearest.items()
        ],
        "rates": list(filled.chosen_rates),
        "config": plan.model_dump(mode="json"),
        "versions": versions(),
        "machine": comparison.machine(filled.results),
        "warnings": comparison.failures(filled.results),
        "next": [f"softprompts inspect {path}" for path in list(origins.teachers.values())[:1]],
    }


def _sources(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How well each variant's prompts do on the sources themselves."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["runs"]:
        scores = found.setdefault(row["name"], {"variant": row["name"], "loss": row["loss"], "scores": {}})["scores"]
        if row["after"]:
            scores[row["task"]] = row["after"]["value"]
    return [found[name] for name in VARIANTS if name in found]


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and pictures of their page."""
    return {**results, "tables": _tables(results), "heatmaps": _heatmaps(results), "plots": _plots(results)}


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables = [comparison.score_table(one, "Targets") for one in results["arms"]]
    names = list(dict.fromkeys(task for line in results["sources"] for task in line["scores"]))
    rows = [[line["variant"], line["loss"], *(line["scores"].get(n) for n in names)] for line in results["sources"]]
    tables.append(
        {"title": "Shared prompts on their sources", "columns": ["variant", "last loss", *names], "rows": rows}
    )
    tables.append(comparison.rate_table(results["rates"]))
    rows = [
        [*(str(one[key]) for key in ("target", "size", "seed")), format_scores(one["sources"])]
        for one in results["nearest"]
    ]
    columns = ["target", "size", "seed", "source, weight"]
    tables.append({"title": "Nearest sources (SPoT)", "columns": columns, "rows": rows})
    return tables


def _heatmaps(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    title = "Similarity of the sources' prompts (cosine of their mean tokens)"
    return [{"title": title, **results["similarity"]}]


def _plots(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The loss of prompt tuning and of multitask prompt tuning on each target, where both are there."""
    return [
        {
            "title": f"Loss on {one['target']}, {one['size']}",
            "lines": [
                {"name": arm, "points": one["lines"][arm], "look": look}
                for arm, look in (("mpt", "after"), ("prompt-tuning", "before"))
                if arm in one["lines"]
            ],
        }
        for one in results["curves"]
    ]
