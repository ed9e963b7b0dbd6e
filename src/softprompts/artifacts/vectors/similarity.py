"""SPoT (Vu, Lester, Constant, Al-Rfou, Cer 2022, arXiv 2110.07904): which trained prompts suit a new task.

A prompt represents its task: similar tasks have similar prompts, and the prompt of a similar task is a good start. The
functions take prompts [P, D] and compute in float64.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.errors import ConfigError

SimilarityMeasure = Literal["mean", "pairs"]


def similarity(first: Tensor, second: Tensor, measure: SimilarityMeasure = "mean") -> float:
    """How similar the tasks of two prompts are, from -1 to 1 (section 4.1 of the paper).

    A vector of zeros has the cosine 0 with every other.

    Args:
        first: A prompt, [P, D].
        second: A prompt of the same width D and any length.
        measure: "mean", the cosine of the mean tokens; "pairs", the mean cosine over all pairs of tokens.

    Raises:
        ConfigError: The prompts have other shapes, or the measure is unknown.
    """
    matrices = first.dim() == 2 and second.dim() == 2
    if not matrices or first.shape[1] != second.shape[1] or 0 in (len(first), len(second)):
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise ConfigError(f"prompts to compare must be [P, D] with the same D, given {shapes}")
    if measure not in ("mean", "pairs"):
        raise ConfigError(f"no similarity '{measure}'; possible: mean, pairs")
    cosine = float(_direction(first, measure) @ _direction(second, measure))
    return max(-1.0, min(1.0, cosine))  # rounding may leave the range by one unit


def _direction(prompt: Tensor, measure: SimilarityMeasure) -> Tensor:
    """The mean token as a unit vector, or the mean of the tokens as unit vectors, [D]."""
    rows = prompt.detach().cpu().double()
    rows = rows.mean(0, keepdim=True) if measure == "mean" else rows
    # torch takes a vector shorter than 1e-12 for zero, so each row is divided by its largest number first.
    scaled = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return functional.normalize(scaled, dim=1).mean(0)


def similarity_matrix(prompts: Sequence[Tensor], measure: SimilarityMeasure = "mean") -> Tensor:
    """The similarity of every two prompts.

    Args:
        prompts: N prompts, [P, D] each.
        measure: As in `similarity`.

    Returns:
        [N, N] float64.
    """
    return pairwise(functools.partial(similarity, measure=measure), prompts)


def pairwise(function: Callable[[Tensor, Tensor], float], matrices: Sequence[Tensor]) -> Tensor:
    """The values [N, N] float64 of a function of every two of N matrices."""
    rows = []
    for first in matrices:
        rows.append([function(first, second) for second in matrices])
    return torch.tensor(rows, dtype=torch.float64)


def retrieve(
    target: Tensor, sources: Mapping[str, Tensor], k: int = 3, measure: SimilarityMeasure = "mean"
) -> list[tuple[str, float, float]]:
    """The k sources most similar to the target, best first (section 4.2 of the paper).

    The weights are the similarities divided by their sum. A source whose similarity is not positive points away from
    the target and has weight 0. Where none of the k is positive, all have the same weight.

    Args:
        target: The target's prompt, [P, D].
        sources: The sources' prompts by name. Of equally similar ones, the name that sorts first is first.
        k: How many.
        measure: As in `similarity`.

    Returns:
        (name, weight, similarity) of each; the weights sum to one.

    Raises:
        ConfigError: k is not between 1 and the number of sources, or as in `similarity`.
    """
    if not 1 <= k <= len(sources):
        raise ConfigError(f"k must be from 1 to the number of sources, {len(sources)}; given {k}")
    similarities = {name: similarity(target, prompt, measure) for name, prompt in sources.items()}
    best = sorted(similarities, key=lambda name: (-similarities[name], name))[:k]
    positive = [max(similarities[name], 0.0) for name in best]
    total = math.fsum(positive)
    weights = [value / total for value in positive] if total > 0 else [1 / k] * k
    return [(name, weight, similarities[name]) for name, weight in zip(best, weights, strict=True)]


def weighted_mean(prompts: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The weighted mean of prompts, [P, D], rounded once to float32.

    Args:
        prompts: [P, D] each.
        weights: Of any sum; None: all prompts count alike.
    """
    shares = torch.tensor([1.0] * len(prompts) if weights is None else list(weights), dtype=torch.float64)
    stacked = torch.stack([prompt.detach().cpu().double() for prompt in prompts])
    return ((shares / shares.sum())[:, None, None] * stacked).sum(0).float()
