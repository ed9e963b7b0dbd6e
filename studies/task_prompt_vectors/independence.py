"""Question 1: does a vector work on another start as on its own? With the controls that the paper lacks."""

from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from softprompts.artifacts import vectors
from softprompts.artifacts.vectors import Vector
from softprompts.recipes.evaluate_prompts import Evaluator
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
"""The conditions that `cross` must beat before a vector can be called independent of its start."""

KEPT_SHARE = 0.9
"""The claim holds where `cross` keeps at least this share of the gain of training, and no control more than
CONTROL_SHARE."""

CONTROL_SHARE = 0.5
"""Where the vectors alone keep more than this share too, a start hardly matters, and the claim cannot be decided."""

MIN_GAIN = 0.02
"""Tasks on which training gained less are left out."""


def measure(
    evaluator: Evaluator, task_vectors: Sequence[Vector], starts: Sequence[Tensor], reporter: ProgressReporter
) -> dict[str, Any]:
    """Measure every condition on the test rows of a task.

    Args:
        evaluator: The task.
        task_vectors: The vectors of the task, one from each start.
        starts: The start of each vector [P, D].
        reporter: Shows progress.

    Returns:
        The test scores of every condition and of the stock model, each vector's length over its start's (None for a
        start of zeros), the cosines of the vectors, and the number of rows without a gradient.
    """
    rows = evaluator.task.test
    title = evaluator.task.name
    prompts_of_conditions = prompts(task_vectors, starts)
    scores = {}
    for name in CONDITIONS:
        scores[name] = evaluator.scores(prompts_of_conditions[name], rows, f"{title} {name}", reporter.on_eval)
    values = [vector.value for vector in task_vectors]
    return {
        "metric": evaluator.metric,
        "stock": evaluator.evaluate(None, rows).headline.value,
        "scores": scores,
        "ratios": [vectors.norm_ratio(value, start) for value, start in zip(values, starts, strict=True)],
        "cosines": {how: vectors.cosines(values, how).tolist() for how in vectors.COSINES},
        "dead": int(sum((~value.any(1)).sum() for value in values)),
    }


def prompts(task_vectors: Sequence[Vector], starts: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The prompts [P, D] of every condition; of those on other starts one for each ordered pair of starts."""
    generator = torch.Generator().manual_seed(0)
    cross = []
    shuffled = []
    random = []
    for vector_index, start_index in permutations(range(len(task_vectors)), 2):
        vector = task_vectors[vector_index]
        value = vector.value
        start = starts[start_index]
        order = torch.randperm(value.numel(), generator=generator)
        mixed = value.reshape(-1)[order].reshape(value.shape)
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        cross.append(vectors.apply(vector, start))
        shuffled.append((start.double() + mixed).float())
        random.append((start.double() + noise * (value.norm() / noise.norm())).float())
    zeros = torch.zeros_like(starts[0])
    return {
        "own": [vectors.apply(vector, start) for vector, start in zip(task_vectors, starts, strict=True)],
        "cross": cross,
        "start": list(starts),
        "shuffled": shuffled,
        "random": random,
        "alone": [vectors.apply(vector, zeros) for vector in task_vectors],
    }


def verdict(measurements: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict on the claim that vectors are independent of their start.

    Args:
        measurements: The result of `measure`, by task.

    Returns:
        `kept`: the share of the gain of training that each condition keeps, (score - start) / (own - start), mean over
        the tasks on which training gained. `ratio`: the mean length of vectors over their starts'. `holds` and `words`:
        the verdict for people.
    """
    gained = {}
    for task, measurement in measurements.items():
        means = {name: fmean(values) for name, values in measurement["scores"].items()}
        if means["own"] - means["start"] > MIN_GAIN:
            gained[task] = means
    if not gained:
        words = "Training gained nothing, so there is nothing to keep."
        return {"kept": {}, "ratio": None, "holds": None, "words": words}
    shares = {}
    for name in CONDITIONS:
        if name not in ("own", "start"):
            gains = [(means[name] - means["start"]) / (means["own"] - means["start"]) for means in gained.values()]
            shares[name] = fmean(gains)
    ratios: list[float] = []
    for task in gained:
        ratios += [ratio for ratio in measurements[task]["ratios"] if ratio is not None]
    ratio = fmean(ratios) if ratios else None
    best = max((name for name in shares if name in CONTROLS), key=shares.__getitem__)
    if shares["cross"] > CONTROL_SHARE and shares["alone"] > CONTROL_SHARE:
        holds = "cannot be told"
    elif shares["cross"] <= max(CONTROL_SHARE, shares[best]):
        holds = "does not hold"
    else:
        holds = "holds" if shares["cross"] >= KEPT_SHARE and shares[best] <= CONTROL_SHARE else "holds in part"
    words = (
        f"On another start a vector keeps {shares['cross']:.0%} of what training gained (mean of {len(gained)} tasks); "
        f"the best control, {CONDITIONS[best]}, keeps {shares[best]:.0%}."
    )
    if ratio is not None:
        words += f" Vectors are {ratio:.2g} times as long as the starts."
    words += f" That vectors do not depend on their start {holds} on this model"
    words += ": they do as well on none, so the start hardly matters." if holds == "cannot be told" else "."
    return {"kept": shares, "ratio": ratio, "holds": holds, "words": words}
