"""Question 3: does a sum of vectors help a new task that has few examples?"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from softprompts.recipes.comparison import NO_PROMPT

SUM, PLAIN = "vectors", ("random", "prompt-tuning")
"""The arm in question, and the arms that take nothing from other tasks."""


def verdict(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the targets say about the claim that sums are good starts, over all targets and all sizes but 0 rows.

    over: of each arm the mean of its score minus the best plain start's; clear: in how many cases that of sums is
    larger than both spreads together; words: the same for people.
    """
    gaps: dict[str, list[float]] = {}
    clear = 0
    for table in (table for results in found.values() for table in results["arms"] if table["size"] != "0-shot"):
        lines = {line["arm"]: line for line in table["lines"] if line["mean"] is not None}
        plain = [lines[arm] for arm in PLAIN if arm in lines]
        if not plain:
            continue
        best = max(plain, key=lambda line: line["mean"])
        for arm, line in lines.items():
            gaps.setdefault(arm, []).append(line["mean"] - best["mean"])
        clear += SUM in lines and gaps[SUM][-1] > _spread(lines[SUM]) + _spread(best)
    over = {arm: fmean(values) for arm, values in gaps.items() if arm not in (NO_PROMPT, *PLAIN)}
    if SUM not in over:
        return {"over": over, "holds": None, "words": "No sum of vectors was trained on."}
    wins = sum(gap > 0 for gap in gaps[SUM])
    others = {arm: gap for arm, gap in over.items() if arm != SUM}
    count = len(gaps[SUM])
    holds = (
        "holds" if wins >= 0.8 * count and over[SUM] > 0.01 else "holds in part" if over[SUM] > 0 else "does not hold"
    )
    words = (
        f"From the sum of two vectors few-shot training ends {over[SUM]:+.3f} from the better plain start, above it in "
        f"{wins} of {count} cases (targets and sizes), by more than both spreads in {clear}."
    )
    if others:
        best = max(others, key=others.__getitem__)
        words += f" The best other start, {best}, ends {others[best]:+.3f} from it."
    words += f" That sums are good starts {holds} on this model."
    return {"over": over, "clear": clear, "holds": holds, "words": words}


def _spread(line: Mapping[str, Any]) -> float:
    """The standard deviation over the seeds of a line of one target."""
    return float(sum(score["sd"] or 0 for score in line["scores"].values()))
