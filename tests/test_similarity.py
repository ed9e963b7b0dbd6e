"""SPoT's similarities, retrieval and weighted mean, against loops and by their properties."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rows
from softprompts.artifacts.vectors import similarity

HOWS = ("mean", "pairs")


def cosine(a: list[float], b: list[float]) -> float:
    """The cosine of two vectors, number by number; 0 with a vector of zeros."""
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0


def by_loops(one: Tensor, other: Tensor, how: str) -> float:
    """The similarity as section 4.1 writes it."""
    a, b = one.double().tolist(), other.double().tolist()
    if how == "pairs":
        return sum(cosine(x, y) for x in a for y in b) / (len(a) * len(b))
    return cosine(*([sum(column) / len(part) for column in zip(*part, strict=True)] for part in (a, b)))


@st.composite
def prompts(draw: st.DrawFn, count: int = 2) -> list[Tensor]:
    """Prompts of one width and any length, of any size, rows of zeros among them."""
    width = draw(st.integers(1, 5))
    found = []
    for _ in range(count):
        made = rows.random(draw(st.integers(0, 10**6)), draw(st.integers(1, 4)), width)
        made[torch.rand(len(made), generator=torch.Generator().manual_seed(len(made))) < 0.2] = 0
        found.append(made * 10.0 ** draw(st.integers(-30, 30)))
    return found


@settings(deadline=None, max_examples=60)
@given(pair=prompts(), how=st.sampled_from(HOWS), scale=st.floats(1e-6, 1e6))
def test_properties(pair: list[Tensor], how: similarity.SimilarityMeasure, scale: float) -> None:
    """As in the loops; symmetric; from -1 to 1; the size of a prompt and the order of its tokens do not count."""
    one, other = pair
    found = similarity.similarity(one, other, how)
    assert found == pytest.approx(by_loops(one, other, how), abs=1e-9)
    assert similarity.similarity(other, one, how) == pytest.approx(found, abs=1e-12)
    assert -1 <= found <= 1
    assert similarity.similarity(one.double() * scale, other, how) == pytest.approx(found, abs=1e-9)
    assert similarity.similarity(-one, other, how) == pytest.approx(-found, abs=1e-12)
    assert similarity.similarity(one.flip(0), other, how) == pytest.approx(found, abs=1e-9)
    if one.any() and how == "mean":
        assert similarity.similarity(one, one, how) == pytest.approx(1, abs=1e-12)


def test_the_two_ways_differ() -> None:
    """Of tokens of different sizes the mean is that of the large ones; pairs count all alike."""
    one, other = torch.tensor([[100.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert similarity.similarity(one, other, "mean") == pytest.approx(100 / math.hypot(100, 1))
    assert similarity.similarity(one, other, "pairs") == pytest.approx(0.5)
    assert similarity.similarity(one, one, "pairs") == pytest.approx(0.5)


@pytest.mark.parametrize("how", HOWS)
def test_matrix(how: similarity.SimilarityMeasure) -> None:
    every = [rows.random(i, 2 + i, 6) for i in range(4)]
    found = similarity.similarity_matrix(every, how)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    for i, one in enumerate(every):
        for j, other in enumerate(every):
            assert float(found[i, j]) == pytest.approx(by_loops(one, other, how), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(found=prompts(5), k=st.integers(1, 4), how=st.sampled_from(HOWS))
def test_retrieve_properties(found: list[Tensor], k: int, how: similarity.SimilarityMeasure) -> None:
    """The k most similar, best first, whatever the order they are given in; weights are their shares and sum to one."""
    target, sources = found[0], dict(zip("dbca", found[1:], strict=True))
    best = similarity.retrieve(target, sources, k, how)
    assert best == similarity.retrieve(target, dict(sorted(sources.items())), k, how)
    scores = {name: similarity.similarity(target, prompt, how) for name, prompt in sources.items()}
    assert [name for name, _, _ in best] == sorted(scores, key=lambda name: (-scores[name], name))[:k]
    assert math.fsum(weight for _, weight, _ in best) == pytest.approx(1, abs=1e-12)
    assert all(weight >= 0 and score == scores[name] for name, weight, score in best)
    total = sum(max(score, 0) for _, _, score in best)
    for _, weight, score in best:
        assert weight == pytest.approx(max(score, 0) / total if total else 1 / k)


def test_retrieve_in_a_case_that_can_be_checked_by_eye() -> None:
    target = torch.tensor([[1.0, 0.0]])
    sources = {
        "opposite": torch.tensor([[-1.0, 0.0]]),
        "same": torch.tensor([[3.0, 0.0]]),
        "across": torch.tensor([[0.0, 1.0]]),
        "near": torch.tensor([[3.0, 4.0]]),
        "also": torch.tensor([[6.0, 8.0]]),
    }
    assert similarity.retrieve(target, sources, 1) == [("same", 1.0, 1.0)]
    names, weights, scores = zip(*similarity.retrieve(target, sources, 3), strict=True)
    assert names == ("same", "also", "near"), "of two that are equally similar the first by name"
    assert scores == pytest.approx((1, 0.6, 0.6))
    assert weights == pytest.approx((1 / 2.2, 0.6 / 2.2, 0.6 / 2.2))
    names, weights, _ = zip(*similarity.retrieve(target, sources, 5), strict=True)
    assert names[3:] == ("across", "opposite")
    assert weights[3:] == (0, 0), "what points away is not mixed in"
    away = {name: sources[name] for name in ("across", "opposite")}
    assert [weight for _, weight, _ in similarity.retrieve(target, away, 2)] == [0.5, 0.5]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), weights=st.lists(st.floats(0, 1e3), min_size=1, max_size=4).filter(any))
def test_mean_is_rounded_once(seed: int, weights: list[float]) -> None:
    """In exact fractions, rounded to float32 at the end; only the ratio of weights counts."""
    every = [rows.random(seed + i, 2, 3) for i in range(len(weights))]
    found = similarity.weighted_mean(every, weights)
    assert found.dtype == torch.float32
    total = sum(map(Fraction, weights))
    for place in ((0, 0), (1, 2)):
        exact = sum(Fraction(w) * Fraction(float(p[place])) for w, p in zip(weights, every, strict=True)) / total
        assert float(found[place]) == pytest.approx(float(exact), rel=6e-8, abs=1e-15)
    torch.testing.assert_close(similarity.weighted_mean(every, [3 * w for w in weights]), found, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(similarity.weighted_mean(every), torch.stack(every).double().mean(0).float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: similarity.similarity(torch.ones(2, 3), torch.ones(2, 4)), r"given \[2, 3\] and \[2, 4\]"),
        (lambda: similarity.similarity(torch.ones(3), torch.ones(3)), r"must be \[P, D\]"),
        (lambda: similarity.similarity(torch.ones(0, 3), torch.ones(2, 3)), r"given \[0, 3\]"),
        (lambda: similarity.similarity(torch.ones(1, 3), torch.ones(2, 3), "max"), "no similarity 'max'"),
        (lambda: similarity.retrieve(torch.ones(1, 3), {"a": torch.ones(1, 3)}, 2), "number of sources, 1; given 2"),
        (lambda: similarity.retrieve(torch.ones(1, 3), {"a": torch.ones(1, 3)}, 0), "given 0"),
    ],
)
def test_what_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
