"""How long vectors are and which way they point; everything in float64."""

import functools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from torch import Tensor

from softprompts.artifacts.vectors import similarity
from softprompts.artifacts.vectors.vector import Vector, apply, check_combinable, common_start
from softprompts.errors import ArtifactError

CosineKind = Literal["flat", "mean", "rows"]

COSINES: dict[CosineKind, str] = {
    "flat": "cosine of the matrices, read as one long vector each",
    "mean": "cosine of the mean rows, as in the paper",
    "rows": "mean of the cosines of row i with row i, over the rows that moved in both",
}
"""The kinds of cosine, and what each is."""


def cosine(first: Tensor, second: Tensor, kind: CosineKind = "flat") -> float:
    """The cosine of two matrices, from -1 to 1. A zero matrix has the cosine 0 with every other.

    Args:
        first: The value of a vector, or a prompt, [P, D].
        second: Another one, [P, D].
        kind: One of COSINES. Rows that never moved are zero in a vector, and do not count.

    Raises:
        ArtifactError: The shapes differ, or the kind is unknown.
    """
    if first.shape != second.shape or first.dim() != 2:
        raise ArtifactError(f"a cosine is of two matrices [P, D], given {list(first.shape)} and {list(second.shape)}")
    if kind not in COSINES:
        raise ArtifactError(f"no cosine '{kind}'; possible: {', '.join(COSINES)}")
    if kind == "flat":
        return similarity.similarity(first.reshape(1, -1), second.reshape(1, -1))
    if kind == "mean":
        return similarity.similarity(first, second)
    values = []
    for row, other_row in zip(first, second, strict=True):
        if row.any() and other_row.any():
            values.append(similarity.similarity(row[None], other_row[None]))
    return fmean(values) if values else 0.0


def cosines(values: Sequence[Tensor], kind: CosineKind = "flat") -> Tensor:
    """The cosine of every two matrices.

    Args:
        values: N matrices, [P, D] each.
        kind: One of COSINES.

    Returns:
        [N, N] float64.
    """
    return similarity.pairwise(functools.partial(cosine, kind=kind), values)


def norm(value: Tensor) -> float:
    """The Frobenius norm of a matrix [P, D]: the root of the sum of its squares."""
    return float(value.double().norm())


def norm_ratio(value: Tensor, start: Tensor) -> float | None:
    """norm(τ) / norm(start): how far training went, in lengths of the start; None for a start of zeros.

    Where the ratio is large, the start hardly matters and the vector fits any start. Report it beside every cosine and
    every score of a vector on another start.
    """
    size = norm(start)
    return norm(value) / size if size else None


def distances(values: Sequence[Tensor]) -> Tensor:
    """The norm of the difference of every two matrices.

    Args:
        values: N matrices, [P, D] each.

    Returns:
        [N, N] float64.

    Raises:
        ArtifactError: The shapes differ.
    """
    for other in values[1:]:
        if other.shape != values[0].shape:
            shapes = f"{list(values[0].shape)} and {list(other.shape)}"
            raise ArtifactError(f"a distance is between matrices [P, D] of one shape, given {shapes}")
    return similarity.pairwise(lambda first, second: norm(first.double() - second.double()), values)


def compare(vectors: Mapping[str, Vector]) -> dict[str, Any]:
    """Cosines of each kind, distances and norms of vectors, and the cosines of their prompts, as JSON.

    Args:
        vectors: The vectors by name.

    Raises:
        ArtifactError: Two vectors have other backbones, lengths or sites.
    """
    check_combinable(list(vectors.values()))
    values: list[Tensor] = []
    prompts: list[Tensor] = []
    ratios: list[float | None] = []
    for vector in vectors.values():
        values.append(vector.value)
        start = common_start(vector)
        if start is None:
            ratios.append(None)
        else:
            prompts.append(apply(vector, start))
            ratios.append(norm_ratio(vector.value, start))
    tables = {f"vectors, {kind}": cosines(values, kind).tolist() for kind in COSINES}
    if len(prompts) == len(values):
        tables["prompts, flat"] = cosines(prompts).tolist()
    return {
        "labels": list(vectors),
        "cosines": tables,
        "distances": distances(values).tolist(),
        "norms": list(map(norm, values)),
        "ratios": ratios,
    }
