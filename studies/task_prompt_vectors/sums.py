"""Question 2: does the sum of two vectors work on both tasks, by itself and as a start for few examples?"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from softprompts.artifacts import vectors
from softprompts.artifacts.vectors import Vector
from softprompts.recipes.coefficient_search import choose_coefficient
from softprompts.recipes.evaluate_prompts import Evaluator
from softprompts.recipes.run.run import ProgressReporter

KEPT_SHARE = 0.9
"""The claim holds where a sum keeps at least this share of the gain of the two vectors on their own tasks."""

MIN_GAIN = 0.02
"""Tasks on which training gained less are left out."""


def measure(
    evaluators: tuple[Evaluator, Evaluator],
    vector_pairs: Sequence[tuple[Vector, Vector]],
    starts: Sequence[Tensor],
    grid: Sequence[float],
    reporter: ProgressReporter,
) -> dict[str, Any]:
    """Measure the sums of two tasks' vectors on the test rows of both tasks.

    Args:
        evaluators: The two tasks.
        vector_pairs: The vectors of both tasks, one pair from each start.
        starts: The start of each pair [P, D].
        grid: The coefficients, of which validation rows choose one for each start.
        reporter: Shows progress.

    Returns:
        The coefficients, and the test scores of the sum, the task's own prompt, the other task's prompt, and the start.
    """
    names = [evaluator.task.name for evaluator in evaluators]
    scores: dict[str, dict[str, list[float]]] = {}
    for kind in ("sum", "own", "other", "start"):
        scores[kind] = {name: [] for name in names}
    coefficients = []
    for pair, start in zip(vector_pairs, starts, strict=True):
        total = pair[0] + pair[1]
        coefficient = choose_coefficient(evaluators, total, start, grid, reporter).best
        coefficients.append(coefficient)
        sum_prompt = vectors.apply(total, start, coefficient)
        task_prompts = [vectors.apply(vector, start) for vector in pair]
        for index, evaluator in enumerate(evaluators):
            prompts = [sum_prompt, task_prompts[index], task_prompts[1 - index], start]
            values = evaluator.scores(prompts, evaluator.task.test, names[index], reporter.on_eval)
            for kind, value in zip(scores, values, strict=True):
                scores[kind][names[index]].append(value)
    return {
        "tasks": names,
        "metrics": [evaluator.metric for evaluator in evaluators],
        "coefficients": coefficients,
        "scores": scores,
    }


def kept_share(pair: Mapping[str, Any], kind: str) -> float | None:
    """The share of the gain of training that a prompt of `kind` keeps, mean over both tasks; None where none gained."""
    shares = []
    for name in pair["tasks"]:
        start = fmean(pair["scores"]["start"][name])
        gain = fmean(pair["scores"]["own"][name]) - start
        if gain > MIN_GAIN:
            shares.append((fmean(pair["scores"][kind][name]) - start) / gain)
    return fmean(shares) if shares else None


def verdict(pairs: Sequence[Mapping[str, Any]], again: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The verdict on the claim that a sum works on both of its tasks: of related pairs, of others, and in words.

    Args:
        pairs: The results of `measure`, each with `related`.
        again: For each task, mean and standard deviation of the scores of few-row runs from sums, and from the start
            alone under `start`.
    """
    results: dict[str, Any] = {}
    lines = []
    for name, related in (("related", True), ("unrelated", False)):
        group = [pair for pair in pairs if pair["related"] == related]
        sum_shares = _kept_shares(group, "sum")
        other_shares = _kept_shares(group, "other")
        if not sum_shares:
            continue
        means = {"sum": fmean(sum_shares), "other": fmean(other_shares)}
        whole = sum(share >= KEPT_SHARE for share in sum_shares)
        results[name] = {"pairs": len(sum_shares), "kept": means, "whole": whole}
        lines.append(
            f"Sums of {len(sum_shares)} {name} pairs keep {means['sum']:.0%} of what the two prompts gain on their "
            f"own tasks, {whole} of them at least {KEPT_SHARE:.0%}; the other task's prompt alone keeps "
            f"{means['other']:.0%}."
        )
    as_starts = _sums_as_starts(again)
    shares = _kept_shares(pairs, "sum")
    if not shares:
        words = "Training gained nothing, so there is nothing to keep."
        return {**results, **as_starts, "holds": None, "words": words}
    whole_share = sum(share >= KEPT_SHARE for share in shares) / len(shares)
    holds = "holds" if whole_share >= 0.9 else "holds in part" if whole_share >= 0.25 else "does not hold"
    lines.append(f"That a sum serves both of its tasks {holds} on this model.")
    if as_starts:
        lines.append(as_starts["as_starts"])
    return {**results, **as_starts, "holds": holds, "words": " ".join(lines)}


def _kept_shares(pairs: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """The kept share of each pair whose training gained."""
    shares = [kept_share(pair, kind) for pair in pairs]
    return [share for share in shares if share is not None]


def _sums_as_starts(again: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """How far few-row training from a sum, which contains the task's own vector, ends from that from its start."""
    gaps = []
    clear = 0
    for scores_of_starts in again.values():
        plain = scores_of_starts.get("start")
        for name, score in scores_of_starts.items():
            if plain is not None and name != "start":
                gap = score["mean"] - plain["mean"]
                gaps.append(gap)
                clear += gap > (score["sd"] or 0) + (plain["sd"] or 0)
    if not gaps:
        return {}
    words = (
        f"Trained on with few rows, a sum (of which the task's own vector is a part) ends {fmean(gaps):+.3f} from the "
        f"start alone, further above it than both spreads in {clear} of {len(gaps)} cases."
    )
    return {"over_start": fmean(gaps), "as_starts": words}
