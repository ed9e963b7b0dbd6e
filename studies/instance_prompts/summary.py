"""What the study leaves to read: scores, numbers and step times in one table, curves, and how far each arm came."""

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
"""The arm that the others are held against."""

ABOUT = {"fine-tuning": "all weights", "lora": "low-rank updates of the weights"}


def summarize(
    study: Study,
    filled: Comparison,
    speed: Mapping[str, Mapping[str, float]],
    taught: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json: scores by size, step times, what pretraining reached, verdicts in words."""
    about = {**{name: study.known[name].about for name in study.arms}, **ABOUT}
    sizes = [comparison.scores(filled.results, shots, study.titles, about) for shots in study.compare.shots]
    return {
        "format": 1,
        "title": f"Prompts that look at the input, with {study.model.name}",
        "task": ", ".join(study.titles),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "claims": {size["size"]: verdict(size) for size in sizes},
        "arms": sizes,
        "speed": {name: dict(one) for name, one in speed.items()},
        "share": _mean_of(filled, "share", study.compare.shots),
        "moved": {size_name(shots): _mean_of(filled, "moved", [shots]) for shots in study.compare.shots},
        "pretrained": {
            name: {key: page[key] for key in ("task", "scores", "majority")} for name, page in taught.items()
        },
        "rates": list(filled.chosen_rates),
        "curves": comparison.curves(filled.results),
        "config": study.model_dump(mode="json"),
        "versions": versions(),
        "machine": comparison.machine(filled.results),
        "warnings": comparison.failures(filled.results),
    }


def verdict(size: Mapping[str, Any]) -> dict[str, Any]:
    """How far each arm is from prompt tuning on the tasks that both have, and the same in words.

    over: the mean difference; clear: on how many tasks it is larger than both spreads together; of: on how many tasks.
    """
    lines = {line["arm"]: line["scores"] for line in size["lines"]}
    plain, over = lines.get(PLAIN, {}), {}
    for arm, scores in lines.items():
        both = [task for task in scores if task in plain]
        if arm in (PLAIN, NO_PROMPT) or not both:
            continue
        gaps = {task: scores[task]["mean"] - plain[task]["mean"] for task in both}
        clear = sum(gap > (scores[task]["sd"] or 0) + (plain[task]["sd"] or 0) for task, gap in gaps.items())
        over[arm] = {"over": fmean(gaps.values()), "clear": clear, "of": len(both)}
    if not over:
        return {"over": {}, "words": f"{size['size']}: nothing stands beside {PLAIN}."}
    ranked = sorted(over, key=lambda arm: -over[arm]["over"])
    told = ", ".join(f"{arm} {over[arm]['over']:+.3f} ({over[arm]['clear']} of {over[arm]['of']})" for arm in ranked)
    words = f"{size['size']}: from {PLAIN} the arms are, on average (clearly ahead on so many tasks): {told}."
    return {"over": over, "words": words}


def _mean_of(filled: Comparison, key: str, sizes: Sequence[int | None]) -> dict[str, float]:
    """A figure of each arm's runs of these sizes, the mean of those that have it.

    share: trained numbers over the model's; moved: how many of them training moved, of a table the rows that were read.
    """
    found: dict[str, list[float]] = {}
    for (_, shots), own in filled.results.items():
        for one in own if shots in sizes else ():
            for page in one.pages:
                if page["summary"][key] is not None:
                    found.setdefault(one.arm_run.arm, []).append(page["summary"][key])
    return {arm: fmean(each) for arm, each in found.items()}


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and pictures of their page."""
    plain = results["speed"].get(PLAIN)
    shares = {arm: f"{100 * value:.2g} %" for arm, value in results["share"].items()}
    times = {
        "step, ms": {arm: f"{one['ms']:.0f}" for arm, one in results["speed"].items()},
        "step over prompt tuning's": {arm: f"{one['ms'] / plain['ms']:.2f}" for arm, one in results["speed"].items()}
        if plain
        else {},
    }
    tables = []
    for one in results["arms"]:
        moved = {arm: f"{value:,.0f}" for arm, value in results["moved"][one["size"]].items()}
        more = {"of the model's": shares, "moved by training": moved, **times}
        tables.append(comparison.score_table(one, "Tasks", {k: v for k, v in more.items() if v}))
    tables.append(comparison.rate_table(results["rates"]))
    if results["pretrained"]:
        rows = [
            [arm, one["task"], *[score["value"] for score in one["scores"].values()][:1], one["majority"]]
            for arm, one in results["pretrained"].items()
            if one["scores"]
        ]
        columns = ["arm", "taught on", "classifier's score on test rows", "most common class alone"]
        tables.append({"title": "Pretraining", "columns": columns, "rows": rows})
    return {**results, "tables": tables, "plots": _plots(results["curves"])}


def _plots(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The loss of the frozen arms on each task and size."""
    return [
        {
            "title": f"Loss on {one['target']}, {one['size']}",
            "lines": [
                {"name": arm, "points": points, "look": list(LINE_COLORS)[at % len(LINE_COLORS)]}
                for at, (arm, points) in enumerate(one["lines"].items())
                if arm not in comparison.WEIGHTS
            ],
        }
        for one in curves
    ]
