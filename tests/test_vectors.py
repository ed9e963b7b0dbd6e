"""Task prompt vectors: values, the laws of their algebra, measures, what is made of them, and what is refused."""

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

import local
import rows
import test_deep_runs
from artifacts import D, P, assert_equal, bits, fingerprint, trained
from softprompts.artifacts import artifact, vectors
from softprompts.artifacts.artifact import Artifact
from softprompts.artifacts.vectors import (
    Vector,
    apply,
    common_start,
    cosine,
    cosines,
    distances,
    norm,
    norm_ratio,
    task_vector,
    to_artifact,
)
from softprompts.config import parse
from softprompts.errors import ArtifactError, WrongBackboneError
from softprompts.methods import fold
from softprompts.methods.multitask import MultitaskPromptTuning
from softprompts.model import persistence
from softprompts.recipes.run import run as job
from softprompts.types import PromptInit, PromptSpec

START = rows.random(0, P, D)


def tuned(seed: int, start: Tensor = START, **changes: Any) -> Artifact:
    """A prompt that was trained from `start`."""
    return trained(start + rows.random(seed, *start.shape), start, **changes)


FOUR = tuple(task_vector(tuned(i, rows.random(10 + i, P, D), task=f"t{i}")) for i in range(1, 5))
"""Vectors of four tasks from four starts."""
BY_KEY = sorted((tuned(1), tuned(2)), key=lambda found: task_vector(found).key)


def numbers(*shape: int) -> st.SearchStrategy[Tensor]:
    """Any finite float32 numbers: huge, tiny, denormal, -0.0."""
    elements = st.floats(width=32, allow_nan=False, allow_infinity=False)
    return arrays(np.float32, shape, elements=elements).map(torch.tensor)


def coefficients() -> st.SearchStrategy[Any]:
    """What a vector may be multiplied by, of every type and sign, 0 among them."""
    return st.integers(-9, 9) | st.fractions(-9, 9, max_denominator=60) | st.floats(-1e3, 1e3)


@st.composite
def sums(draw: st.DrawFn) -> tuple[Vector, list[Fraction]]:
    """A sum of some of FOUR, and by what each of them is multiplied in it."""
    shares = [Fraction(0)] * 4
    found = FOUR[0] * 0
    for place, by in draw(st.lists(st.tuples(st.integers(0, 3), coefficients()), max_size=5)):
        shares[place] += Fraction(by)
        found = found + FOUR[place] * by
    return found, shares


def assert_same(one: Vector, other: Vector) -> None:
    assert one.key == other.key
    assert one.name == other.name
    assert bits(one.value) == bits(other.value)


def exact(start: Tensor, terms: Sequence[tuple[Fraction, Artifact]]) -> list[list[tuple[Fraction, Fraction]]]:
    """start + Σ coefficient · (tuned - initial) in fractions, number by number, each with the sum of all sizes."""
    found = []
    for i, row in enumerate(start.tolist()):
        line = []
        for j, first in enumerate(row):
            parts = [Fraction(first)]
            for by, one in terms:
                assert one.prompt is not None
                assert one.initial is not None
                parts += [by * Fraction(float(one.prompt[i, j])), -by * Fraction(float(one.initial[i, j]))]
            line.append((sum(parts, Fraction(0)), sum(map(abs, parts), Fraction(0))))
        found.append(line)
    return found


def assert_rounded_once(found: Tensor, start: Tensor, terms: Sequence[tuple[Fraction, Artifact]]) -> None:
    """`found` is start + Σ terms, with the error of one rounding to float32 and of float64 on the way."""
    assert found.dtype == torch.float32
    for row, wanted in zip(found.tolist(), exact(start, terms), strict=True):
        for number, (value, size) in zip(row, wanted, strict=True):
            allowed = abs(value) / 2**24 + Fraction(1, 2**150) + size / 2**49
            assert abs(Fraction(number) - value) <= allowed


# Values


@settings(deadline=None, max_examples=60)
@given(after=numbers(2, 3), start=numbers(2, 3), halves=st.integers(-8, 8))
@case(torch.tensor([[3.4e38, -0.0, 1e-45]]), torch.tensor([[-3.4e38, 0.0, -1e-40]]), 1)
@case(torch.tensor([[0.1, 1.0, -0.0]]), torch.tensor([[1e30, 1e-30, -0.0]]), -1)
def test_scale_one_is_the_trained_prompt_and_zero_the_start(after: Tensor, start: Tensor, halves: int) -> None:
    """Bit for bit with any numbers, also where the scale and the vector's coefficient make one together."""
    one = task_vector(trained(after, start))
    assert bits(apply(one, start)) == bits(after)
    assert bits(apply(one, start, 0)) == bits(start)
    assert bits(apply(one - one, start)) == bits(start)
    assert bits(apply(-one, start, -1)) == bits(after)
    scale = Fraction(2) ** halves / 3
    assert bits(apply(one * (1 / scale), start, scale)) == bits(after)
    assert bits(to_artifact(one, start).require_prompt("")) == bits(after)


def test_what_is_applied_is_not_the_artifact_itself() -> None:
    """To change the result in place must not change the trained prompt, or its start."""
    found = tuned(1)
    one = task_vector(found)
    for scale in (1, 0):
        apply(one, START, scale).zero_()
    one_more = to_artifact(one, START)
    one_more.require_prompt("").zero_()
    assert one_more.initial is not None
    one_more.initial.zero_()
    assert found.require_prompt("").equal(START + rows.random(1, P, D))
    assert START.equal(rows.random(0, P, D))
    assert task_vector(found).value.any()


@settings(deadline=None, max_examples=60)
@given(
    starts=st.lists(numbers(1, 3).map(lambda t: t.clamp(-1e30, 1e30)), min_size=3, max_size=3),
    afters=st.lists(numbers(1, 3).map(lambda t: t.clamp(-1e30, 1e30)), min_size=3, max_size=3),
    by=st.lists(coefficients(), min_size=3, max_size=3),
    scale=coefficients(),
    own=st.booleans(),
)
def test_apply_is_rounded_once(
    starts: list[Tensor], afters: list[Tensor], by: list[Any], scale: Any, own: bool
) -> None:
    """In exact fractions, rounded to float32 at the end, on another start and on that of a summand."""
    found = [trained(after, start) for after, start in zip(afters, starts, strict=True)]
    total = sum(
        (task_vector(one) * factor for one, factor in zip(found[1:], by[1:], strict=True)),
        task_vector(found[0]) * by[0],
    )
    start = starts[0] if own else torch.tensor([[1.0, -2.5, 1e-20]])
    terms = [(Fraction(factor) * Fraction(scale), one) for factor, one in zip(by, found, strict=True)]
    assert_rounded_once(apply(total, start, scale), start, terms)


def test_the_value_is_the_difference_in_float64() -> None:
    """Where float32 would lose it."""
    after, start = torch.tensor([[1.0, 3.4e38]]), torch.tensor([[1e-8, -3.4e38]])
    found = task_vector(trained(after, start)).value
    assert found.dtype == torch.float64
    assert found.tolist() == [[1 - float(start[0, 0]), 2 * float(after[0, 1])]]
    assert found[0, 0] != 1


# The algebra


@settings(deadline=None, max_examples=60)
@given(x=sums(), y=sums(), z=sums(), p=coefficients(), q=coefficients())
def test_laws(x: Any, y: Any, z: Any, p: Any, q: Any) -> None:
    """Exactly, in the key and in every bit of the value; and the value is what the coefficients say."""
    (x, shares), (y, _), (z, _) = x, y, z
    wanted = sum(float(share) * one.value for share, one in zip(shares, FOUR, strict=True))
    torch.testing.assert_close(x.value, wanted, rtol=1e-12, atol=1e-10)
    assert {part.key: part.coefficient for part in x.summands} == {
        one.summands[0].key: share for one, share in zip(FOUR, shares, strict=True) if share
    }
    assert_same(x + y, y + x)
    assert_same((x + y) + z, x + (y + z))
    assert_same(x - y, -(y - x))
    assert_same(x - y, x + y * -1)
    minus = -x
    assert_same(-minus, x)
    assert_same((x + y) * p, x * p + y * p)
    assert_same(x * (Fraction(p) + Fraction(q)), x * p + x * q)
    assert_same(x * p * q, x * (Fraction(p) * Fraction(q)))
    assert_same(p * x, x * p)
    assert_same(x + y - y, x)
    assert (x.key == y.key) == ((x - y).summands == ())
    none = x - x
    assert none.summands == ()
    assert none.name == "0"
    assert not none.value.any()
    assert_same(none, FOUR[0] * 0)


def test_a_sum_of_one_task_with_itself_at_one_half_is_the_single() -> None:
    one = task_vector(tuned(1))
    for twice in ((one + one) * 0.5, one * 0.5 + 0.5 * one, vectors.average([one, one]), vectors.average([one])):
        assert_same(twice, one)
        assert bits(apply(twice, START)) == bits(tuned(1).require_prompt(""))
    assert_same(vectors.weighted([one, one], [0.25, 0.75]), one)


def test_thirds_are_exact() -> None:
    """Not only what a float can hold: three thirds are one, and 0.1 is ten times what 0.01 is, as text says it."""
    one = FOUR[0]
    third = one * Fraction(1, 3)
    assert_same(third + third + third, one)
    assert_same(vectors.average([one, FOUR[1], one]) * 3, one * 2 + FOUR[1])
    by_text = vectors.evaluate_expression("0.1*a + 0.2*a - 0.3*a", lambda name: one)
    assert by_text.summands == ()


def test_the_order_of_many_summands() -> None:
    """Whatever the order and the brackets: key, name, bits of the value, and the artifact made of it."""
    parts = [one * by for one, by in zip(FOUR, (1, -0.3, Fraction(2, 7), 0.7), strict=True)]
    first = to_artifact(parts[0] + parts[1] + parts[2] + parts[3], START, 0.9)
    found = []
    for order in itertools.permutations(parts):
        for total in (order[0] + order[1] + order[2] + order[3], (order[0] + order[1]) + (order[2] + order[3])):
            found.append(to_artifact(total, START, 0.9))
    for one in found:
        assert_equal(first, one)
    assert first.digest != to_artifact(parts[0] + parts[1] + parts[2], START, 0.9).digest


def test_one_prompt_under_two_names() -> None:
    """It is one summand, and what it is called hangs on the names, not on which came first."""
    found = tuned(1)
    one, other = task_vector(found, "movies"), task_vector(found, "films")
    assert one.key == other.key
    assert len((one + other).summands) == 1
    assert (one + other).name == (other + one).name
    assert_equal(to_artifact(one + other, START), to_artifact(other + one, START))
    renamed = task_vector(dataclasses.replace(found, task="zebra"), "movies")
    assert_equal(to_artifact(one + renamed, START), to_artifact(renamed + one, START))


def test_prompts_that_differ_in_their_start_alone_are_two() -> None:
    """Their artifacts have one digest."""
    after = rows.random(1, P, D)
    one, other = task_vector(trained(after, START)), task_vector(trained(after, START * 2))
    assert one.key != other.key
    assert one.parents == other.parents
    assert (one - other).value.equal(START.double())
    assert_equal(to_artifact(one - other, START), to_artifact(-other + one, START))


@pytest.mark.parametrize(
    ("by", "name"),
    [
        ((1, 1), "a + b"),
        ((-1, 0.5), "-a + 0.5*b"),
        ((1, -1), "a - b"),
        ((-0.25, -2), "-0.25*a - 2*b"),
        ((0, 3), "3*b"),
        ((0, 0), "0"),
        ((Fraction(1, 4), 1e-5), "0.25*a + 1e-05*b"),
    ],
)
def test_a_sum_is_named_as_people_write_it(by: tuple[Any, Any], name: str) -> None:
    """In the order of the prompts' keys."""
    one, other = (task_vector(found, word) for found, word in zip(BY_KEY, "ab", strict=True))
    assert (other * by[1] + one * by[0]).name == name


@pytest.mark.parametrize("name", ["mnli + sst2", "my runs/a", "a*b", "-a", "+a", "f(x)", "2", "1e5", "a + -b", "0.5*a"])
def test_a_name_that_looks_like_a_sum_is_quoted(name: str) -> None:
    """A sum's own name is one: what was made of mnli + sst2 counts half as a whole."""
    one, other = task_vector(tuned(1), name), task_vector(tuned(2), "other")
    assert vectors.parse_expression((one * 0.5 - other).name) == {name: Fraction(1, 2), "other": Fraction(-1)}
    assert vectors.parse_expression((-one).name) == {name: Fraction(-1)}


@pytest.mark.parametrize(
    "by", [math.nan, math.inf, -math.inf, 10**400, Fraction(10**5000)], ids=lambda by: type(by).__name__
)
def test_no_vector_is_multiplied_by_what_is_no_number(by: Any) -> None:
    with pytest.raises(ArtifactError, match="give a finite number"):
        FOUR[0] * by
    with pytest.raises(ArtifactError, match="give a finite number"):
        apply(FOUR[0], START, by)


def test_coefficients_that_grow_beyond_all_numbers() -> None:
    for grow in (lambda one: one * 1e200 * 1e200, lambda one: one * 1.5e308 + one * 1.5e308):
        with pytest.raises(ArtifactError, match="give a finite number"):
            grow(FOUR[0])


@pytest.mark.parametrize("what", [1, "a", None, torch.ones(P, D)], ids=lambda what: type(what).__name__)
def test_vectors_add_to_vectors_and_multiply_by_numbers_only(what: Any) -> None:
    one = FOUR[0]
    for call in (lambda: one + what, lambda: one - what, lambda: what - one):
        with pytest.raises(TypeError):
            call()
    for factor in (one, what):
        if factor is not one and isinstance(factor, int):
            continue
        with pytest.raises(TypeError):
            one * factor


# Rows that never moved


@settings(deadline=None, max_examples=40)
@given(
    dead=st.sets(st.integers(0, 3), min_size=1, max_size=3),
    by=st.lists(coefficients(), min_size=3, max_size=3),
    huge=numbers(4, 2),
)
def test_dead_rows_are_exactly_zero_in_any_sum(dead: set[int], by: list[Any], huge: Tensor) -> None:
    found = []
    for seed in range(3):
        start = huge * (0.3 + seed)
        start[start.isinf()] = 1
        after = rows.random(seed, 4, 2)
        after[list(dead)] = start[list(dead)]
        found.append(trained(after, start))
    total = task_vector(found[0]) * by[0] + task_vector(found[1]) * by[1] + task_vector(found[2]) * by[2]
    for one in (task_vector(found[0]), total):
        assert bits(one.value[list(dead)]) == bits(torch.zeros(len(dead), 2, dtype=torch.float64))
    other = rows.random(9, 4, 2)
    assert apply(total, other)[list(dead)].equal(other[list(dead)])
    assert to_artifact(total, other).require_prompt("")[list(dead)].equal(other[list(dead)])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rows_without_a_gradient_are_dead_unless_decay_moves_them(decay: float) -> None:
    """Half the prompt of a PEFT seq2seq model never gets one; decay made a tenth of the start of it (section 3.4.1)."""
    prompt = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.AdamW([prompt], lr=0.05, weight_decay=decay)
    for _ in range(20):
        optimizer.zero_grad()
        (prompt[:2] - 3).square().sum().backward()
        optimizer.step()
    found = task_vector(trained(prompt.detach(), START)).value
    assert found[:2].all()
    if decay:
        torch.testing.assert_close(found[2:], ((1 - 0.05 * decay) ** 20 - 1) * START[2:].double(), rtol=1e-4, atol=1e-7)
    else:
        assert bits(found[2:]) == bits(torch.zeros(P - 2, D, dtype=torch.float64))


# A planted truth: gradient descent on ‖P - P_t‖²


def descend(start: Tensor, target: Tensor, steps: int = 60, rate: float = 0.1) -> Vector:
    """What training makes of `start` where the task's best prompt is `target`."""
    prompt = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad((prompt - target).square().sum(), prompt)
        prompt = (prompt - rate * gradient).detach().requires_grad_()
    return task_vector(trained(prompt.detach(), start))


def orthogonal(count: int) -> list[Tensor]:
    """Matrices [P, D] of length one at right angles."""
    basis = torch.linalg.qr(rows.random(3, P * D, count).double())[0]
    return [column.reshape(P, D).float() for column in basis.T]


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0, 3.0, 100.0])
def test_two_starts_give_one_vector_only_where_the_task_is_far(size: float) -> None:
    """τ = P_t - start: with everything at right angles, cos(τ1, τ2) = ‖P_t‖² / (‖P_t‖² + ‖start‖²)."""
    truth, first, second = orthogonal(3)
    one, other = descend(first, truth * size), descend(second, truth * size)
    found = cosine(one.value, other.value)
    assert found == pytest.approx(size**2 / (size**2 + 1), abs=1e-4)
    assert (found > 0.99) == (size >= 100)
    assert norm_ratio(one.value, first) == pytest.approx(math.hypot(size, 1), rel=1e-4), "the figure that tells"


@pytest.mark.parametrize("size", [0.3, 1.0, 100.0])
def test_the_sign_of_the_confound(size: float) -> None:
    """Every vector holds -start: one start makes unlike tasks look alike, opposite starts make one task look unlike."""
    truth, unlike, start = orthogonal(3)
    same = cosine(descend(start, truth * size).value, descend(start, unlike * size).value)
    assert same == pytest.approx(1 / (size**2 + 1), abs=1e-4)
    assert same > 0
    opposite = cosine(descend(start, truth * size).value, descend(-start, truth * size).value)
    assert opposite == pytest.approx((size**2 - 1) / (size**2 + 1), abs=1e-4)
    own = descend(start, truth * size)
    torch.testing.assert_close(cosine(own.value, start.double()), -1 / math.hypot(size, 1), atol=1e-4, rtol=0)


# Measures


def length(numbers: Sequence[float]) -> float:
    return math.sqrt(math.fsum(number * number for number in numbers))


def angle(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of two lists of numbers; 0 with a list of zeros."""
    sizes = length(one) * length(other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / sizes if sizes else 0.0


def by_loops(one: Tensor, other: Tensor, how: str) -> float:
    a, b = one.double().tolist(), other.double().tolist()
    if how == "flat":
        return angle([number for row in a for number in row], [number for row in b for number in row])
    if how == "mean":
        return angle(*([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in (a, b)))
    alive = [(x, y) for x, y in zip(a, b, strict=True) if any(x) and any(y)]
    return sum(angle(x, y) for x, y in alive) / len(alive) if alive else 0.0


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two matrices of one shape and any size, dead rows among them."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    found = []
    for _ in range(2):
        one = rows.random(draw(st.integers(0, 10**6)), *shape)
        one[list(draw(st.sets(st.integers(0, shape[0] - 1))))] = 0
        found.append(one * 10.0 ** draw(st.integers(-20, 20)))
    return found[0], found[1]


@settings(deadline=None, max_examples=60)
@given(pair=pairs(), how=st.sampled_from(sorted(vectors.COSINES)))
def test_cosines_equal_loops(pair: tuple[Tensor, Tensor], how: Any) -> None:
    one, other = pair
    found = cosine(one, other, how)
    assert found == pytest.approx(by_loops(one, other, how), abs=1e-9)
    assert -1 <= found <= 1
    assert cosine(other, one, how) == pytest.approx(found, abs=1e-12)
    assert cosine(-one, other, how) == pytest.approx(-found, abs=1e-12)
    assert cosine(one.double() * 7, other, how) == pytest.approx(found, abs=1e-12)
    if one.any():
        assert cosine(one, one, "flat") == pytest.approx(1, abs=1e-12)
        assert cosine(one, one, "rows") == pytest.approx(1, abs=1e-12)


def test_the_three_cosines_differ() -> None:
    """In a case that can be checked by eye: the large row decides the first, the sum the second, each row the third."""
    one = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    other = torch.tensor([[4.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    assert cosine(one, other, "flat") == pytest.approx(12 / (math.sqrt(10) * math.sqrt(67)))
    assert cosine(one, other, "mean") == pytest.approx((3 * 10 + 1 * 5) / (math.sqrt(10) * math.sqrt(125)))
    assert cosine(one, other, "rows") == pytest.approx(0.5), "the third row never moved in one of them"
    assert cosine(one[2:], other[2:], "rows") == 0
    assert cosine(one, other) == cosine(one, other, "flat")


def test_dead_rows_leave_every_cosine_alone() -> None:
    one, other = rows.random(1, 3, 4), rows.random(2, 3, 4)
    dead = torch.zeros(6, 4)
    longer = [torch.cat([dead, value]) for value in (one, other)]
    for how in vectors.COSINES:
        assert cosine(*longer, how) == pytest.approx(cosine(one, other, how), abs=1e-12)


def test_matrices_of_cosines_and_distances() -> None:
    every = [rows.random(i, 3, 4) for i in range(3)]
    for how in vectors.COSINES:
        found = cosines(every, how)
        assert found.dtype == torch.float64
        assert found.tolist() == [[pytest.approx(by_loops(a, b, how), abs=1e-12) for b in every] for a in every]
    far = distances(every)
    assert far.dtype == torch.float64
    assert far.diag().tolist() == [0, 0, 0]
    for a, b in itertools.product(range(3), repeat=2):
        wanted = length([x - y for x, y in zip(every[a].flatten().tolist(), every[b].flatten().tolist(), strict=True)])
        assert float(far[a, b]) == pytest.approx(wanted, abs=1e-12)
    near = torch.tensor([[1.0]]), torch.tensor([[1 + 2**-20]])
    assert float(distances(near)[0, 1]) == 2**-20, "taken in float64"


def test_norms() -> None:
    value = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert norm(value) == 5
    assert norm_ratio(value, torch.tensor([[0.0, 2.0], [0.0, 0.0]])) == 2.5
    assert norm_ratio(value, torch.zeros(2, 2)) is None
    assert norm_ratio(torch.zeros(2, 2), torch.zeros(2, 2)) is None
    assert norm_ratio(torch.zeros(2, 2), value) == 0
    assert norm(torch.full((2, 2), 1e30)) == pytest.approx(2e30), "beyond what float32 could square"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine(torch.ones(2, 3), torch.ones(3, 3)), r"given \[2, 3\] and \[3, 3\]"),
        (lambda: cosine(torch.ones(3), torch.ones(3)), r"two matrices \[P, D\], given \[3\] and \[3\]"),
        (lambda: cosine(torch.ones(2, 3), torch.ones(2, 3), "max"), "no cosine 'max'; possible: flat, mean, rows"),
        (lambda: distances([torch.ones(2, 3), torch.ones(1, 3)]), r"\[2, 3\] and \[1, 3\]"),
    ],
)
def test_what_cannot_be_measured(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        call()


# What is refused

OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "length": (
        {"prompt": rows.random(1, P + 1, D), "initial": rows.random(2, P + 1, D)},
        r"shape is \[5, 8\] and \[6, 8\]",
    ),
    "width": (
        {"prompt": rows.random(1, P, D + 2), "initial": rows.random(2, P, D + 2)},
        r"shape is \[5, 8\] and \[5, 10\]",
    ),
    "site": ({"site": "decoder"}, "site is input and decoder"),
    "mode": ({"mode": "add"}, "mode is replace and add"),
    "placement": ({"placement": "after_start"}, "placement is first and after_start"),
    "family": ({"family": "masked"}, "family is causal and masked"),
    "architecture": (
        {"fingerprint": fingerprint(architecture={**fingerprint().architecture, "hidden_size": 16})},
        "another architecture: hidden_size",
    ),
    "weights": (
        {"fingerprint": fingerprint(sketch=fingerprint().sketch * 1.01)},
        "made for other weights: sketch distance",
    ),
    "heads": (
        {"heads": {"score.weight": torch.ones(2, D)}},
        "its own classification head; train with model.head: lm",
    ),
}
COMBINE: dict[str, Callable[[Vector, Vector], Any]] = {
    "+": lambda one, other: one + other,
    "-": lambda one, other: one - other,
    **{how: lambda one, other, how=how: vectors.merge([one, other], how) for how in vectors.MERGES},
}


@pytest.mark.parametrize("how", COMBINE)
@pytest.mark.parametrize("what", OTHER)
def test_prompts_that_do_not_belong_together(what: str, how: str) -> None:
    """The message names both, and what differs; the other way round as well."""
    changes, message = OTHER[what]
    one, other = task_vector(tuned(1), "movies"), task_vector(tuned(2, **changes), "tweets")
    with pytest.raises(ArtifactError, match=message) as caught:
        COMBINE[how](one, other)
    told = str(caught.value)
    assert "\n" not in told
    assert {"movies", "tweets"} <= set(re.findall(r"\w+", told))
    with pytest.raises(ArtifactError):
        COMBINE[how](other, one)


def test_no_refusal_advises_an_option_that_is_not_there() -> None:
    """A run may be told to use a prompt on other weights; a sum may not."""
    other = task_vector(tuned(2, **OTHER["weights"][0]))
    with pytest.raises(WrongBackboneError) as caught:
        task_vector(tuned(1)) + other
    assert "--allow-other-weights" not in str(caught.value)


def test_a_prompt_that_knows_no_weights_hides_nobody_elses() -> None:
    """What PEFT wrote fits any weights, but two others that it stands between must still fit each other."""
    for seed in range(4):  # whichever of the digests is first
        free = task_vector(tuned(seed, fingerprint=None, family=None, backbone=""), "free")
        one, away = task_vector(tuned(5), "one"), task_vector(tuned(6, **OTHER["weights"][0]), "away")
        for three in itertools.permutations([free, one, away]):
            with pytest.raises(WrongBackboneError, match="made for other weights"):
                three[0] + three[1] + three[2]
            for how in ("weighted", "average", "ties", "dare"):
                with pytest.raises(WrongBackboneError, match="made for other weights"):
                    vectors.merge(three, how)
        for pair in ((free, one), (one, free)):
            for total in (pair[0] + pair[1], vectors.ties(pair)):
                found = to_artifact(total, START)
                assert found.fingerprint is not None, "what is made of both knows what the one knows"
                assert found.family == "causal"
                assert found.backbone == "smollm2-135m"


def test_prompts_that_know_no_weights_must_name_one_model() -> None:
    """PEFT's files say what their model is called, and nothing more of it."""
    gpt, opt, silent, known = (
        task_vector(tuned(seed, fingerprint=None, backbone=name), f"for {name}")
        if name != "ours"
        else task_vector(tuned(seed), "ours")
        for seed, name in enumerate(("gpt2", "opt", "", "ours"))
    )
    with pytest.raises(
        WrongBackboneError, match=r"gpt2.* and .*opt.* cannot be combined: one was made for gpt2, the other"
    ):
        gpt + opt
    for other in (gpt, silent, known):
        assert len((gpt * 2 + other).parents) == 1 + (other is not gpt)


def test_a_head_may_be_scaled_but_not_added() -> None:
    one = task_vector(tuned(1, heads={"score.weight": torch.ones(2, D)}))
    assert to_artifact((one + one) * 0.25, START).heads["score.weight"].equal(torch.ones(2, D))


def test_start_of_another_shape() -> None:
    with pytest.raises(ArtifactError, match=r"the start is \[4, 8\] and the vector \[5, 8\]: give a start of the same"):
        apply(FOUR[0], START[:-1])
    with pytest.raises(ArtifactError, match=r"the start is \[5, 4\]"):
        to_artifact(FOUR[0], START[:, :4])
    start = tuned(1, rows.random(1, P + 1, D))
    with pytest.raises(ArtifactError, match=r"t1 and there cannot be combined: their shape is \[5, 8\] and \[6, 8\]"):
        vectors.check_start(start, FOUR[0], "there")
    with pytest.raises(WrongBackboneError, match=r"t1 and there cannot be combined: .*other weights"):
        vectors.check_start(tuned(1, **OTHER["weights"][0]), FOUR[0], "there")
    vectors.check_start(tuned(1), FOUR[0], "there")


def test_a_prompt_that_depends_on_the_text_has_no_vector() -> None:
    found = tuned(1, prompt=None, method="attempt", state={"x": torch.ones(1)})
    with pytest.raises(ArtifactError, match="movies holds no plain prompt: attempt makes one from each text"):
        task_vector(found, "movies")


def test_pefts_files_do_not_say_where_a_prompt_began(tmp_path: Path) -> None:
    """The message says how to name the start; with one it is a vector like others."""
    path = artifact.save(tuned(1), tmp_path / "theirs")
    for name in ("softprompts.json", "softprompts.safetensors"):
        (path / name).unlink()
    theirs = artifact.load(path)
    with pytest.raises(ArtifactError, match="softprompts vector make theirs --start START --out DIRECTORY") as caught:
        task_vector(theirs)
    assert "PEFT does not store the start" in str(caught.value)
    named = dataclasses.replace(theirs, initial=START)
    assert bits(task_vector(named).value) == bits(task_vector(tuned(1)).value)


# What is made


def test_a_multitask_prompt_is_folded_first(tmp_path: Path) -> None:
    """Its vector is of the product of shared prompt and factors, and what is made of it is plain prompt tuning."""
    spec = PromptSpec(P, D, D)
    method = MultitaskPromptTuning(MultitaskPromptTuning.Config(), spec, PromptInit(START))
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.add_(rows.random(i + 1, *parameter.shape))
    state = {name: value.clone() for name, value in method.state_dict().items()}
    shared, columns, factors = (state[name].double() for name in ("shared.prompt", "columns", "rows"))
    prompt = fold(method)
    assert prompt is not None
    found = trained(
        prompt,
        START,
        task="mnli",
        method="multitask-prompt-tuning",
        state=method.state_dict(),
        options={"ranks": 1},
    )
    one = task_vector(artifact.load(artifact.save(found, tmp_path / "mnli")))
    torch.testing.assert_close(one.value, shared * (columns @ factors) - START.double(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(one.value, shared - START.double(), atol=1e-2)
    plain = to_artifact(one, START)
    assert bits(plain.require_prompt("")) == bits(found.require_prompt(""))
    assert (plain.method, plain.options, list(plain.state)) == ("prompt-tuning", {}, ["prompt"])
    again = fold(persistence.rebuild(artifact.load(artifact.save(plain, tmp_path / "plain")), spec, "plain"))
    assert again is not None
    assert again.equal(found.require_prompt(""))


@pytest.mark.parametrize("case", ["lstm", "mlp", "residual", "tokens", "low"])
def test_prompts_of_networks_are_folded_first(tmp_path: Path, case: str) -> None:
    """The vector is of what the network made before training and after it; on its own start it is the prompt."""
    local.run_values(tmp_path)
    run = parse(test_deep_runs.values(tmp_path, tmp_path / "out", test_deep_runs.PROMPTS[case], max_steps=2))
    begun = job.prepare(run).model.registry.method("colors")
    job.run(run)
    found = artifact.load(tmp_path / "out" / "prompt")
    start = fold(begun)
    assert start is not None
    assert found.initial is not None
    assert bits(found.initial) == bits(start)
    one = task_vector(found)
    assert bits(apply(one, found.initial)) == bits(found.require_prompt(""))
    assert bits(one.value) == bits(found.require_prompt("").double() - start.double())
    assert one.value.any(1).all()
    begun.load_state_dict(dict(found.state))
    assert bits(found.require_prompt("")) == bits(fold(begun))  # type: ignore[arg-type]
    assert bits(to_artifact(one, found.initial).require_prompt("")) == bits(found.require_prompt(""))


def test_what_is_made_says_what_of(tmp_path: Path) -> None:
    """Digests of the parents, sorted, and each with its coefficient, through save and load."""
    config = {"model": {"name": "m"}, "evaluation": {"by": "rank"}, "task": {"name": "x"}, "training": {"max_steps": 3}}
    found = [tuned(i, rows.random(i, P, D), task=f"t{i}", config=config, parents=("a" * 64,)) for i in range(3)]
    parts = [task_vector(one, f"runs/{one.task}") for one in found]
    total = parts[0] - parts[1] * 0.5 + parts[2] * 2
    one = to_artifact(total, START, 0.5)
    assert one.parents == tuple(sorted(part.digest for part in found)) == total.parents
    assert one.config["vector"]["sum"] == (total * 0.5).name
    told = {part["name"]: part for part in one.config["vector"]["parts"]}
    by = {"runs/t0": 0.5, "runs/t1": -0.25, "runs/t2": 1.0}
    assert {name: part["coefficient"] for name, part in told.items()} == by
    for part, name in zip(found, by, strict=True):
        assert (told[name]["task"], told[name]["parents"]) == (part.task, [part.digest])
    assert one.task == "t0 + t1 + t2"
    assert one.scores == {}
    assert one.template == {**found[0].template, "name": "t0 + t1 + t2"}, "all read their rows alike"
    assert one.config == {"model": {"name": "m"}, "evaluation": {"by": "rank"}, "vector": one.config["vector"]}
    loaded = artifact.load(artifact.save(one, tmp_path / "made"))
    assert_equal(one, loaded)
    assert json.loads((tmp_path / "made" / "softprompts.json").read_text())["parents"] == list(one.parents)
    assert to_artifact(parts[0], START).config["task"] == {"name": "x"}, "of one task it is that task's prompt"
    assert to_artifact(parts[0], START).task == "t0"


def test_tasks_that_read_their_rows_otherwise_have_no_format_together() -> None:
    one = task_vector(tuned(1, task="a", template={"name": "a", "template": "{text}"}))
    other = task_vector(tuned(2, task="b", template={"name": "b", "template": "{x}"}))
    alike = task_vector(tuned(3, task="c", template={"name": "c", "template": "{text}"}))
    assert to_artifact(one + other, START).template is None
    assert to_artifact(one + alike, START).template == {"name": "a + c", "template": "{text}"}
    for three in itertools.permutations([one, other, alike]):
        found = to_artifact(three[0] + three[1] + three[2], START)
        assert (found.task, found.template) == ("a + b + c", None)
    assert to_artifact(
        one + task_vector(tuned(4, task="a", template={"name": "a", "template": "{text}"})), START
    ).template == {
        "name": "a",
        "template": "{text}",
    }


@settings(deadline=None, max_examples=40)
@given(total=sums(), scale=coefficients(), seed=st.integers(0, 1000))
def test_what_is_made_is_a_vector_again(total: Any, scale: Any, seed: int) -> None:
    """And equals the sum, but for the rounding of the prompt."""
    one, start = total[0], rows.random(seed, P, D)
    found = to_artifact(one, start, scale)
    assert bits(found.initial) == bits(start)
    assert bits(found.state["prompt"]) == bits(found.require_prompt(""))
    again = task_vector(found)
    wanted = (one * scale).value
    allowed = found.require_prompt("").double().abs() / 2**24 + wanted.abs() * 1e-13 + 1e-15
    assert bool(((again.value - wanted).abs() <= allowed).all())
    assert again.parents == (found.digest,)
    assert bits(apply(again, start)) == bits(found.require_prompt(""))


def test_the_start_that_all_have_in_common() -> None:
    one, other, away = task_vector(tuned(1)), task_vector(tuned(2)), FOUR[0]
    found = common_start(one + other * 0.5)
    assert found is not None
    assert found.equal(START)
    assert common_start(one + other + away) is None
    assert common_start(one + other + away - away) is not None
    assert common_start(one - one) is None
    assert common_start(vectors.ties([one, other])) is None
    assert common_start(vectors.ties([one, other]) + one) is None


def test_on_the_common_start_a_sum_begins_at_one_prompt_and_adds_what_the_other_learned() -> None:
    one, other = tuned(1), tuned(2)
    terms = [(Fraction(1), one), (Fraction(1), other)]
    assert_rounded_once(apply(task_vector(one) + task_vector(other), START), START, terms)


def test_the_average_of_twelve_seeds_in_any_order() -> None:
    every = [task_vector(tuned(i, rows.random(40 + i, P, D)), f"seed{i}") for i in range(12)]
    first = vectors.average(every)
    shuffler = random.Random(0)
    for _ in range(5):
        shuffler.shuffle(every)
        assert_same(vectors.average(every), first)
    torch.testing.assert_close(first.value, torch.stack([one.value for one in every]).mean(0), rtol=1e-12, atol=1e-12)
    assert to_artifact(first, START).task == "sst2"
