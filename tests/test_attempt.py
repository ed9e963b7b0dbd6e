"""ATTEMPT against its formula written out by hand: values, gradients, padding, order of rows, size, what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rows
import tiny
from rows import INPUT
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.methods import build, state_of
from softprompts.methods.attempt import Attempt
from softprompts.model.learner import Learner
from softprompts.training import objectives
from softprompts.types import IGNORE, Batch, Context, PromptInit, PromptSpec

P, D, H, S, B, T = 4, 10, 6, 3, 5, 7
TASKS = ("one", "two")
LENGTHS = (7, 3, 1, 5, 0)


def made(temperature: float | None = 0.7, rank: int = 8, spread: float = 1.0) -> Attempt:
    """A method for two tasks whose every parameter is random, in float64."""
    config = Attempt.Config(rank=rank, temperature=temperature)
    start = PromptInit(rows.random(0, P, D), torch.stack([rows.random(10 + i, P, D) for i in range(S)]))
    method = Attempt(config, PromptSpec(TASKS, P, D, H), start).double()
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.copy_(rows.random(20 + i, *parameter.shape).double() * spread + (parameter.dim() == 1))
    return method


def context(side: str = "right", extra: int = 0, filler: float = 50.0) -> Context:
    """Texts of several lengths, the last one empty; what stands on padding is larger than all text."""
    embeds, mask = torch.full((B, T + extra, H), filler, dtype=torch.float64), torch.zeros(B, T + extra)
    for i, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(T + extra - length, T + extra)
        embeds[i, where], mask[i, where] = rows.random(30 + i, length, H).double() - 2, 1
    task = torch.tensor([1, 0, 1, 1, 0])
    return Context(task, mask.long(), embeds, mask.long(), lambda: embeds)


def by_hand(method: Attempt, row: Tensor, task: int) -> tuple[Any, Any]:
    """The prompt and the attention of one text `row [T, H]` without padding, number by number."""
    down, up = method.down.weight.detach().numpy(), method.up.weight.detach().numpy()
    scale, shift = method.norm.weight.detach().numpy(), method.norm.bias.detach().numpy()
    own = method.prompts[task].detach().numpy()
    pool = [*method.sources.numpy(), own]
    x = [max((float(token[i]) for token in row), default=0.0) for i in range(H)]
    middle = [sum(down[r, i] * x[i] for i in range(H)) for r in range(len(down))]
    middle = [m / (1 + math.exp(-m)) for m in middle]
    high = [sum(up[d, r] * middle[r] for r in range(len(middle))) for d in range(D)]
    mean = sum(high) / D
    deviation = math.sqrt(sum((v - mean) ** 2 for v in high) / D + 1e-5)
    h = [(high[d] - mean) / deviation * scale[d] + shift[d] for d in range(D)]
    scores = [sum(max(p[t][d] for t in range(P)) * h[d] for d in range(D)) / method.temperature for p in pool]
    total = sum(math.exp(s) for s in scores)
    a = [math.exp(s) / total for s in scores]
    return own + sum(weight * p for weight, p in zip(a, pool, strict=True)), a


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 3])
def test_formula(side: str, extra: int) -> None:
    """Every row's prompt, on either side of any padding, whatever stands there."""
    method, seen = made(), context(side, extra)
    prompt = method(seen)
    assert prompt.values.shape == (B, P, D)
    assert prompt.prompt_index.tolist() == list(range(B))
    for i, task in enumerate(seen.task_ids.tolist()):
        values, attention = by_hand(method, seen.inputs_embeds[i][seen.attention_mask[i].bool()], task)
        np.testing.assert_allclose(prompt.values[i].numpy(), values, atol=1e-12)
        np.testing.assert_allclose(prompt.aux["attention"][i].numpy(), attention, atol=1e-12)
    weights = prompt.aux["attention"]
    assert float(weights.std(0).min()) > 1e-3, "texts must differ in what they attend to, or nothing is tested"


@torch.no_grad()
def test_rows_neither_depend_on_their_order_nor_on_each_other() -> None:
    method, seen = made(), context()
    whole = method(seen).values
    for order in ([4, 2, 0, 1, 3], [2], [0, 0, 3]):
        index = torch.tensor(order)
        part = Context(
            seen.task_ids[index],
            seen.input_ids[index],
            seen.inputs_embeds[index],
            seen.attention_mask[index],
            seen.encode,
        )
        torch.testing.assert_close(method(part).values, whole[index], atol=1e-12, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    method, seen = made(), context()
    weights = rows.random(99, B, P, D).double()
    names, values = zip(*method.named_parameters(), strict=True)

    def result(*given: Tensor) -> Tensor:
        prompt = torch.func.functional_call(method, dict(zip(names, given, strict=True)), (seen,))
        return (prompt.values * weights).sum()

    given = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(result, given, eps=1e-6, atol=1e-6)


def test_the_own_prompt_learns_as_itself_and_as_a_part_of_the_mixture() -> None:
    """Where the attention is even, each row gives it its gradient once, and once more by its share of the mixture."""
    method, seen = made(temperature=1e12), context()
    method(seen).values.sum().backward()
    for task, count in enumerate((2, 3)):
        each = torch.full((P, D), count * (1 + 1 / (S + 1)), dtype=torch.float64)
        torch.testing.assert_close(method.prompts[task].grad, each)
    assert method.sources.grad is None


@torch.no_grad()
def test_limits_of_the_temperature() -> None:
    """Hot: the plain mean of all. Cold: one of them alone. The default is the paper's."""
    method = made(temperature=1e12)
    pool = torch.stack([*method.sources, method.prompts[1]])
    torch.testing.assert_close(method(context()).values[0], method.prompts[1] + pool.mean(0))
    method = made(temperature=1e-6)
    found = method(context()).values[0] - method.prompts[1]
    pool = torch.stack([*method.sources, method.prompts[1]])
    assert min(float((found - p).abs().max()) for p in pool) < 1e-9
    assert made(temperature=None).temperature == pytest.approx(math.e * D)
    wide = Attempt(
        Attempt.Config(), PromptSpec(("a",), 2, 768, 768), PromptInit(torch.zeros(2, 768), torch.zeros(1, 2, 768))
    )
    assert wide.temperature == pytest.approx(2087.6, abs=0.1)


@pytest.mark.parametrize(("tasks", "each"), [(1, 231_936), (8, 96_192)])
def test_size_is_the_papers(tasks: int, each: int) -> None:
    slot = PromptSpec(tuple(map(str, range(tasks))), 100, 768, 768)
    method = Attempt(Attempt.Config(), slot, PromptInit(torch.zeros(100, 768), torch.zeros(6, 100, 768)))
    assert sum(p.numel() for p in method.parameters()) == tasks * each


def test_a_wide_site_reads_a_narrow_text() -> None:
    """The text has the width of the embeddings, whatever the site's; torch's own start, as its seed says."""
    start = PromptInit(torch.zeros(P, D), torch.zeros(1, P, D))
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        method = Attempt(Attempt.Config(rank=64), PromptSpec(TASKS, P, D, H), start)
        found.append(method.state_dict())
        assert method.down.weight.shape == (64, H)
        assert method.up.weight.shape == (D, 64)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not torch.equal(found[0]["down.weight"], found[2]["down.weight"])
    bound = 1 / math.sqrt(H)
    assert 0.95 * bound < float(found[0]["down.weight"].abs().max()) <= bound


@pytest.mark.parametrize(
    ("options", "sources", "message"),
    [
        ({}, None, "method attempt: .*set prompt.init.sources"),
        ({}, torch.zeros(0, P, D), "set prompt.init.sources"),
        (
            {"rank": 0},
            torch.zeros(1, P, D),
            "options of method attempt: rank must be a whole number from 1 on, given 0",
        ),
        ({"rank": 2.5}, torch.zeros(1, P, D), "rank must be a whole number"),
        ({"temperature": 0}, torch.zeros(1, P, D), "temperature must be a number above 0, given 0"),
        ({"temperature": "hot"}, torch.zeros(1, P, D), "temperature must be a number above 0, given 'hot'"),
        ({"heat": 1}, torch.zeros(1, P, D), "'heat'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], sources: Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("attempt", options, PromptSpec(TASKS, P, D, H), PromptInit(torch.zeros(P, D), sources))


def learner(name: str, site: injection.Site = INPUT) -> Learner:
    """The method for two tasks on a tiny model, with a temperature that lets texts differ."""
    bb = tiny.backbone(name)
    slot = injection.prompt_spec(bb, site, TASKS, P)
    start = PromptInit(rows.random(5, P, slot.width), torch.stack([rows.random(i, P, slot.width) for i in range(S)]))
    torch.manual_seed(0)
    return Learner(bb, site, slot, Attempt(Attempt.Config(rank=16, temperature=1.0), slot, start))


def batch_of(name: str, tasks: list[int], side: str = "left") -> Batch:
    """Texts of several lengths; of causal ones the first two tokens are no labels."""
    found = rows.batch(name, rows.texts(name, [4 + (3 * i) % 7 for i in range(len(tasks))]), side)
    labels = found.labels
    if name in tiny.CAUSAL:
        labels = labels.masked_fill(found.attention_mask.cumsum(1) <= 2, IGNORE)
    return Batch(found.input_ids, found.attention_mask, torch.tensor(tasks), labels)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_training_leaves_the_sources_as_they_are(name: str) -> None:
    made = learner(name)
    before = made.method.sources.clone()
    start = {key: p.detach().clone() for key, p in made.method.named_parameters()}
    optimizer = torch.optim.AdamW(made.parameters().values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        objectives.task(made.step(batch_of(name, [0, 1, 0]))).backward()
        optimizer.step()
    assert torch.equal(made.method.sources, before)
    assert "method.sources" not in made.parameters()
    assert all(not torch.equal(p, start[key]) for key, p in made.method.named_parameters())


def test_a_task_alone_answers_as_among_others() -> None:
    method, seen = made(), context()
    prompts = method(seen).values.detach()
    for i, task in enumerate(TASKS):
        start = PromptInit(torch.zeros(P, D), torch.zeros(S, P, D))
        single = Attempt(Attempt.Config(rank=8, temperature=0.7), PromptSpec((task,), P, D, H), start).double()
        single.load_state_dict(state_of(method, task))
        index = (seen.task_ids == i).nonzero()[:, 0]
        part = Context(
            torch.zeros(len(index), dtype=torch.long),
            seen.input_ids,
            seen.inputs_embeds[index],
            seen.attention_mask[index],
            seen.encode,
        )
        torch.testing.assert_close(single(part).values, prompts[index], atol=1e-12, rtol=0)
    size = torch.stack([p.detach() for p in method.prompts]).square().mean().sqrt()
    assert float(method.size().detach()) == pytest.approx(float(size))
