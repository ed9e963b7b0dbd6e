"""Ways to make one vector of several, named as in the literature on merging models."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompts.artifacts.vectors.vector import Number, Vector, exactly, in_order, merged
from softprompts.errors import ArtifactError


@dataclass(frozen=True)
class Merge:
    """What a merge may be told.

    weights: of each vector (None: all 1); density: the part of the numbers that ties keeps, and dare too; t: how far
    slerp goes from the first vector to the second; seed: of dare's draws.
    """

    weights: Sequence[Number] | None = None
    density: float = 0.2
    t: float = 0.5
    seed: int = 0


def weighted(vectors: Sequence[Vector], weights: Sequence[Number] | None = None) -> Vector:
    """The sum of `vectors` by `weights` (None: all 1), one for each (Ilharco et al. 2022, arXiv 2212.04089)."""
    shares = _weights(vectors, weights)
    order = in_order(vectors, shares)
    total = vectors[order[0]] * shares[order[0]]
    for place in order[1:]:
        total = total + vectors[place] * shares[place]
    return total


def average(vectors: Sequence[Vector]) -> Vector:
    """The mean of `vectors`, as over the seeds of one task."""
    return weighted(vectors) * (exactly(1) / len(vectors)) if vectors else weighted(vectors)


def ties(vectors: Sequence[Vector], weights: Sequence[Number] | None = None, density: float = 0.2) -> Vector:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect signs, and average what agrees.

    Of each vector the `density` part of largest magnitude is kept; the sign of each number is that of the weighted sum
    of what was kept; the result is the weighted mean of the kept numbers that have this sign.
    Raises ArtifactError for a density outside ]0, 1], and for weights that are not positive.
    """
    _check_density(density)
    shares = _weights(vectors, weights)
    if any(share <= 0 for share in shares):
        raise ArtifactError("ties takes a mean: its weights must be positive")
    order = in_order(vectors, shares)
    kept = torch.stack([_largest(vectors[place].value, density) for place in order])
    by = torch.tensor([float(shares[place]) for place in order], dtype=torch.float64)[:, None, None]
    sign = (kept * by).sum(0).sign()
    agrees = (kept.sign() == sign) & (sign != 0)
    value = (kept * by * agrees).sum(0) / (by * agrees).sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return merged(value, vectors, {"how": "ties", "density": density, **_told(vectors, shares, order)})


def dare(
    vectors: Sequence[Vector], weights: Sequence[Number] | None = None, density: float = 0.2, seed: int = 0
) -> Vector:
    """DARE (Yu et al. 2023, arXiv 2311.03099): of each vector numbers are dropped at random, and the sum is taken.

    A number is kept with the chance `density` and divided by it, so that its expectation stays. The draws of a vector
    hang on the seed and on what it is, not on its place among the others.
    Raises ArtifactError for a density outside ]0, 1].
    """
    _check_density(density)
    shares = _weights(vectors, weights)
    order = in_order(vectors, shares)
    total = torch.zeros(vectors[0].like.shape, dtype=torch.float64)
    for place in order:
        drawn = hashlib.sha256(f"{seed} {vectors[place].key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "little") % 2**63)
        kept = torch.rand(total.shape, generator=generator, dtype=torch.float64) < density
        total += float(shares[place]) * vectors[place].value * kept / density
    return merged(total, vectors, {"how": "dare", "density": density, "seed": seed, **_told(vectors, shares, order)})


def slerp(vectors: Sequence[Vector], t: float = 0.5) -> Vector:
    """Spherical interpolation of two vectors (Shoemake 1985): `t` 0 is the first, 1 the second.

    sin((1-t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b, Ω the angle between them; on a straight line where they are parallel.
    Raises ArtifactError for other than two vectors, and for two that point opposite ways: no way between is shortest.
    """
    if len(vectors) != 2:
        raise ArtifactError(f"slerp goes from one vector to another, given {len(vectors)}; give two")
    if not 0 <= t <= 1:
        raise ArtifactError(f"slerp's t must be from 0 to 1, given {t}")
    shares = (1 - t, t)
    order = in_order(vectors, shares)
    first, second = (vectors[place] for place in order)
    a, b = first.value, second.value
    length = float(a.norm() * b.norm())
    if length == 0:
        raise ArtifactError("slerp needs two directions, and one of the vectors is zero")
    if t in (0, 1):
        return vectors[int(t)]
    angle = 2 * math.atan2(float((a / a.norm() - b / b.norm()).norm()), float((a / a.norm() + b / b.norm()).norm()))
    if math.pi - angle < 1e-6:
        raise ArtifactError(f"{first.name} and {second.name} point opposite ways: there are many ways between them")
    if angle < 1e-6:
        by = [shares[place] for place in order]
    else:
        by = [math.sin(shares[place] * angle) / math.sin(angle) for place in order]
    return merged(by[0] * a + by[1] * b, vectors, {"how": "slerp", **_told(vectors, shares, order)})


MERGES: dict[str, Callable[[Sequence[Vector], Merge], Vector]] = {
    "weighted": lambda vectors, chosen: weighted(vectors, chosen.weights),
    "average": lambda vectors, chosen: average(vectors),
    "ties": lambda vectors, chosen: ties(vectors, chosen.weights, chosen.density),
    "dare": lambda vectors, chosen: dare(vectors, chosen.weights, chosen.density, chosen.seed),
    "slerp": lambda vectors, chosen: slerp(vectors, chosen.t),
}


def merge(vectors: Sequence[Vector], how: str, chosen: Merge | None = None) -> Vector:
    """One vector of several by the merge called `how`.

    Raises ArtifactError for a name that is not in MERGES, for weights where it takes none, and as the merge does.
    """
    if how not in MERGES:
        raise ArtifactError(f"no merge '{how}'; possible: {', '.join(MERGES)}")
    if how in ("average", "slerp") and chosen is not None and chosen.weights is not None:
        raise ArtifactError(f"merge '{how}' takes no weights; possible with weights: weighted, ties, dare")
    return MERGES[how](vectors, chosen or Merge())


def _weights(vectors: Sequence[Vector], weights: Sequence[Number] | None) -> list[Number]:
    if weights is None:
        return [1] * len(vectors)
    if len(weights) != len(vectors):
        raise ArtifactError(f"{len(weights)} weights for {len(vectors)} vectors; give one for each")
    return [exactly(weight) for weight in weights]


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ArtifactError(f"the density is the part of the numbers that is kept, above 0 and at most 1: {density}")


def _largest(value: Tensor, density: float) -> Tensor:
    """`value` with its smallest numbers zero: of n, the round(density · n) largest stay, of equal ones the first."""
    flat = value.reshape(-1)
    order = flat.abs().sort(descending=True, stable=True).indices
    kept = torch.zeros_like(flat)
    chosen = order[: max(1, round(density * len(flat)))]
    kept[chosen] = flat[chosen]
    return kept.reshape(value.shape)


def _told(vectors: Sequence[Vector], weights: Sequence[Number], order: Sequence[int]) -> dict[str, object]:
    """What is kept of a merge's inputs."""
    return {"of": [{"sum": vectors[place].name, "weight": float(weights[place])} for place in order]}
