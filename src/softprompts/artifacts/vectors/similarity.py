"""SPoT (Vu, Lester, Constant, Al-Rfou, Cer 2022, arXiv 2110.07904): which trained prompts suit a new task.

A task is told by its prompt: similar tasks have similar prompts, and a prompt of a similar task is a good start. Plain
functions on prompts [P, D]; everything is computed in float64.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

SimilarityMeasure = Literal["mean", "pairs"]


def similarity(one: Tensor, other: Tensor, how: SimilarityMeasure = "mean") -> float:
    """How alike the tasks of two prompts `[P, D]` are, from -1 to 1; their lengths may differ (section 4.1).

    how: "mean", the cosine of the mean tokens; "pairs", the mean cosine over all pairs of tokens. A vector of zeros has
    the cosine 0 with every other.
    Raises ValueError for prompts of other shapes and for another `how`.
    """
    if one.dim() != 2 or other.dim() != 2 or one.shape[1] != other.shape[1] or 0 in (len(one), len(other)):
        shapes = f"{list(one.shape)} and {list(other.shape)}"
        raise ValueError(f"prompts to compare must be [P, D] with the same D, given {shapes}")
    if how not in ("mean", "pairs"):
        raise ValueError(f"no similarity '{how}'; possible: mean, pairs")
    a, b = _direction(one, how), _direction(other, how)
    # Rounding may lead a hair beyond what a cosine can be.
    return max(-1.0, min(1.0, float(a @ b)))


def _direction(prompt: Tensor, how: SimilarityMeasure) -> Tensor:
    """What is multiplied: the mean token made a unit vector, or the mean of the tokens made unit vectors, [D]."""
    rows = prompt.detach().cpu().double()
    rows = rows.mean(0, keepdim=True) if how == "mean" else rows
    # Divided by its largest number first: torch takes what is shorter than 1e-12 for zero.
    scaled = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return functional.normalize(scaled, dim=1).mean(0)


def matrix(prompts: Sequence[Tensor], how: SimilarityMeasure = "mean") -> Tensor:
    """The similarity of every two of `prompts`, each [P, D], as [N, N] in float64."""
    return torch.tensor([[similarity(one, other, how) for other in prompts] for one in prompts], dtype=torch.float64)


def retrieve(
    target: Tensor, sources: Mapping[str, Tensor], k: int = 3, how: SimilarityMeasure = "mean"
) -> list[tuple[str, float, float]]:
    """The `k` sources most similar to `target [P, D]`, best first, as (name, weight, similarity).

    Weights are the similarities divided by their sum (section 4.2), and sum to one. A source whose similarity is not
    positive has weight 0: it points away from the target; where none of the `k` is positive, all have the same weight.
    Of sources that are equally similar the one whose name sorts first comes first.
    Raises ValueError where `k` is not between 1 and the number of sources, and as `similarity` does.
    """
    if not 1 <= k <= len(sources):
        raise ValueError(f"k must be from 1 to the number of sources, {len(sources)}; given {k}")
    found = {name: similarity(target, prompt, how) for name, prompt in sources.items()}
    best = sorted(found, key=lambda name: (-found[name], name))[:k]
    kept = [max(found[name], 0.0) for name in best]
    total = math.fsum(kept)
    weights = [one / total for one in kept] if total > 0 else [1 / k] * k
    return [(name, weight, found[name]) for name, weight in zip(best, weights, strict=True)]


def mean(prompts: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean [P, D] of `prompts`, each [P, D], by `weights` of any sum (None: all alike), rounded once to float32."""
    shares = torch.tensor([1.0] * len(prompts) if weights is None else list(weights), dtype=torch.float64)
    every = torch.stack([prompt.detach().cpu().double() for prompt in prompts])
    return ((shares / shares.sum())[:, None, None] * every).sum(0).float()
