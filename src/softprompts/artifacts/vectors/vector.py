"""The value type: a weighted sum of differences between trained prompts and their starts."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.fingerprint import check_fingerprint, tensor_bytes
from softprompts.errors import ArtifactError, ConfigError, WrongBackboneError

Coefficient = int | float | Fraction
"""What multiplies a vector. It is kept exactly, so that (a + b) + c equals a + (b + c)."""

_PLAIN_NAME = re.compile(r'[^\s*()"+-][^\s*()"]*')
_NUMBER = re.compile(r"[\d.]+([eE][+-]?\d+)?")


@dataclass(frozen=True, eq=False)
class Summand:
    """One summand of a vector: `coefficient · (tuned - initial)`.

    Attributes:
        key: The identity of the difference, 64 hex digits. Summands are ordered and collected by it.
        coefficient: The factor.
        tuned: The trained prompt, [P, D] float32; of a merge, the merged matrix in float64.
        initial: The start of its training, [P, D] float32; of a merge, zeros.
        provenance: Name, task, parents and, of a merge, how it was made, as artifacts store them.
    """

    key: str
    coefficient: Fraction
    tuned: Tensor
    initial: Tensor
    provenance: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Vector:
    """A task prompt vector, or a sum of several, which is added to a start.

    Attributes:
        summands: In the order of their keys, none twice and none with coefficient 0.
        reference: An artifact with the backbone, length and site of all summands, and their task where they share it.
    """

    summands: tuple[Summand, ...]
    reference: Artifact

    @cached_property
    def value(self) -> Tensor:
        """The vector as one matrix, [P, D] float64."""
        total = torch.zeros(self.reference.shape, dtype=torch.float64)
        for summand in self.summands:
            total += float(summand.coefficient) * (summand.tuned.double() - summand.initial.double())
        return total

    @property
    def key(self) -> str:
        """The identity of the vector, 64 hex digits: equal for equal sums, in whatever order they were written."""
        lines = [_frame(self.reference)]
        lines += [f"{summand.key} {summand.coefficient}" for summand in self.summands]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The sum as people write it, such as `movies + 0.5*tweets`."""
        text = ""
        for summand in self.summands:
            sign = "-" if summand.coefficient < 0 else "+"
            text += f" {sign} {_term(summand)}"
        if not text:
            return "0"
        return text.removeprefix(" + ") if text.startswith(" + ") else f"-{text.removeprefix(' - ')}"

    @property
    def parents(self) -> tuple[str, ...]:
        """The digests of the artifacts from which the vector is made, sorted."""
        digests: set[str] = set()
        for summand in self.summands:
            digests |= set(summand.provenance["parents"])
        return tuple(sorted(digests))

    def __add__(self, other: "Vector") -> "Vector":
        if not isinstance(other, Vector):
            return NotImplemented
        _check_pair(self, other)
        return _collect([*self.summands, *other.summands], _common_reference(self.reference, other.reference))

    def __sub__(self, other: "Vector") -> "Vector":
        if not isinstance(other, Vector):
            return NotImplemented
        return self + -other

    def __neg__(self) -> "Vector":
        return self * -1

    def __mul__(self, coefficient: Coefficient) -> "Vector":
        if not isinstance(coefficient, int | float | Fraction):
            return NotImplemented
        factor = exact_fraction(coefficient)
        summands = [replace(summand, coefficient=summand.coefficient * factor) for summand in self.summands]
        return _collect(summands, self.reference)

    __rmul__ = __mul__


def task_vector(artifact: Artifact, name: str | Path = "") -> Vector:
    """The task prompt vector of a trained prompt: τ = θ_trained - θ_initial (section 3 of arXiv 2408.01119).

    Args:
        artifact: The trained prompt, folded where its method made it from other tensors.
        name: What messages and results call it; its task where it is empty.

    Raises:
        ArtifactError: The prompt depends on the text, or the artifact does not hold the start of its training.
    """
    title = str(name) or artifact.task
    tuned = artifact.require_prompt(title)
    if artifact.initial is None:
        raise ArtifactError(
            f"{title} does not store where its training began, so it has no task vector (PEFT does not store "
            f"the start); give the start: softprompts vector make {title} --start START --out DIRECTORY"
        )
    # The digest does not cover the start, and two artifacts may differ in their starts alone.
    key = hashlib.sha256(artifact.digest.encode() + tensor_bytes(artifact.initial)).hexdigest()
    provenance = {"name": title, "task": artifact.task, "parents": [artifact.digest]}
    return Vector((Summand(key, Fraction(1), tuned, artifact.initial, provenance),), artifact)


def apply(vector: Vector, start: Tensor, scale: Coefficient = 1) -> Tensor:
    """The prompt θ' + λ τ, [P, D], computed in float64 and rounded once, to float32.

    On the start from which a summand with coefficient 1 was trained, the result is the trained prompt bit for bit.

    Args:
        vector: τ.
        start: θ', [P, D].
        scale: λ.

    Raises:
        ArtifactError: The start has another shape.
    """
    if tuple(start.shape) != vector.reference.shape:
        raise ArtifactError(
            f"the start is {list(start.shape)} and the vector {list(vector.reference.shape)}: give a start of the same "
            f"length and site"
        )
    scaled = vector * scale
    if not scaled.summands:
        return start.clone().float()
    for summand in scaled.summands:
        if summand.coefficient == 1 and torch.equal(summand.initial, start):
            others = tuple(other for other in scaled.summands if other is not summand)
            if not others:
                return summand.tuned.to(torch.float32, copy=True)
            return (summand.tuned.double() + Vector(others, vector.reference).value).float()
    return (start.double() + scaled.value).float()


def common_start(vector: Vector) -> Tensor | None:
    """The start [P, D] from which all summands were trained; None where they differ, or where one is a merge."""
    if not vector.summands:
        return None
    start = vector.summands[0].initial
    for summand in vector.summands:
        if "how" in summand.provenance or not torch.equal(summand.initial, start):
            return None
    return start


def require_common_start(vector: Vector, advice: str, title: str = "the sum") -> Tensor:
    """The start [P, D] from which all summands were trained.

    Args:
        vector: The vector.
        advice: How a user gives another start, for messages.
        title: What messages call a vector of zero.

    Raises:
        ConfigError: The summands share no start, or there are none.
    """
    start = common_start(vector)
    if start is not None:
        return start
    if not vector.summands:
        raise ConfigError(f"{title} is zero, so it has no start; {advice}")
    raise ConfigError(f"the prompts of '{vector.name}' did not all begin at the same start; {advice}")


def to_artifact(vector: Vector, start: Tensor, scale: Coefficient = 1) -> Artifact:
    """θ' + λ τ as an ordinary prompt-tuning artifact. Its parents and `config["vector"]` hold what it is made of.

    Args:
        vector: τ.
        start: θ', [P, D], which becomes the artifact's `initial`, so that the artifact is a vector again.
        scale: λ.

    Raises:
        ArtifactError: The start has another shape.
    """
    prompt = apply(vector, start, scale)
    factor = exact_fraction(scale)
    tasks = {summand.provenance["task"] for summand in vector.summands}
    sections = ("model", "evaluation", "task") if len(tasks) == 1 else ("model", "evaluation")
    config: dict[str, Any] = {key: value for key, value in vector.reference.config.items() if key in sections}
    parts = []
    for summand in vector.summands:
        parts.append({**summand.provenance, "coefficient": float(summand.coefficient * factor)})
    config["vector"] = {"sum": (vector * factor).name, "parts": parts}
    return replace(
        vector.reference,
        prompt=prompt,
        initial=start.clone().float(),
        method="prompt-tuning",
        options={},
        state={"prompt": prompt.clone()},
        config=config,
        scores={},
        parents=vector.parents,
    )


def check_start(start: Artifact, vector: Vector, name: str | Path) -> None:
    """Check that a start belongs to the backbone and site of a vector.

    Args:
        start: The artifact that is the start.
        vector: The vector.
        name: What messages call the start.

    Raises:
        ArtifactError: It does not.
    """
    _check_artifacts(vector.reference, start, vector.name, str(name))


def exact_fraction(coefficient: Coefficient) -> Fraction:
    """The exact value of a coefficient.

    Raises:
        ArtifactError: The coefficient is not finite, or is larger than any float.
    """
    try:
        fraction = Fraction(coefficient)
        float(fraction)
    except (ValueError, OverflowError):
        shown = coefficient if isinstance(coefficient, float) else "what is larger than any float"
        raise ArtifactError(f"a vector cannot be multiplied by {shown}; give a finite number") from None
    return fraction


def merged_vector(value: Tensor, sources: Sequence[Vector], provenance: dict[str, Any]) -> Vector:
    """A matrix that a merge made of vectors, as a vector with one summand.

    Args:
        value: The matrix, [P, D] float64.
        sources: The vectors.
        provenance: How it was made; `how` names the merge.
    """
    reference = sources[0].reference
    for source in sources[1:]:
        reference = _common_reference(reference, source.reference)
    digests: set[str] = set()
    for source in sources:
        digests |= set(source.parents)
    parents = sorted(digests)
    # The provenance is not part of the identity, because the names of the sources do not change the merge.
    identity = f"{_frame(reference)}\n{provenance['how']} {parents}\n".encode() + tensor_bytes(value)
    summand = Summand(
        key=hashlib.sha256(identity).hexdigest(),
        coefficient=Fraction(1),
        tuned=value,
        initial=torch.zeros_like(value),
        provenance={"name": provenance["how"], "task": reference.task, "parents": parents, **provenance},
    )
    return Vector((summand,) if value.any() else (), reference)


def check_combinable(vectors: Sequence[Vector]) -> None:
    """Check that vectors may be combined.

    Raises:
        ArtifactError: There are none, or two of them have other backbones, sites or lengths.
    """
    if not vectors:
        raise ArtifactError("no vectors to combine; give at least one")
    for first, second in combinations(vectors, 2):
        _check_pair(first, second)


def canonical_order(vectors: Sequence[Vector], weights: Sequence[Coefficient]) -> list[int]:
    """The positions of vectors in the order of their keys; of equal keys, in that of their weights and names.

    Raises:
        ArtifactError: As in `check_combinable`.
    """
    check_combinable(vectors)
    keys = [(vector.key, weight, vector.name) for vector, weight in zip(vectors, weights, strict=True)]
    return sorted(range(len(vectors)), key=keys.__getitem__)


def _collect(summands: Sequence[Summand], reference: Artifact) -> Vector:
    """The sum of summands, each key once. Of several provenances of one key, the first in the alphabet stays."""
    by_key: dict[str, Summand] = {}
    for summand in summands:
        coefficient, provenance = summand.coefficient, summand.provenance
        if summand.key in by_key:
            earlier = by_key[summand.key]
            coefficient += earlier.coefficient
            provenance = min(earlier.provenance, provenance, key=repr)
        by_key[summand.key] = replace(summand, coefficient=exact_fraction(coefficient), provenance=provenance)
    return Vector(tuple(by_key[key] for key in sorted(by_key) if by_key[key].coefficient), reference)


def _common_reference(first: Artifact, second: Artifact) -> Artifact:
    """The reference of a sum: the first of two artifacts, with the template where both have the same one.

    An artifact with a fingerprint is first. Without one, any prompt could be added to the sum.
    """
    first, second = sorted((first, second), key=lambda artifact: (artifact.fingerprint is None, artifact.digest))
    task = " + ".join(sorted({*first.task.split(" + "), *second.task.split(" + ")}))
    if first.template is None:
        return replace(first, task=task)
    template = {**first.template, "name": task}
    same = template == {**(second.template or {}), "name": task}
    return replace(first, task=task, template=template if same else None)


def _check_pair(first: Vector, second: Vector) -> None:
    _check_artifacts(first.reference, second.reference, first.name, second.name)


def _check_artifacts(first: Artifact, second: Artifact, first_name: str, second_name: str) -> None:
    """Raise ArtifactError unless the prompts of two artifacts may be added."""
    pair = f"{first_name} and {second_name} cannot be combined"
    for fact in ("shape", "site", "mode", "placement", "segments", "family"):
        values = getattr(first, fact), getattr(second, fact)
        if fact == "family" and None in values:  # PEFT's files do not say
            continue
        if values[0] != values[1]:
            shown = [list(value) if isinstance(value, tuple) else value for value in values]
            raise ArtifactError(
                f"{pair}: their {fact} is {shown[0]} and {shown[1]}; vectors add up only where they enter the same "
                f"model at the same place with the same length"
            )
    if (first.heads or second.heads) and first.digest != second.digest:
        raise ArtifactError(
            f"{pair}: each was trained with its own classification head; train with model.head: lm to add prompts"
        )
    if first.fingerprint is None or second.fingerprint is None:
        _check_backbone_names(first, second, pair)
        return
    try:
        check_fingerprint(first.fingerprint, second.fingerprint, False)
    except WrongBackboneError as error:
        reason = str(error).partition("; --allow-other-weights")[0]  # a sum has no such option
        raise WrongBackboneError(f"{pair}: {reason}") from None


def _check_backbone_names(first: Artifact, second: Artifact, pair: str) -> None:
    """Raise WrongBackboneError for artifacts without a fingerprint that name different models."""
    names = {artifact.backbone for artifact in (first, second) if artifact.backbone and artifact.fingerprint is None}
    if len(names) > 1:
        raise WrongBackboneError(
            f"{pair}: one was made for {first.backbone}, the other for {second.backbone}; vectors add up only on the "
            f"same weights"
        )


def _frame(reference: Artifact) -> str:
    """Where the summands of a vector enter, as part of its identity."""
    segments = f" {reference.segments}" if reference.segments else ""
    return f"{reference.site} {reference.mode} {reference.placement} {reference.shape}{segments}"


def _term(summand: Summand) -> str:
    """The summand without its sign; its name is quoted where it would be read as a sum or a number."""
    coefficient, name = abs(summand.coefficient), summand.provenance["name"]
    if not _PLAIN_NAME.fullmatch(name) or _NUMBER.fullmatch(name):
        name = f'"{name}"'
    return name if coefficient == 1 else f"{float(coefficient):g}*{name}"
