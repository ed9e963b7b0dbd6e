"""Question 1: does a vector do on another start what it did on its own? With the controls that the paper lacks."""

from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from softprompts.artifacts import vectors
from softprompts.artifacts.vectors import Vector
from softprompts.recipes.evaluator import Evaluator
from softprompts.recipes.run.run import ProgressReporter

CONDITIONS = {
    "own": "each vector on the start it was trained from",
    "cross": "each vector on every other start",
    "start": "the starts alone",
    "shuffled": "on every other start, the vector with its numbers shuffled",
    "random": "on every other start, a random direction as long as the vector",
    "alone": "the vectors alone, on zero",
}

CONTROLS = ("start", "shuffled", "random", "alone")
"""What `cross` must beat before a vector can be called independent of its start."""

KEPT, BEATEN = 0.9, 0.5
"""The claim holds where `cross` keeps at least this part of what training gained, and no control more than that.

Where the vectors alone keep more than that too, a start hardly matters, and nothing can be told of the claim.
"""


def measure(
    judge: Evaluator, found: Sequence[Vector], starts: Sequence[Tensor], screen: ProgressReporter
) -> dict[str, Any]:
    """Test scores of every condition, of the stock model, and how the vectors `found` of one task lie to each other.

    starts: where each vector was trained from, [P, D]; beside one of zeros a vector has no relative length (None).
    """
    rows, title = judge.task.test, judge.task.name
    made = prompts(found, starts)
    values = [one.value for one in found]
    return {
        "metric": judge.metric,
        "stock": judge.evaluate(None, rows).headline.value,
        "scores": {name: judge.scores(made[name], rows, f"{title} {name}", screen.on_eval) for name in CONDITIONS},
        "ratios": [vectors.norm_ratio(value, start) for value, start in zip(values, starts, strict=True)],
        "cosines": {how: vectors.cosines(values, how).tolist() for how in vectors.COSINES},
        "dead": int(sum((~value.any(1)).sum() for value in values)),
    }


def prompts(found: Sequence[Vector], starts: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The prompts [P, D] of every condition; of those on other starts one for each ordered pair of starts."""
    crossings = list(permutations(range(len(found)), 2))
    generator = torch.Generator().manual_seed(0)
    shuffled, random = [], []
    for of, on in crossings:
        value = found[of].value
        mixed = value.reshape(-1)[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        shuffled.append((starts[on].double() + mixed).float())
        random.append((starts[on].double() + noise * (value.norm() / noise.norm())).float())
    return {
        "own": [vectors.apply(one, start) for one, start in zip(found, starts, strict=True)],
        "cross": [vectors.apply(found[of], starts[on]) for of, on in crossings],
        "start": list(starts),
        "shuffled": shuffled,
        "random": random,
        "alone": [vectors.apply(one, torch.zeros_like(starts[0])) for one in found],
    }


def verdict(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the tasks' measurements say about the claim, in numbers and in words.

    kept: of each condition the part of what training gained, mean over the tasks in which training gained anything:
    (score - start) / (own - start).
    """
    means = {task: {name: fmean(values) for name, values in one["scores"].items()} for task, one in measured.items()}
    gained = {task: one for task, one in means.items() if one["own"] - one["start"] > 0.02}
    if not gained:
        return {
            "kept": {},
            "ratio": None,
            "holds": None,
            "words": "Training gained nothing, so there is nothing to keep.",
        }
    kept = {
        name: fmean((one[name] - one["start"]) / (one["own"] - one["start"]) for one in gained.values())
        for name in CONDITIONS
        if name not in ("own", "start")
    }
    known = [ratio for task in gained for ratio in measured[task]["ratios"] if ratio is not None]
    ratio = fmean(known) if known else None
    best = max((name for name in kept if name in CONTROLS), key=kept.__getitem__)
    if kept["cross"] > BEATEN and kept["alone"] > BEATEN:
        holds = "cannot be told"
    elif kept["cross"] <= max(BEATEN, kept[best]):
        holds = "does not hold"
    else:
        holds = "holds" if kept["cross"] >= KEPT and kept[best] <= BEATEN else "holds in part"
    words = (
        f"On another start a vector keeps {kept['cross']:.0%} of what training gained (mean of {len(gained)} tasks); "
        f"the best control, {CONDITIONS[best]}, keeps {kept[best]:.0%}."
    )
    if ratio is not None:
        words += f" Vectors are {ratio:.2g} times as long as the starts."
    words += f" That vectors do not depend on their start {holds} on this model"
    words += ": they do as well on none, so the start hardly matters." if holds == "cannot be told" else "."
    return {"kept": kept, "ratio": ratio, "holds": holds, "words": words}
