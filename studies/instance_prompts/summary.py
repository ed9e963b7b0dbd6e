"""The results of the study: scores, trained numbers and step times, curves, and verdicts in words."""

import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from softprompts.evaluation.plots import LINE_COLORS
from softprompts.recipes import comparison
from softprompts.recipes.comparison import NO_PROMPT, Comparison, size_name
from softprompts.recipes.run.results import versions
from studies.instance_prompts.plan import Study

PLAIN = "prompt-tuning"
"""The arm that the others are compared with."""

ABOUT = {"fine-tuning": "all weights", "lora": "low-rank updates of the weights"}


def summarize(
    study: Study,
    arms: Comparison,
    speed: Mapping[str, Mapping[str, float]],
    pretrained: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json: scores by size, step times, results of pretraining, verdicts in words.

    Args:
        study: The study.
        arms: The runs of all arms.
        speed: The step time of each arm.
        pretrained: The results of pretraining, of each arm that has it.
        seconds: The duration of the whole study.
    """
    about = {**{name: study.known[name].about for name in study.arms}, **ABOUT}
    sizes = [comparison.scores(arms.results, shots, study.titles, about) for shots in study.compare.shots]
    pretraining = {}
    for name, page in pretrained.items():
        pretraining[name] = {key: page[key] for key in ("task", "scores", "majority")}
    return {
        "format": 1,
        "title": f"Prompts that look at the input, with {study.model.name}",
        "task": ", ".join(study.titles),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "claims": {size["size"]: verdict(size) for size in sizes},
        "arms": sizes,
        "speed": {name: dict(step_time) for name, step_time in speed.items()},
        "share": _mean_of_arms(arms, "share", study.compare.shots),
        "moved": {size_name(shots): _mean_of_arms(arms, "moved", [shots]) for shots in study.compare.shots},
        "pretrained": pretraining,
        "rates": list(arms.chosen_rates),
        "curves": comparison.curves(arms.results),
        "config": study.model_dump(mode="json"),
        "versions": versions(),
        "machine": comparison.machine(arms.results),
        "warnings": comparison.failures(arms.results),
    }


def verdict(size: Mapping[str, Any]) -> dict[str, Any]:
    """The mean difference of each arm from prompt tuning on the tasks that both have, in numbers and in words.

    Returns:
        `over`: for each arm `over`, the mean difference; `clear`, the number of tasks on which it exceeds both standard
        deviations together; and `of`, the number of tasks. `words`: the same for people.
    """
    scores_of_arms = {line["arm"]: line["scores"] for line in size["lines"]}
    plain = scores_of_arms.get(PLAIN, {})
    over: dict[str, dict[str, Any]] = {}
    for arm, scores in scores_of_arms.items():
        gaps = []
        clear = 0
        for task, score in scores.items():
            if task in plain:
                gap = score["mean"] - plain[task]["mean"]
                gaps.append(gap)
                clear += gap > (score["sd"] or 0) + (plain[task]["sd"] or 0)
        if gaps and arm not in (PLAIN, NO_PROMPT):
            over[arm] = {"over": fmean(gaps), "clear": clear, "of": len(gaps)}
    if not over:
        return {"over": {}, "words": f"{size['size']}: no arm can be compared with {PLAIN}."}
    parts = []
    for arm in sorted(over, key=lambda arm: -over[arm]["over"]):
        parts.append(f"{arm} {over[arm]['over']:+.3f} ({over[arm]['clear']} of {over[arm]['of']})")
    words = f"{size['size']}: mean difference from {PLAIN} (tasks clearly ahead): {', '.join(parts)}."
    return {"over": over, "words": words}


def _mean_of_arms(arms: Comparison, key: str, sizes: Sequence[int | None]) -> dict[str, float]:
    """A figure of the summary of each arm's runs of these sizes, the mean of those that have it.

    `share` is trained numbers over the model's. `moved` is how many of them training moved; of a table only the rows
    that were read.
    """
    values: dict[str, list[float]] = {}
    results = {where: results_of_task for where, results_of_task in arms.results.items() if where[1] in sizes}
    for arm_run, page in comparison.all_pages(results):
        if page["summary"][key] is not None:
            values.setdefault(arm_run.arm, []).append(page["summary"][key])
    return {arm: fmean(values_of_arm) for arm, values_of_arm in values.items()}


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and plots of their page."""
    tables = []
    for size in results["arms"]:
        tables.append(comparison.score_table(size, "Tasks", _extra_columns(results, size["size"])))
    tables.append(comparison.rate_table(results["rates"]))
    if results["pretrained"]:
        tables.append(_pretraining_table(results["pretrained"]))
    return {**results, "tables": tables, "plots": [_loss_plot(curve) for curve in results["curves"]]}


def _extra_columns(results: Mapping[str, Any], size: str) -> dict[str, dict[str, str]]:
    """Trained numbers and step times of each arm; columns without a cell are left out."""
    speed = results["speed"]
    columns = {
        "of the model's": {arm: f"{100 * share:.2g} %" for arm, share in results["share"].items()},
        "moved by training": {arm: f"{count:,.0f}" for arm, count in results["moved"][size].items()},
        "step, ms": {arm: f"{step_time['ms']:.0f}" for arm, step_time in speed.items()},
    }
    if PLAIN in speed:
        ratios = {arm: step_time["ms"] / speed[PLAIN]["ms"] for arm, step_time in speed.items()}
        columns["step over prompt tuning's"] = {arm: f"{ratio:.2f}" for arm, ratio in ratios.items()}
    return {name: cells for name, cells in columns.items() if cells}


def _pretraining_table(pretrained: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for arm, result in pretrained.items():
        if result["scores"]:
            headline = next(iter(result["scores"].values()))
            rows.append([arm, result["task"], headline["value"], result["majority"]])
    columns = ["arm", "taught on", "classifier's score on test rows", "most common class alone"]
    return {"title": "Pretraining", "columns": columns, "rows": rows}


def _loss_plot(curve: Mapping[str, Any]) -> dict[str, Any]:
    """The loss of the arms with a frozen backbone on a task."""
    looks = itertools.cycle(LINE_COLORS)
    lines = []
    for (arm, points), look in zip(curve["lines"].items(), looks, strict=False):
        if arm not in comparison.WEIGHTS:
            lines.append({"name": arm, "points": points, "look": look})
    return {"title": f"Loss on {curve['target']}, {curve['size']}", "lines": lines}
