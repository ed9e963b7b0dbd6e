"""What the study leaves to read: the table of arms and targets, curves, similarities, the rates that were chosen."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from softprompts import transfer
from softprompts.recipes.multitask.arms import ARMS, VARIANTS, WEIGHTS
from softprompts.recipes.multitask.plan import Plan
from softprompts.recipes.multitask.runs import TOGETHER, Cell, Origins, size_name
from softprompts.results import versions


@dataclass(frozen=True)
class Found:
    """A run's cell and the page of each of its tasks; none where it failed."""

    cell: Cell
    pages: Sequence[Mapping[str, Any]]

    @property
    def validation(self) -> float | None:
        """The best validation score, which is that of the weights that are kept; None for a run that failed."""
        if not self.pages:
            return None
        return max(float(point["value"]) for point in self.pages[0]["validation"])


def summarise(
    plan: Plan,
    found: Mapping[tuple[str, int | None], Sequence[Found]],
    chosen: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Any],
    origins: Origins,
    teachers: Mapping[str, Tensor],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and of the page."""
    machine: Mapping[str, Any] = next(
        (page["machine"] for own in found.values() for one in own for page in one.pages), {}
    )
    return {
        "format": 1,
        "title": f"Multitask prompt tuning with {plan.model.name}",
        "task": ", ".join(task.title for task in plan.targets),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "arms": [_table(plan, shots, found) for shots in plan.target.shots],
        "sources": _sources(sources),
        "curves": _curves(found),
        "similarity": {
            "labels": list(teachers),
            "matrix": transfer.matrix(list(teachers.values())).tolist(),
        },
        "nearest": [
            {"target": target, "size": size_name(shots), "seed": seed, "sources": dict(near)}
            for (target, shots, seed), near in origins.nearest.items()
        ],
        "rates": list(chosen),
        "config": plan.model_dump(mode="json"),
        "versions": versions(),
        "machine": machine,
        "warnings": [
            f"{target} {size_name(shots)}: {one.cell.name} failed and is left out"
            for (target, shots), own in found.items()
            for one in own
            if not one.pages
        ],
        "next": [f"softprompts inspect {path}" for path in list(origins.teachers.values())[:1]],
    }


def _table(plan: Plan, shots: int | None, found: Mapping[tuple[str, int | None], Sequence[Found]]) -> dict[str, Any]:
    """The lines of one size: of each arm the trained numbers and for each target mean and spread over the seeds."""
    targets = [task.title for task in plan.targets]
    pages: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for (_, size), own in found.items():
        for one in own if size == shots else ():
            for page in one.pages:
                pages.setdefault(one.cell.arm, {}).setdefault(page["task"], []).append(page)
    # Weights are judged on a float32 copy: the stock model's line is that of the arms that leave it as it is.
    ordered = sorted(pages, key=lambda arm: arm in WEIGHTS)
    every = [page for arm in ordered for same in pages[arm].values() for page in same]
    stock: dict[str, list[float]] = {}
    for page in every:
        if page["summary"]["before"]:
            stock.setdefault(page["task"], [page["summary"]["before"]["value"]])
    lines = [_line("no prompt", "the stock model", 0, stock, targets)]
    for arm in (arm for arm in ARMS if arm in pages):
        trained = max(page["summary"]["trainable"] for same in pages[arm].values() for page in same)
        values = {task: [page["summary"]["after"]["value"] for page in same] for task, same in pages[arm].items()}
        lines.append(_line(arm, ARMS[arm].about, trained, values, targets))
    metrics = {page["task"]: page["summary"]["metric"] for page in every}
    return {"size": size_name(shots), "targets": targets, "metrics": metrics, "lines": lines}


def _line(
    arm: str, about: str, trainable: int, values: Mapping[str, Sequence[float]], targets: Sequence[str]
) -> dict[str, Any]:
    """A line of the table: scores by target, and their mean where it has all of them."""
    scores = {target: spread(values[target]) for target in targets if target in values}
    mean = statistics.fmean(score["mean"] for score in scores.values()) if len(scores) == len(targets) else None
    return {"arm": arm, "about": about, "trainable": trainable, "scores": scores, "mean": mean}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """A cell of a table: mean, sample standard deviation and number of `values`."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def _sources(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How well each variant's prompts do on the sources themselves."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["runs"]:
        scores = found.setdefault(row["name"], {"variant": row["name"], "loss": row["loss"], "scores": {}})["scores"]
        if row["after"]:
            scores[row["task"]] = row["after"]["value"]
    return [found[name] for name in VARIANTS if name in found]


def _curves(found: Mapping[tuple[str, int | None], Sequence[Found]]) -> list[dict[str, Any]]:
    """The loss by step, mean over the seeds, of each arm on each target and size."""
    curves = []
    for (target, shots), own in found.items():
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for one in own if target != TOGETHER else ():
            if one.pages:
                lines.setdefault(one.cell.arm, []).append(one.pages[0])
        means = {
            arm: [
                (steps[0]["step"], statistics.fmean(step["loss"] for step in steps))
                for steps in zip(*(page["curve"] for page in pages), strict=False)
            ]
            for arm, pages in lines.items()
        }
        if means:
            curves.append({"target": target, "size": size_name(shots), "lines": means})
    return curves


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and pictures of their page."""
    return {**results, "tables": _tables(results), "heatmaps": _heatmaps(results), "plots": _plots(results)}


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables = []
    for one in results["arms"]:
        targets = [f"{task} ({one['metrics'].get(task, '')})" for task in one["targets"]]
        rows = [
            [
                *(line[key] for key in ("arm", "about", "trainable")),
                *map(line["scores"].get, one["targets"]),
                line["mean"],
            ]
            for line in one["lines"]
        ]
        columns = ["arm", "what it is", "trained numbers", *targets, "mean"]
        tables.append({"title": f"Targets, {one['size']}", "columns": columns, "rows": rows})
    names = list(dict.fromkeys(task for line in results["sources"] for task in line["scores"]))
    rows = [[line["variant"], line["loss"], *(line["scores"].get(n) for n in names)] for line in results["sources"]]
    tables.append(
        {"title": "Shared prompts on their sources", "columns": ["variant", "last loss", *names], "rows": rows}
    )
    rows = [[one["arm"], one["size"], f"{one['rate']:g}", _listed(one["tried"])] for one in results["rates"]]
    columns = ["arm", "size", "rate", "validation scores by rate"]
    tables.append({"title": "Rates chosen on validation rows", "columns": columns, "rows": rows})
    rows = [
        [*(str(one[key]) for key in ("target", "size", "seed")), _listed(one["sources"])] for one in results["nearest"]
    ]
    columns = ["target", "size", "seed", "source, weight"]
    tables.append({"title": "Nearest sources (SPoT)", "columns": columns, "rows": rows})
    return tables


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


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
