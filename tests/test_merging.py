"""Merges of vectors: TIES, DARE and SLERP against loops from their papers; the order of arguments never counts."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rows
from artifacts import D, P, assert_equal, bits, trained
from softprompts.artifacts import artifact, vectors
from softprompts.artifacts.vectors import MergeOptions, Vector, merge, task_vector, to_artifact
from softprompts.errors import ArtifactError

START = rows.random(0, P, D)


def task(seed: int, name: str = "") -> Vector:
    """A task's vector, with noise in every number."""
    return task_vector(trained(START + rows.random(seed, P, D), START, task=f"t{seed}"), name)


def of(value: Any, name: str = "") -> Vector:
    """The vector whose value is exactly these numbers."""
    tuned = torch.tensor(value, dtype=torch.float32)
    return task_vector(trained(tuned, torch.zeros_like(tuned)), name)


THREE = tuple(task(seed) for seed in (1, 2, 3))

WEIGHTED = ("weighted", "ties", "dare")
"""The merges that take weights."""


def flat(value: Tensor) -> list[float]:
    return [float(number) for number in value.flatten()]


# TIES


def ties_by_loops(values: Sequence[Sequence[float]], weights: Sequence[float], density: float) -> list[float]:
    """Section 3.2 of the paper, number by number: trim, elect the sign, and take the mean of those that have it."""
    trimmed = []
    for value in values:
        keep = max(1, round(density * len(value)))
        largest = sorted(range(len(value)), key=lambda i: (-abs(value[i]), i))[:keep]
        trimmed.append([number if i in largest else 0.0 for i, number in enumerate(value)])
    merged = []
    for i in range(len(values[0])):
        total = math.fsum(weight * value[i] for weight, value in zip(weights, trimmed, strict=True))
        agree = [(w, v[i]) for w, v in zip(weights, trimmed, strict=True) if v[i] * total > 0]
        over = math.fsum(w for w, _ in agree)
        merged.append(math.fsum(w * v for w, v in agree) / over if agree else 0.0)
    return merged


@st.composite
def whole(draw: st.DrawFn) -> list[list[list[float]]]:
    """Matrices of small whole numbers, so that magnitudes tie and sums cancel."""
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    line = st.lists(st.integers(-3, 3).map(float), min_size=width, max_size=width)
    return draw(st.lists(st.lists(line, min_size=height, max_size=height), min_size=1, max_size=4))


@settings(deadline=None, max_examples=80)
@given(values=whole(), density=st.floats(0.01, 1), quarters=st.lists(st.integers(1, 8), min_size=4, max_size=4))
def test_ties_equals_loops(values: list[list[list[float]]], density: float, quarters: list[int]) -> None:
    weights = [quarter / 4 for quarter in quarters[: len(values)]]
    lists = [[number for row in value for number in row] for value in values]
    found = vectors.ties([of(value) for value in values], weights, density)
    assert found.value.dtype == torch.float64
    assert flat(found.value) == pytest.approx(ties_by_loops(lists, weights, density), abs=1e-12)


def test_ties_in_a_case_that_can_be_checked_by_eye() -> None:
    one, other = of([[4.0, -3.0, 1.0, 0.0]]), of([[2.0, 5.0, 1.0, 0.5]])
    assert flat(vectors.ties([one, other], density=1).value) == [3, 5, 1, 0.5], "a zero is no vote"
    assert flat(vectors.ties([one, other], density=0.5).value) == [3, 5, 0, 0], "each keeps its two largest"
    assert flat(vectors.ties([one, other], density=0.25).value) == [4, 5, 0, 0]
    assert flat(vectors.ties([one, other], density=0.01).value) == [4, 5, 0, 0], "one at least"
    assert flat(vectors.ties([one, other], [3, 1], 1).value) == [3.5, -3, 1, 0.5], "weights elect, and weigh the mean"
    assert flat(vectors.ties([one, of([[-4.0, 3.0, 1.0, 0.0]])], density=1).value) == [0, 0, 1, 0], "a draw elects none"
    assert flat(vectors.ties([of([[1.0, -1.0, 1.0]])], density=0.4).value) == [1, 0, 0], "of equal ones the first"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), weighted=st.booleans())
def test_ties_of_equal_signs_at_density_one_is_the_mean(seed: int, count: int, weighted: bool) -> None:
    signs = rows.random(seed, 2, 3).sign()
    every = [of((rows.random(seed + i + 1, 2, 3).abs() * signs).tolist()) for i in range(count)]
    weights = [0.5 + i for i in range(count)] if weighted else [1.0] * count
    wanted = sum(one.value * weight for one, weight in zip(every, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(vectors.ties(every, weights, 1).value, wanted, rtol=1e-12, atol=0)
    if not weighted:
        torch.testing.assert_close(vectors.ties(every, None, 1).value, vectors.average(every).value, rtol=1e-12, atol=0)


# DARE


def test_dare_drops_and_rescales() -> None:
    """Each number is 0 or itself by the density; the draws of a vector do not hang on what it is merged with."""
    for seed, density in itertools.product(range(5), (0.1, 0.5, 0.9)):
        alone = [vectors.dare([one], density=density, seed=seed).value for one in THREE]
        for one, found in zip(THREE, alone, strict=True):
            kept = found != 0
            torch.testing.assert_close(found, one.value * kept / density, rtol=1e-12, atol=0)
        together = vectors.dare(THREE, [1, -2, 0.5], density, seed)
        torch.testing.assert_close(together.value, alone[0] - 2 * alone[1] + 0.5 * alone[2], rtol=1e-12, atol=1e-12)


def test_dare_at_density_one_is_the_sum() -> None:
    weights = [1, -0.5, Fraction(1, 3)]
    found, wanted = vectors.dare(THREE, weights, 1), vectors.weighted(THREE, weights)
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-12, atol=1e-12)


def test_dare_depends_on_the_seed_alone() -> None:
    found = {seed: vectors.dare(THREE, density=0.5, seed=seed) for seed in range(4)}
    for seed, one in found.items():
        torch.manual_seed(seed + 7)
        again = vectors.dare(THREE, density=0.5, seed=seed)
        assert (again.key, bits(again.value)) == (one.key, bits(one.value))
    assert len({one.key for one in found.values()}) == 4
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    vectors.dare(THREE, density=0.5)
    assert torch.rand(1).equal(before), "torch's own generator is left alone"


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_dare_keeps_the_expectation(density: float) -> None:
    """Over many seeds: the mean by a z-test for each number, the counts by chi-square, and vectors drop apart."""
    one, other = of([[1.0, -2.0, 0.5], [3.0, 4.0, -0.25]]), of([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    count = 1200
    draws = [vectors.dare([one], density=density, seed=seed).value for seed in range(count)]
    kept = torch.stack([draw != 0 for draw in draws]).double()
    deviation = one.value.abs() * math.sqrt((1 - density) / density / count)
    score = (torch.stack(draws).mean(0) - one.value) / deviation
    assert float(score.abs().max()) < 4
    expected = density * count
    chi = ((kept.sum(0) - expected).square() / (expected * (1 - density))).sum()
    assert 0.3 < float(chi) < 24, "six draws with one degree of freedom each"
    theirs = torch.stack([vectors.dare([other], density=density, seed=seed).value != 0 for seed in range(count)])
    both = (kept * theirs.double()).mean(0)
    assert float((both - density**2).abs().max()) < 4 * math.sqrt(density**2 * (1 - density**2) / count)
    within = (kept[:, 0, 0] * kept[:, 1, 2]).mean()
    assert abs(float(within) - density**2) < 4 * math.sqrt(density**2 * (1 - density**2) / count)


# SLERP


def slerp_by_loops(a: Sequence[float], b: Sequence[float], t: float) -> list[float]:
    """Shoemake 1985: sin((1-t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b."""
    sizes = [math.sqrt(math.fsum(x * x for x in one)) for one in (a, b)]
    omega = math.acos(math.fsum(x * y for x, y in zip(a, b, strict=True)) / (sizes[0] * sizes[1]))
    by = math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    return [by[0] * x + by[1] * y for x, y in zip(a, b, strict=True)]


def between(one: Tensor, other: Tensor) -> float:
    """The angle between two matrices."""
    return math.acos(max(-1.0, min(1.0, vectors.cosine(one, other))))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), t=st.floats(0.01, 0.99), longer=st.floats(0.1, 10))
def test_slerp_equals_the_formula_and_turns_evenly(seed: int, t: float, longer: float) -> None:
    """Of vectors of one length: the length stays, and the angle from the first is t of the whole."""
    first, second = rows.random(seed, 2, 3), rows.random(seed + 1, 2, 3) * longer
    found = vectors.slerp([of(first.tolist()), of(second.tolist())], t).value
    assert flat(found) == pytest.approx(slerp_by_loops(flat(first), flat(second), t), abs=1e-8)
    one, other = (of(value.tolist()) for value in (first / first.norm(), second / second.norm()))
    turned = vectors.slerp([one, other], t).value
    whole = between(one.value, other.value)
    assert float(turned.norm()) == pytest.approx(1, abs=1e-6)
    assert between(one.value, turned) == pytest.approx(t * whole, abs=1e-6)
    assert between(turned, other.value) == pytest.approx((1 - t) * whole, abs=1e-6)


def test_slerp_ends_at_its_two_vectors() -> None:
    one, other = THREE[:2]
    for t, end in ((0, one), (1, other), (0.0, one), (1.0, other)):
        found = vectors.slerp([one, other], t)
        assert (found.key, bits(found.value)) == (end.key, bits(end.value))
    assert flat(vectors.slerp([of([[1.0, 0.0]]), of([[0.0, 1.0]])]).value) == pytest.approx([math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_of_vectors_in_one_line(t: float) -> None:
    """Parallel ones go straight; a hair beside, the two rules meet; opposite ones have no shortest way."""
    one = of([[1.0, 2.0]])
    for other in (one, of([[3.0, 6.0]])):
        torch.testing.assert_close(
            vectors.slerp([one, other], t).value, (1 - t) * one.value + t * other.value, rtol=1e-12, atol=0
        )
    for aside in (1e-7, 3e-6, 1e-4):
        other = of([[1.0, 2.0 + aside]])
        wanted = (1 - t) * one.value + t * other.value
        torch.testing.assert_close(vectors.slerp([one, other], t).value, wanted, rtol=1e-8, atol=0)
    with pytest.raises(ArtifactError, match="north and south point in opposite directions: the path between them"):
        vectors.slerp([of([[1.0, 2.0]], "north"), of([[-2.0, -4.0]], "south")], t)
    with pytest.raises(ArtifactError, match="point in opposite directions"):
        vectors.slerp([one, -one], t)


# All merges


@pytest.mark.parametrize("how", sorted(set(vectors.MERGES) - {"slerp"}))
@pytest.mark.parametrize("weights", [None, (0.5, 2, Fraction(1, 3))], ids=["alike", "weighted"])
def test_the_order_of_arguments_never_counts(how: str, weights: tuple[Any, ...] | None) -> None:
    """Key, bits, name, parents, and all that is told of what is made; weights go along with their vectors."""
    weights = None if how == "average" else weights
    first = merge(THREE, how, MergeOptions(weights, density=0.6, seed=1))
    results = set()
    for order in itertools.permutations(range(3)):
        along = None if weights is None else [weights[i] for i in order]
        found = merge([THREE[i] for i in order], how, MergeOptions(along, density=0.6, seed=1))
        assert (found.key, found.name, bits(found.value)) == (first.key, first.name, bits(first.value))
        assert_equal(to_artifact(found, START, 0.5), to_artifact(first, START, 0.5))
        results.add(to_artifact(found, START, 0.5).digest)
        if weights is not None:
            crossed = merge([THREE[i] for i in order], how, MergeOptions(weights, density=0.6, seed=1))
            assert (crossed.key == first.key) == (order == (0, 1, 2)), "weights that stay behind are others"
    assert len(results) == 1


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75])
def test_slerp_from_the_other_end(t: float) -> None:
    one, other = THREE[:2]
    first, second = vectors.slerp([one, other], t), vectors.slerp([other, one], 1 - t)
    assert (first.key, bits(first.value)) == (second.key, bits(second.value))
    assert_equal(to_artifact(first, START), to_artifact(second, START))


@pytest.mark.parametrize("how", ["weighted", "ties", "dare"])
def test_one_vector_twice(how: str) -> None:
    """With two weights, and among others: no order is better than another."""
    one, other = THREE[:2]
    every, weights = [one, other, one, one], [0.1, 1, 0.7, 0.3]
    first = merge(every, how, MergeOptions(weights, density=0.6))
    for order in itertools.permutations(range(4)):
        found = merge([every[i] for i in order], how, MergeOptions([weights[i] for i in order], density=0.6))
        assert (found.key, bits(found.value)) == (first.key, bits(first.value))
        assert_equal(to_artifact(found, START), to_artifact(first, START))


@pytest.mark.parametrize("how", sorted(vectors.MERGES))
def test_what_a_merge_is_does_not_hang_on_names(how: str) -> None:
    plain, named = ([task(seed, name) for seed, name in ((1, a), (2, b))] for a, b in (("", ""), ("x", "y")))
    one, other = (merge(pair, how, MergeOptions(density=0.6)) for pair in (plain, named))
    assert one.key == other.key
    assert (one - other).summands == ()
    crossed = [task(1, "x"), task(1, "y")]
    assert_equal(to_artifact(merge(crossed, how), START), to_artifact(merge(crossed[::-1], how), START))


@pytest.mark.parametrize("how", ["ties", "dare", "slerp"])
def test_a_merge_is_a_vector_like_others(how: str, tmp_path: Path) -> None:
    """It adds up, scales and is merged again; what is made of it says how, of what and from whom."""
    pair = THREE[:2]
    one = merge(pair, how, MergeOptions(density=0.6, seed=4, t=0.25))
    assert one.parents == tuple(sorted({*pair[0].parents, *pair[1].parents}))
    torch.testing.assert_close((one * 2 - THREE[2]).value, one.value * 2 - THREE[2].value)
    assert (one + THREE[2] - one).key == THREE[2].key
    torch.testing.assert_close(vectors.average([one, THREE[2]]).value, (one.value + THREE[2].value) / 2)
    found = to_artifact(one * 0.5 + THREE[2], START)
    torch.testing.assert_close(found.require_prompt(""), START + (0.5 * one.value + THREE[2].value).float())
    assert found.parents == tuple(sorted(digest for part in THREE for digest in part.parents))
    told = {part["name"]: part for part in found.config["vector"]["parts"]}
    assert told[how]["coefficient"] == 0.5
    assert told[how]["how"] == how
    assert told[how]["parents"] == list(one.parents)
    shares = {"t1": 0.75, "t2": 0.25} if how == "slerp" else {"t1": 1.0, "t2": 1.0}
    assert {source["sum"]: source["weight"] for source in told[how]["of"]} == shares
    assert told[how].get("density") == (None if how == "slerp" else 0.6)
    assert told[how].get("seed") == (4 if how == "dare" else None)
    assert told["t3"]["coefficient"] == 1
    assert_equal(found, artifact.load(artifact.save(found, tmp_path / "made")))


def test_a_merge_is_on_no_start_the_trained_prompt() -> None:
    """A merge has no start of its own, also where it is applied to zeros."""
    one = merge(THREE, "ties")
    zeros = torch.zeros(P, D)
    torch.testing.assert_close(vectors.apply(one, zeros), one.value.float(), rtol=0, atol=0)
    assert vectors.apply(one, START, 0).equal(START)
    torch.testing.assert_close(vectors.apply(one, START), (START.double() + one.value).float(), rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(st.fractions(-4, 4, max_denominator=9), min_size=3, max_size=3))
@case([Fraction(0), Fraction(0), Fraction(0)])
def test_weighted_and_average_are_sums(weights: list[Fraction]) -> None:
    total = THREE[0] * weights[0] + THREE[1] * weights[1] + THREE[2] * weights[2]
    assert vectors.weighted(THREE, weights).key == total.key
    assert vectors.weighted(THREE).key == (THREE[0] + THREE[1] + THREE[2]).key
    assert vectors.average(THREE).key == (vectors.weighted(THREE) * Fraction(1, 3)).key
    loops = [
        math.fsum(float(w) * x for w, x in zip(weights, numbers, strict=True))
        for numbers in zip(*(flat(one.value) for one in THREE), strict=True)
    ]
    assert flat(vectors.weighted(THREE, weights).value) == pytest.approx(loops, abs=1e-12)


def test_merges_by_name() -> None:
    """Each takes from Merge what it knows; the defaults are the functions' own."""
    pair, chosen = THREE[:2], MergeOptions(weights=(2, 1), density=0.7, t=0.3, seed=5)
    bare = dataclasses.replace(chosen, weights=None)  # average and slerp take none
    for how, wanted, default in (
        ("weighted", vectors.weighted(pair, (2, 1)), vectors.weighted(pair)),
        ("average", vectors.average(pair), vectors.average(pair)),
        ("ties", vectors.ties(pair, (2, 1), 0.7), vectors.ties(pair)),
        ("dare", vectors.dare(pair, (2, 1), 0.7, 5), vectors.dare(pair)),
        ("slerp", vectors.slerp(pair, 0.3), vectors.slerp(pair)),
    ):
        assert merge(pair, how, bare if how in ("average", "slerp") else chosen).key == wanted.key, how
        assert merge(pair, how).key == default.key, how


@pytest.mark.parametrize(
    ("how", "given", "chosen", "message"),
    [
        ("tise", THREE, MergeOptions(), "no merge 'tise'; possible: weighted, average, ties, dare, slerp"),
        *((how, (), MergeOptions(), "no vectors to combine") for how in ("weighted", "average", "ties", "dare")),
        ("slerp", THREE, MergeOptions(), "slerp needs two vectors, given 3"),
        ("slerp", THREE[:2], MergeOptions(t=1.5), "t must be from 0 to 1, given 1.5"),
        ("slerp", THREE[:2], MergeOptions(t=math.nan), "t must be from 0 to 1, given nan"),
        ("slerp", (THREE[0], THREE[1] - THREE[1]), MergeOptions(), "one of the vectors is zero"),
        *((how, THREE, MergeOptions(density=0), "above 0 and at most 1: 0") for how in ("ties", "dare")),
        *((how, THREE, MergeOptions(density=1.1), "above 0 and at most 1: 1.1") for how in ("ties", "dare")),
        *((how, THREE, MergeOptions(density=math.nan), "above 0 and at most 1: nan") for how in ("ties", "dare")),
        *((how, THREE, MergeOptions((1, 2)), "2 weights for 3 vectors; give one") for how in WEIGHTED),
        *((how, THREE, MergeOptions((1, 2, math.inf)), "by inf; give a finite") for how in WEIGHTED),
        ("ties", THREE, MergeOptions((1, 0, 1)), "its weights must be positive"),
        ("ties", THREE, MergeOptions((1, -1, 1)), "its weights must be positive"),
    ],
)  # fmt: skip
def test_what_is_refused(how: str, given: Sequence[Vector], chosen: MergeOptions, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        merge(given, how, chosen)


@pytest.mark.parametrize("how", ["average", "slerp"])
def test_weights_are_refused_where_nothing_weighs(how: str) -> None:
    with pytest.raises(ArtifactError, match=f"merge '{how}' takes no weights"):
        vectors.merge([], how, vectors.MergeOptions(weights=[1, 2]))
