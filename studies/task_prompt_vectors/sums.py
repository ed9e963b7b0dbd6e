"""Question 2: does the sum of two vectors serve both tasks, as it is and as a start for few examples?"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from softprompts.artifacts import vectors
from softprompts.artifacts.vectors import Vector
from softprompts.recipes.coefficient_search import choose_coefficient
from softprompts.recipes.evaluator import Evaluator
from softprompts.recipes.run.run import ProgressReporter

KEPT = 0.9
"""The claim holds where a sum keeps at least this part of what the two vectors gain on their own tasks."""


def measure(
    judges: tuple[Evaluator, Evaluator],
    found: Sequence[tuple[Vector, Vector]],
    starts: Sequence[Tensor],
    grid: Sequence[float],
    screen: ProgressReporter,
) -> dict[str, Any]:
    """Test scores of the sum of two tasks' vectors, from each of `starts`, with the coefficient that validation chose.

    Beside them, on both tasks: the start, the prompt of the task itself, and the prompt of the other task.
    """
    names = [judge.task.name for judge in judges]
    scores: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in names} for kind in ("sum", "own", "other", "start")
    }
    coefficients = []
    for pair, start in zip(found, starts, strict=True):
        total = pair[0] + pair[1]
        coefficients.append(choose_coefficient(judges, total, start, grid, screen).best)
        added = vectors.apply(total, start, coefficients[-1])
        own = [vectors.apply(one, start) for one in pair]
        for at, judge in enumerate(judges):
            judged = judge.scores([added, own[at], own[1 - at], start], judge.task.test, names[at], screen.on_eval)
            for kind, value in zip(scores, judged, strict=True):
                scores[kind][names[at]].append(value)
    return {
        "tasks": names,
        "metrics": [judge.metric for judge in judges],
        "coefficients": coefficients,
        "scores": scores,
    }


def kept_share(measured: Mapping[str, Any], kind: str) -> float | None:
    """The part of what both tasks gained that a prompt of `kind` keeps, mean over both; None where neither gained."""
    parts = []
    for name in measured["tasks"]:
        own, start, value = (fmean(measured["scores"][key][name]) for key in ("own", "start", kind))
        if own - start > 0.02:
            parts.append((value - start) / (own - start))
    return fmean(parts) if parts else None


def verdict(
    measured: Sequence[Mapping[str, Any]], again: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """What the pairs say about the claim that sums serve both tasks: of related pairs, of others, and in words.

    again: of each task the spread of the scores of runs that began at a sum, or at the start alone, which is `start`.
    """
    found: dict[str, Any] = {}
    lines = []
    for name, related in (("related", True), ("unrelated", False)):
        pairs = [one for one in measured if one["related"] == related]
        values = {
            kind: [x for x in (kept_share(one, kind) for one in pairs) if x is not None] for kind in ("sum", "other")
        }
        if not values["sum"]:
            continue
        mean = {kind: fmean(each) for kind, each in values.items()}
        whole = sum(value >= KEPT for value in values["sum"])
        found[name] = {"pairs": len(values["sum"]), "kept": mean, "whole": whole}
        lines.append(
            f"Sums of {len(values['sum'])} {name} pairs keep {mean['sum']:.0%} of what the two prompts gain on their "
            f"own tasks, {whole} of them at least {KEPT:.0%}; the other task's prompt alone keeps {mean['other']:.0%}."
        )
    kept_all = [value for one in measured if (value := kept_share(one, "sum")) is not None]
    if not kept_all:
        words = "Training gained nothing, so there is nothing to keep."
        return {**found, **_as_starts(again), "holds": None, "words": words}
    share = sum(value >= KEPT for value in kept_all) / len(kept_all)
    holds = "holds" if share >= 0.9 else "holds in part" if share >= 0.25 else "does not hold"
    trained = _as_starts(again)
    lines += [f"That a sum serves both of its tasks {holds} on this model.", *filter(None, [trained.get("as_starts")])]
    return {**found, **trained, "holds": holds, "words": " ".join(lines)}


def _as_starts(again: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """How far training with few rows ends from a sum, of which the task's own vector is a part, and from its start."""
    gaps, clear = [], 0
    for spreads in again.values():
        plain = spreads.get("start")
        for name, one in spreads.items():
            if plain is not None and name != "start":
                gaps.append(one["mean"] - plain["mean"])
                clear += gaps[-1] > (one["sd"] or 0) + (plain["sd"] or 0)
    if not gaps:
        return {}
    words = (
        f"Trained on with few rows, a sum (of which the task's own vector is a part) ends {fmean(gaps):+.3f} from the "
        f"start alone, further above it than both spreads in {clear} of {len(gaps)} cases."
    )
    return {"over_start": fmean(gaps), "as_starts": words}
