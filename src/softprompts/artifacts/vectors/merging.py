"""Ways to make one vector of several, named as in the literature on merging models."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompts.artifacts.vectors.vector import (
    Coefficient,
    Vector,
    canonical_order,
    exact_fraction,
    merged_vector,
)
from softprompts.errors import ArtifactError


@dataclass(frozen=True)
class MergeOptions:
    """The options of all merges; each reads those that it has.

    Attributes:
        weights: The weight of each vector; None: all 1.
        density: The share of the numbers that ties and dare keep.
        t: How far slerp goes from the first vector to the second.
        seed: The seed of dare's draws.
    """

    weights: Sequence[Coefficient] | None = None
    density: float = 0.2
    t: float = 0.5
    seed: int = 0


def weighted(vectors: Sequence[Vector], weights: Sequence[Coefficient] | None = None) -> Vector:
    """The weighted sum Σ w_i τ_i (Ilharco et al. 2022, arXiv 2212.04089).

    Args:
        vectors: τ_i.
        weights: w_i, one for each vector; None: all 1.

    Raises:
        ArtifactError: The vectors cannot be combined, or there are more or fewer weights than vectors.
    """
    checked = _check_weights(vectors, weights)
    order = canonical_order(vectors, checked)
    total = vectors[order[0]] * checked[order[0]]
    for index in order[1:]:
        total = total + vectors[index] * checked[index]
    return total


def average(vectors: Sequence[Vector]) -> Vector:
    """The mean of vectors, for example over the seeds of one task.

    Raises:
        ArtifactError: The vectors cannot be combined.
    """
    total = weighted(vectors)
    return total * (exact_fraction(1) / len(vectors))


def ties(vectors: Sequence[Vector], weights: Sequence[Coefficient] | None = None, density: float = 0.2) -> Vector:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect signs, average the numbers that agree.

    Of each vector the share `density` of largest magnitude is kept. The elected sign of each number is that of the
    weighted sum of what was kept. The result is the weighted mean of the kept numbers that have the elected sign.

    Args:
        vectors: The vectors.
        weights: One positive weight for each; None: all 1.
        density: From above 0 to 1.

    Raises:
        ArtifactError: The vectors cannot be combined, or the density or a weight is out of range.
    """
    _check_density(density)
    checked = _check_weights(vectors, weights)
    if any(weight <= 0 for weight in checked):
        raise ArtifactError("ties takes a mean: its weights must be positive")
    order = canonical_order(vectors, checked)
    trimmed = torch.stack([_trim(vectors[index].value, density) for index in order])
    factors = torch.tensor([float(checked[index]) for index in order], dtype=torch.float64)[:, None, None]
    sign = (trimmed * factors).sum(0).sign()
    agrees = (trimmed.sign() == sign) & (sign != 0)
    total_weight = (factors * agrees).sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    value = (trimmed * factors * agrees).sum(0) / total_weight
    provenance = {"how": "ties", "density": density, "of": _describe(vectors, checked, order)}
    return merged_vector(value, vectors, provenance)


def dare(
    vectors: Sequence[Vector], weights: Sequence[Coefficient] | None = None, density: float = 0.2, seed: int = 0
) -> Vector:
    """DARE (Yu et al. 2023, arXiv 2311.03099): numbers of each vector are dropped at random, and the sum is taken.

    A number is kept with probability `density` and divided by it, so that its expectation stays. The draws of a vector
    depend on the seed and on the vector's identity, not on its position among the others.

    Args:
        vectors: The vectors.
        weights: One weight for each; None: all 1.
        density: From above 0 to 1.
        seed: The seed of the draws.

    Raises:
        ArtifactError: The vectors cannot be combined, or the density is out of range.
    """
    _check_density(density)
    checked = _check_weights(vectors, weights)
    order = canonical_order(vectors, checked)
    total = torch.zeros(vectors[0].reference.shape, dtype=torch.float64)
    for index in order:
        seed_bytes = hashlib.sha256(f"{seed} {vectors[index].key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed_bytes[:8], "little") % 2**63)
        mask = torch.rand(total.shape, generator=generator, dtype=torch.float64) < density
        total += float(checked[index]) * vectors[index].value * mask / density
    provenance = {"how": "dare", "density": density, "seed": seed, "of": _describe(vectors, checked, order)}
    return merged_vector(total, vectors, provenance)


def slerp(vectors: Sequence[Vector], t: float = 0.5) -> Vector:
    """Spherical interpolation of two vectors (Shoemake 1985): sin((1-t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b.

    Ω is the angle between the vectors. Parallel vectors are interpolated on a straight line.

    Args:
        vectors: a and b.
        t: From 0, which is a, to 1, which is b.

    Raises:
        ArtifactError: There are not two vectors, they cannot be combined, one is zero, or they point opposite ways, so
            that no way between them is shortest.
    """
    if len(vectors) != 2:
        raise ArtifactError(f"slerp needs two vectors, given {len(vectors)}")
    if not 0 <= t <= 1:
        raise ArtifactError(f"slerp's t must be from 0 to 1, given {t}")
    weights = (1 - t, t)
    order = canonical_order(vectors, weights)
    first, second = vectors[order[0]], vectors[order[1]]
    a, b = first.value, second.value
    if float(a.norm() * b.norm()) == 0:
        raise ArtifactError("slerp needs two directions, and one of the vectors is zero")
    if t in (0, 1):
        return vectors[int(t)]
    unit_a, unit_b = a / a.norm(), b / b.norm()
    angle = 2 * math.atan2(float((unit_a - unit_b).norm()), float((unit_a + unit_b).norm()))
    if math.pi - angle < 1e-6:
        raise ArtifactError(
            f"{first.name} and {second.name} point in opposite directions: the path between them is not unique"
        )
    factors = [weights[index] for index in order]
    if angle >= 1e-6:
        factors = [math.sin(factor * angle) / math.sin(angle) for factor in factors]
    provenance = {"how": "slerp", "of": _describe(vectors, weights, order)}
    return merged_vector(factors[0] * a + factors[1] * b, vectors, provenance)


MERGES: dict[str, Callable[[Sequence[Vector], MergeOptions], Vector]] = {
    "weighted": lambda vectors, options: weighted(vectors, options.weights),
    "average": lambda vectors, options: average(vectors),
    "ties": lambda vectors, options: ties(vectors, options.weights, options.density),
    "dare": lambda vectors, options: dare(vectors, options.weights, options.density, options.seed),
    "slerp": lambda vectors, options: slerp(vectors, options.t),
}


def merge(vectors: Sequence[Vector], name: str, options: MergeOptions | None = None) -> Vector:
    """One vector made of several.

    Args:
        vectors: The vectors.
        name: The merge, one of MERGES.
        options: Its options; None: the defaults.

    Raises:
        ArtifactError: The merge is unknown, does not take the weights that are given, or fails as it says.
    """
    if name not in MERGES:
        raise ArtifactError(f"no merge '{name}'; possible: {', '.join(MERGES)}")
    if name in ("average", "slerp") and options is not None and options.weights is not None:
        raise ArtifactError(f"merge '{name}' takes no weights; possible with weights: weighted, ties, dare")
    return MERGES[name](vectors, options or MergeOptions())


def _check_weights(vectors: Sequence[Vector], weights: Sequence[Coefficient] | None) -> list[Coefficient]:
    """The weights as exact fractions; 1 for each vector where there are none."""
    if weights is None:
        return [1] * len(vectors)
    if len(weights) != len(vectors):
        raise ArtifactError(f"{len(weights)} weights for {len(vectors)} vectors; give one for each")
    return list(map(exact_fraction, weights))


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ArtifactError(f"the density is the part of the numbers that is kept, above 0 and at most 1: {density}")


def _trim(value: Tensor, density: float) -> Tensor:
    """The matrix with only its round(density · n) numbers of largest magnitude; of equal ones, the first stay."""
    numbers = value.reshape(-1)
    order = numbers.abs().sort(descending=True, stable=True).indices
    largest = order[: max(1, round(density * len(numbers)))]
    trimmed = torch.zeros_like(numbers)
    trimmed[largest] = numbers[largest]
    return trimmed.reshape(value.shape)


def _describe(
    vectors: Sequence[Vector], weights: Sequence[Coefficient], order: Sequence[int]
) -> list[dict[str, object]]:
    """The inputs of a merge, as artifacts store them."""
    return [{"sum": vectors[index].name, "weight": float(weights[index])} for index in order]
