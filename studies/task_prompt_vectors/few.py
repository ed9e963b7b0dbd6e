"""Question 3: does a sum of vectors help a new task that has few examples?"""

from collections.abc import Mapping
from itertools import chain
from statistics import fmean
from typing import Any

from softprompts.recipes.comparison import NO_PROMPT

SUM = "vectors"
"""The arm in question: training from a sum of vectors."""

PLAIN = ("random", "prompt-tuning")
"""The arms that take nothing from other tasks."""


def verdict(targets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict on the claim that sums are good starts, over all targets and all sizes but 0 rows.

    Args:
        targets: The results of the recipe of multitask prompt tuning, by target.

    Returns:
        `over`: the mean difference of each arm from the best plain start. `clear`: in how many cases that of sums
        exceeds both standard deviations together. `holds` and `words`: the verdict for people.
    """
    gaps: dict[str, list[float]] = {}
    clear = 0
    for table in chain.from_iterable(results["arms"] for results in targets.values()):
        lines = {line["arm"]: line for line in table["lines"] if line["mean"] is not None}
        plain = [lines[arm] for arm in PLAIN if arm in lines]
        if not plain or table["size"] == "0-shot":
            continue
        best = max(plain, key=lambda line: line["mean"])
        for arm, line in lines.items():
            gaps.setdefault(arm, []).append(line["mean"] - best["mean"])
        clear += SUM in lines and gaps[SUM][-1] > _deviation(lines[SUM]) + _deviation(best)
    over = {arm: fmean(values) for arm, values in gaps.items() if arm not in (NO_PROMPT, *PLAIN)}
    if SUM not in over:
        return {"over": over, "holds": None, "words": "No training started from a sum of vectors."}
    wins = sum(gap > 0 for gap in gaps[SUM])
    count = len(gaps[SUM])
    if wins >= 0.8 * count and over[SUM] > 0.01:
        holds = "holds"
    else:
        holds = "holds in part" if over[SUM] > 0 else "does not hold"
    words = (
        f"From the sum of two vectors few-shot training ends {over[SUM]:+.3f} from the better plain start, above it in "
        f"{wins} of {count} cases (targets and sizes), by more than both spreads in {clear}."
    )
    others = {arm: gap for arm, gap in over.items() if arm != SUM}
    if others:
        best_other = max(others, key=others.__getitem__)
        words += f" The best other start, {best_other}, ends {others[best_other]:+.3f} from it."
    words += f" That sums are good starts {holds} on this model."
    return {"over": over, "clear": clear, "holds": holds, "words": words}


def _deviation(line: Mapping[str, Any]) -> float:
    """The standard deviation over the seeds of a line of one target."""
    return float(sum(score["sd"] or 0 for score in line["scores"].values()))
