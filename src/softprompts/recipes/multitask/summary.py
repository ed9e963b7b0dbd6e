"""What the study leaves to read: the table of arms and targets, curves, similarities, the rates that were chosen."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from softprompts.recipes.multitask.arms import ARMS, VARIANTS
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
        """The last validation score; None for a run that failed."""
        if not self.pages:
            return None
        value: float = self.pages[0]["validation"][-1]["value"]
        return value


def summarise(
    plan: Plan,
    found: Mapping[tuple[str, int | None], Sequence[Found]],
    chosen: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Any],
    origins: Origins,
    similarity: tuple[Sequence[str], Sequence[Sequence[float]]],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and of the page."""
    names, matrix = similarity
    machine = next((page["machine"] for own in found.values() for one in own for page in one.pages), {})
    return {
        "format": 1,
        "title": f"Multitask prompt tuning with {plan.model.name}",
        "task": ", ".join(task.title for task in plan.targets),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "arms": [_table(plan, shots, found) for shots in plan.target.shots],
        "sources": _sources(plan, sources),
        "curves": _curves(plan, found),
        "similarity": {"labels": list(names), "matrix": [list(row) for row in matrix]},
        "nearest": [
            {"target": target, "size": size_name(shots), "sources": dict(near)}
            for (target, shots), near in origins.nearest.items()
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
        "next": _next(plan, origins),
    }


def _table(plan: Plan, shots: int | None, found: Mapping[tuple[str, int | None], Sequence[Found]]) -> dict[str, Any]:
    """The lines of one size: of each arm the trained numbers and for each target mean and spread over the seeds."""
    targets = [task.title for task in plan.targets]
    pages: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for (_, size), own in found.items():
        for one in own if size == shots else ():
            for page in one.pages:
                pages.setdefault(one.cell.arm, {}).setdefault(page["task"], []).append(page)
    stock = {
        page["task"]: page
        for own in pages.values()
        for each in own.values()
        for page in each
        if page["summary"]["before"]
    }
    lines = [
        {
            "arm": "no prompt",
            "about": "the stock model",
            "trainable": 0,
            "scores": {t: _spread([stock[t]["summary"]["before"]["value"]]) for t in targets if t in stock},
        }
    ]
    for arm in (arm for arm in ARMS if arm in pages):
        own = pages[arm]
        lines.append(
            {
                "arm": arm,
                "about": ARMS[arm].about,
                "trainable": max(page["summary"]["trainable"] for each in own.values() for page in each),
                "scores": {t: _spread([p["summary"]["after"]["value"] for p in own[t]]) for t in targets if t in own},
            }
        )
    metrics = {t: own[t][0]["summary"]["metric"] for own in pages.values() for t in targets if t in own}
    for line in lines:
        scores = line["scores"]
        line["mean"] = statistics.fmean(s["mean"] for s in scores.values()) if set(scores) == set(targets) else None
    return {"size": size_name(shots), "targets": targets, "metrics": metrics, "lines": lines}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def _sources(plan: Plan, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How well each variant's prompts do on the sources themselves."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["runs"]:
        scores = found.setdefault(row["name"], {"variant": row["name"], "loss": row["loss"], "scores": {}})["scores"]
        if row["after"]:
            scores[row["task"]] = row["after"]["value"]
    return [found[name] for name in VARIANTS if name in found]


def _curves(plan: Plan, found: Mapping[tuple[str, int | None], Sequence[Found]]) -> list[dict[str, Any]]:
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


def _next(plan: Plan, origins: Origins) -> list[str]:
    """Commands that show what there is."""
    paths = list(origins.teachers.values())[:1]
    return [f"softprompts inspect {path}" for path in paths]
