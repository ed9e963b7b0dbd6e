"""Decomposed prompt tuning: the nearest start, the product and its gradients, size, rates, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rows
import test_together as together
import tiny
from closeness import assert_close
from prompted import prompted, rates_of, rows_of, several
from rows import INPUT
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.methods import build, fold
from softprompts.methods.low_rank import LowRankPromptTuning
from softprompts.types import PromptInit, PromptSpec

P, D = 8, 20
TASKS = ("one", "two")


def made(start: Tensor | None = None, rank: int = 3, tasks: tuple[str, ...] = TASKS) -> Any:
    start = rows.random(0, P, D) if start is None else start
    spec = PromptSpec(len(start), start.shape[1], start.shape[1])
    return several(LowRankPromptTuning, LowRankPromptTuning.Config(rank=rank), spec, PromptInit(start), tasks)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_it_begins_at_the_nearest_matrix_of_its_rank(rank: int) -> None:
    """As far from the start as the singular values that are left out, and as no other of that rank."""
    start = rows.random(0, P, D)
    found = fold(made(rank=rank)["one"])
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == rank
    left, values, right = np.linalg.svd(start.double().numpy())
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert_close(found, torch.from_numpy(expected).float())
    distance = float((found - start).norm())
    assert distance == pytest.approx(float(np.sqrt((values[rank:] ** 2).sum())), rel=1e-5)
    for seed in range(5):
        other = found + 0.1 * (rows.random(seed, P, rank) @ rows.random(seed + 9, rank, rank) @ found[:rank])
        assert torch.linalg.matrix_rank(other, rtol=1e-5) == rank
        assert float((other - start).norm()) > distance


@torch.no_grad()
@pytest.mark.parametrize(
    ("start", "rank"),
    [
        (rows.random(0, P, D), P),
        (rows.random(0, P, D), P + 4),
        (rows.random(0, 30, 6), 6),
        (rows.random(0, P, 2) @ rows.random(1, 2, D), 2),
        (rows.random(0, P, 2) @ rows.random(1, 2, D), 5),
        (torch.zeros(P, D), 3),
        (rows.random(0, 1, D), 10),
    ],
    ids=["full", "more than tokens", "as wide", "low", "more than its rank", "zeros", "one token"],
)
def test_it_begins_at_a_start_of_no_higher_rank(start: Tensor, rank: int) -> None:
    method = made(start, rank)["one"]
    assert method.columns.shape == (len(start), rank)
    assert method.rows.shape == (rank, start.shape[1])
    assert_close(fold(method), start)
    torch.testing.assert_close(method.columns.square().mean(0), torch.ones(rank), atol=1e-5, rtol=0)
    assert method.columns.isfinite().all()


@torch.no_grad()
def test_the_prompt_is_the_product() -> None:
    methods = made()
    for i, parameter in enumerate(methods.parameters()):
        parameter.add_(rows.random(30 + i, *parameter.shape))
    found = rows_of(methods, [1, 0])
    for row, task in ((0, "two"), (1, "one")):
        method = methods[task]
        columns, factors = method.columns.tolist(), method.rows.tolist()
        for i in range(P):
            for d in range(D):
                expected = sum(columns[i][k] * factors[k][d] for k in range(3))
                assert float(found[row, i, d]) == pytest.approx(expected, abs=1e-5)
        assert torch.equal(fold(method), found[row])
        single = made(torch.zeros(P, D), tasks=(task,))[task]
        single.load_state_dict(method.state_dict())
        assert torch.equal(fold(single), found[row])


@pytest.mark.parametrize("rank", [3, P + 2])
def test_gradients_are_those_of_the_formula_and_reach_every_factor(rank: int) -> None:
    methods, gradient = made(rank=rank, tasks=("one",)).double(), rows.random(5, P, D).double()
    (rows_of(methods, [0])[0] * gradient).sum().backward()
    columns, factors = methods["one"].columns, methods["one"].rows
    torch.testing.assert_close(columns.grad, gradient @ factors.detach().T)
    torch.testing.assert_close(factors.grad, columns.detach().T @ gradient)
    assert (factors.grad.abs().sum(1) > 0).all(), "also of those that begin at zero"
    zero = made(torch.zeros(P, D), tasks=("one",)).double()
    (rows_of(zero, [0])[0] * gradient).sum().backward()
    assert (zero["one"].rows.grad.abs().sum(1) > 0).all()


def test_numbers_of_trained_parameters() -> None:
    method = made(torch.zeros(100, 768), 10, ("a",))
    assert sum(p.numel() for p in method.parameters()) == 10 * (100 + 768) == 8_680
    assert sum(p.numel() for p in made(torch.zeros(20, 576), 10, ("a", "b")).parameters()) == 2 * 5_960


def test_groups_learn_at_their_own_rates() -> None:
    """Rows are in the prompt's units, columns about one: both learn as fast as a prompt does."""
    bb = tiny.backbone("llama")
    spec = injection.prompt_spec(bb, INPUT, P)
    model = prompted(bb, INPUT, build("low-rank", {}, spec, PromptInit(torch.zeros(P, 32))))
    groups = rates_of(model, together.config(learning_rate=0.2, learning_rate_unit="rms"))
    found = {tuple(g["params"][0].shape): g["rate"] for g in groups}
    assert found == pytest.approx({(10, 32): 0.2 * bb.embedding_rms, (P, 10): 0.2})


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rank": 0}, "rank must be a whole number of at least 1, given 0"), ({"rank": 1.5}, "given 1.5")],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"prompt.options of method low-rank: .*{words}"):
        build("low-rank", options, PromptSpec(P, D, D), PromptInit(torch.zeros(P, D)))
