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

from softprompts.artifacts.artifact import Artifact, check_fingerprint
from softprompts.errors import ArtifactError, WrongBackboneError

Number = int | float | Fraction
"""What a vector can be multiplied by; kept exactly, so that (a + b) + c is a + (b + c)."""

_PLAIN = re.compile(r'[^\s*()"+-][^\s*()"]*')
_NUMBER = re.compile(r"[\d.]+([eE][+-]?\d+)?")


@dataclass(frozen=True, eq=False)
class Part:
    """One summand: `coefficient · (tuned - initial)`, both `[P, D]`.

    key: its identity, 64 hex digits, by which summands are ordered and collected; facts: what is told of it in the
    results it goes into (name, task, parents and, for a merge, how it was made). A merge has no start: its `initial` is
    zero and its `tuned` is in float64.
    """

    key: str
    coefficient: Fraction
    tuned: Tensor
    initial: Tensor
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Vector:
    """A task prompt vector, or a sum of several: what is added to a start.

    parts: the summands, in the order of their keys, none twice and none with coefficient 0; like: an artifact that
    says which backbone, length and site they belong to, and what the task is where all have the same.
    """

    parts: tuple[Part, ...]
    like: Artifact

    @cached_property
    def value(self) -> Tensor:
        """The vector as one matrix `[P, D]` in float64."""
        total = torch.zeros(self.like.shape, dtype=torch.float64)
        for part in self.parts:
            total += float(part.coefficient) * (part.tuned.double() - part.initial.double())
        return total

    @property
    def key(self) -> str:
        """The vector's identity, 64 hex digits: the same for the same sum, however it was written."""
        told = [f"{part.key} {part.coefficient}" for part in self.parts]
        return hashlib.sha256("\n".join([_frame(self.like), *told]).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The sum as people write it."""
        text = "".join(f" {'-' if part.coefficient < 0 else '+'} {_written(part)}" for part in self.parts)
        return (text[3:] if text.startswith(" +") else f"-{text[3:]}") if text else "0"

    @property
    def parents(self) -> tuple[str, ...]:
        """Digests of the artifacts it is made of, sorted."""
        return tuple(sorted({digest for part in self.parts for digest in part.facts["parents"]}))

    def __add__(self, other: "Vector") -> "Vector":
        if not isinstance(other, Vector):
            return NotImplemented
        _check_together(self, other)
        return _collected([*self.parts, *other.parts], _alike(self.like, other.like))

    def __sub__(self, other: "Vector") -> "Vector":
        if not isinstance(other, Vector):
            return NotImplemented
        return self + -other

    def __neg__(self) -> "Vector":
        return self * -1

    def __mul__(self, coefficient: Number) -> "Vector":
        if not isinstance(coefficient, int | float | Fraction):
            return NotImplemented
        by = exactly(coefficient)
        return _collected([replace(part, coefficient=part.coefficient * by) for part in self.parts], self.like)

    __rmul__ = __mul__


def vector(found: Artifact, name: str | Path = "") -> Vector:
    """The task prompt vector of a trained prompt: its folded prompt minus its start (section 3 of the paper).

    name: what it is called in messages and results (its task, if not given).
    Raises ArtifactError where the prompt depends on the text, and where the artifact does not say where it began.
    """
    called = str(name) or found.task
    tuned = found.matrix(called)
    if found.initial is None:
        raise ArtifactError(
            f"{called} does not say where its training began, so there is no difference to take (PEFT does not keep "
            f"the start); name the start: softprompts vector make {called} --start START --out DIRECTORY"
        )
    # The digest says nothing of the start, and two artifacts may differ in that alone.
    key = hashlib.sha256(found.digest.encode() + _bits(found.initial)).hexdigest()
    facts = {"name": called, "task": found.task, "parents": [found.digest]}
    return Vector((Part(key, Fraction(1), tuned, found.initial, facts),), found)


def apply(one: Vector, start: Tensor, scale: Number = 1) -> Tensor:
    """The prompt `start + scale · vector`, `[P, D]`, computed in float64 and rounded once, to float32.

    Where the start is the one a summand was trained from, and it counts 1, it becomes the trained prompt bit for bit.
    Raises ArtifactError for a start of another shape.
    """
    if tuple(start.shape) != one.like.shape:
        raise ArtifactError(
            f"the start is {list(start.shape)} and the vector {list(one.like.shape)}: give a start of the same length "
            f"and site"
        )
    scaled = one * scale
    own = next((part for part in scaled.parts if part.coefficient == 1 and torch.equal(part.initial, start)), None)
    if own is not None:
        rest = [part for part in scaled.parts if part is not own]
        if not rest:
            return own.tuned.to(torch.float32, copy=True)
        return (own.tuned.double() + Vector(tuple(rest), one.like).value).float()
    return (start.double() + scaled.value).float() if scaled.parts else start.clone().float()


def common_start(one: Vector) -> Tensor | None:
    """The start `[P, D]` that all of the vector's summands were trained from; None where they differ, or are merged."""
    starts = [part.initial for part in one.parts]
    trained = starts and not any("how" in part.facts for part in one.parts)
    return starts[0] if trained and all(torch.equal(start, starts[0]) for start in starts) else None


def made(one: Vector, start: Tensor, scale: Number = 1) -> Artifact:
    """`start + scale · vector` as an ordinary prompt-tuning artifact, to be judged, served or trained on from.

    Its parents and `config["vector"]` say what it is made of; its start is `start`, so it is a vector again.
    """
    prompt = apply(one, start, scale)
    by = exactly(scale)
    single = len({part.facts["task"] for part in one.parts}) == 1
    kept: dict[str, Any] = {
        key: one.like.config[key] for key in ("model", "evaluation", "task") if key in one.like.config
    }
    if not single:
        kept.pop("task", None)
    parts = [{**part.facts, "coefficient": float(part.coefficient * by)} for part in one.parts]
    return replace(
        one.like,
        prompt=prompt,
        initial=start.clone().float(),
        method="prompt-tuning",
        options={},
        state={"prompt": prompt.clone()},
        config={**kept, "vector": {"sum": (one * by).name, "parts": parts}},
        scores={},
        parents=one.parents,
    )


def fits(start: Artifact, one: Vector, name: str | Path) -> None:
    """Raise ArtifactError unless the artifact `start`, called `name`, belongs to the vector's backbone and site."""
    _check_like(one.like, start, one.name, str(name))


def exactly(coefficient: Number) -> Fraction:
    """A coefficient as it is meant, without rounding; raises ArtifactError for nan and what no float can hold."""
    try:
        found = Fraction(coefficient)
        float(found)
    except (ValueError, OverflowError):
        shown = coefficient if isinstance(coefficient, float) else "what is larger than any float"
        raise ArtifactError(f"a vector cannot be multiplied by {shown}; give a finite number") from None
    return found


def merged(value: Tensor, sources: Sequence[Vector], facts: dict[str, Any]) -> Vector:
    """The matrix `value [P, D]`, made of `sources` otherwise than by a sum, as a vector; `facts` say how."""
    like = sources[0].like
    for other in sources[1:]:
        like = _alike(like, other.like)
    parents = sorted({digest for one in sources for digest in one.parents})
    # Not of all facts: what a merge is does not hang on what its sources are called.
    key = hashlib.sha256(f"{_frame(like)}\n{facts['how']} {parents}\n".encode() + _bits(value)).hexdigest()
    told = {"name": facts["how"], "task": like.task, "parents": parents, **facts}
    part = Part(key, Fraction(1), value, torch.zeros_like(value), told)
    return Vector((part,) if value.any() else (), like)


def check_fit(vectors: Sequence[Vector]) -> None:
    """Raise ArtifactError for no vectors, and unless every two may be combined."""
    if not vectors:
        raise ArtifactError("there are no vectors to combine; give at least one")
    for one, other in combinations(vectors, 2):
        _check_together(one, other)


def in_order(vectors: Sequence[Vector], weights: Sequence[Number]) -> list[int]:
    """The places of `vectors` in the order of their keys, of equal ones in that of their `weights` and names.

    Raises ArtifactError as `check_fit` does.
    """
    check_fit(vectors)
    known = [(one.key, weight, one.name) for one, weight in zip(vectors, weights, strict=True)]
    return sorted(range(len(vectors)), key=known.__getitem__)


def _collected(parts: Sequence[Part], like: Artifact) -> Vector:
    """The sum of `parts` with each summand once; of what is told of it in several ways, the first by the alphabet."""
    by_key: dict[str, Part] = {}
    for part in parts:
        known = by_key.get(part.key)
        total = part.coefficient if known is None else known.coefficient + part.coefficient
        facts = part.facts if known is None else min(known.facts, part.facts, key=repr)
        by_key[part.key] = replace(part, coefficient=exactly(total), facts=facts)
    return Vector(tuple(by_key[key] for key in sorted(by_key) if by_key[key].coefficient), like)


def _alike(one: Artifact, other: Artifact) -> Artifact:
    """What stands for the sum of two: the task and its format where both have the same.

    One that says for which weights it was made goes first, else what is added next would fit any.
    """
    first, second = sorted((one, other), key=lambda found: (found.fingerprint is None, found.digest))
    task = " + ".join(sorted({*first.task.split(" + "), *second.task.split(" + ")}))
    forms = [{**(found.format or {}), "name": task} for found in (first, second)]
    same = first.format is not None and forms[0] == forms[1]
    return replace(first, task=task, format=forms[0] if same else None)


def _check_together(one: Vector, other: Vector) -> None:
    _check_like(one.like, other.like, one.name, other.name)


def _check_like(one: Artifact, other: Artifact, first: str, second: str) -> None:
    """Raise ArtifactError unless prompts of two artifacts may be added."""
    for fact in ("shape", "site", "mode", "place", "segments", "family"):
        here, there = getattr(one, fact), getattr(other, fact)
        if fact == "family" and None in (here, there):  # PEFT's files do not say
            continue
        if here != there:
            shown = [list(value) if isinstance(value, tuple) else value for value in (here, there)]
            raise ArtifactError(
                f"{first} and {second} cannot be combined: their {fact} is {shown[0]} and {shown[1]}; vectors add up "
                f"only where they enter the same model at the same place with the same length"
            )
    if (one.heads or other.heads) and one.digest != other.digest:
        raise ArtifactError(
            f"{first} and {second} cannot be combined: each was trained with a classification head of its own; train "
            f"with model.head: lm to add prompts"
        )
    if one.fingerprint is None or other.fingerprint is None:
        names = {found.backbone for found in (one, other) if found.backbone and found.fingerprint is None}
        if len(names) > 1:  # PEFT's files have no more than the model's name
            raise WrongBackboneError(
                f"{first} and {second} cannot be combined: one was made for {one.backbone}, the other for "
                f"{other.backbone}; vectors add up only on the same weights"
            )
        return
    try:
        check_fingerprint(one.fingerprint, other.fingerprint, False)
    except WrongBackboneError as error:
        told = str(error).partition("; --allow-other-weights")[0]  # a run may be told so; a sum may not
        raise WrongBackboneError(f"{first} and {second} cannot be combined: {told}") from None


def _frame(like: Artifact) -> str:
    parted = f" {like.segments}" if like.segments else ""
    return f"{like.site} {like.mode} {like.place} {like.shape}{parted}"


def _written(part: Part) -> str:
    """The summand without its sign; a name that would be read as a sum or a number stands in quotation marks."""
    by, name = abs(part.coefficient), part.facts["name"]
    if not _PLAIN.fullmatch(name) or _NUMBER.fullmatch(name):
        name = f'"{name}"'
    return name if by == 1 else f"{float(by):g}*{name}"


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
