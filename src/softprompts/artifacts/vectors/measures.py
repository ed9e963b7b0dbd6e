"""How long vectors are and which way they point; everything in float64."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from softprompts.artifacts.vectors import similarity
from softprompts.artifacts.vectors.vector import Vector, apply, check_fit, common_start
from softprompts.errors import ArtifactError

Cosine = Literal["flat", "mean", "rows"]

COSINES: dict[Cosine, str] = {
    "flat": "cosine of the matrices, read as one long vector each",
    "mean": "cosine of the mean rows, as in the paper",
    "rows": "mean of the cosines of row i with row i, over the rows that moved in both",
}
"""The kinds of cosine, and what each is."""


def cosine(one: Tensor, other: Tensor, how: Cosine = "flat") -> float:
    """The cosine of two matrices `[P, D]` (a vector's `value`, or prompts), from -1 to 1; see COSINES for `how`.

    A zero matrix has the cosine 0 with all others. Rows that never moved are zero in a vector, and count for nothing.
    Raises ArtifactError for matrices of different shapes and for another `how`.
    """
    if one.shape != other.shape or one.dim() != 2:
        raise ArtifactError(f"a cosine is of two matrices [P, D], given {list(one.shape)} and {list(other.shape)}")
    if how not in COSINES:
        raise ArtifactError(f"no cosine '{how}'; possible: {', '.join(COSINES)}")
    if how == "flat":
        return similarity.similarity(one.reshape(1, -1), other.reshape(1, -1))
    if how == "mean":
        return similarity.similarity(one, other)
    pairs = [(a[None], b[None]) for a, b in zip(one, other, strict=True) if a.any() and b.any()]
    return fmean(similarity.similarity(a, b) for a, b in pairs) if pairs else 0.0


def cosines(values: Sequence[Tensor], how: Cosine = "flat") -> Tensor:
    """The cosine of every two of `values`, each `[P, D]`, as `[N, N]`."""
    return torch.tensor([[cosine(one, other, how) for other in values] for one in values], dtype=torch.float64)


def norm(value: Tensor) -> float:
    """The length of a matrix `[P, D]`: the root of the sum of its squares (Frobenius)."""
    return float(value.double().norm())


def norm_ratio(value: Tensor, start: Tensor) -> float | None:
    """norm(tau) / norm(start): how far training went, in lengths of the start; None for a start of zeros.

    Where it is large, the start hardly matters, and a vector fits any: say it beside every cosine and every score of a
    vector on another start.
    """
    size = norm(start)
    return norm(value) / size if size else None


def distances(values: Sequence[Tensor]) -> Tensor:
    """The length of the difference of every two of `values`, each `[P, D]`, as `[N, N]`.

    Raises ArtifactError for matrices of different shapes.
    """
    for other in values[1:]:
        if other.shape != values[0].shape:
            shapes = f"{list(values[0].shape)} and {list(other.shape)}"
            raise ArtifactError(f"a distance is between matrices [P, D] of one shape, given {shapes}")
    return torch.tensor([[norm(a.double() - b.double()) for b in values] for a in values], dtype=torch.float64)


def compare(named: Mapping[str, Vector]) -> dict[str, Any]:
    """How vectors, by name, lie to each other: cosines of each kind, distances, lengths, beside the prompts' cosines.

    Raises ArtifactError for vectors of other backbones, lengths or sites.
    """
    check_fit(list(named.values()))
    values = [one.value for one in named.values()]
    starts = [common_start(one) for one in named.values()]
    prompts = [apply(one, start) for one, start in zip(named.values(), starts, strict=True) if start is not None]
    every = {f"vectors, {how}": cosines(values, how).tolist() for how in COSINES}
    if len(prompts) == len(values):
        every["prompts, flat"] = cosines(prompts).tolist()
    return {
        "labels": list(named),
        "cosines": every,
        "distances": distances(values).tolist(),
        "norms": [norm(value) for value in values],
        "ratios": [
            None if start is None else norm_ratio(value, start) for value, start in zip(values, starts, strict=True)
        ],
    }
