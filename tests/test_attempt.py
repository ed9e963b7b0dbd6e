"""ATTEMPT against its formula written out by hand: values, gradients, padding, order of rows, size, what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rows
import tiny
from prompted import prompted, prompts_of, several
from rows import INPUT
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.methods import build, build_tasks
from softprompts.methods.attempt import Attempt
from softprompts.model import SoftPromptModel
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import IGNORE, Batch, Context, PromptInit, PromptSpec

P, D, H, S, B, T = 4, 10, 6, 3, 5, 7
TASKS = ("one", "two")
LENGTHS = (7, 3, 1, 5, 0)
TASK = [1, 0, 1, 1, 0]


def made(temperature: float | None = 0.7, rank: int = 8, spread: float = 1.0) -> Any:
    """Methods of two tasks whose every parameter is random, in float64."""
    config = Attempt.Config(rank=rank, temperature=temperature)
    start = PromptInit(rows.random(0, P, D), torch.stack([rows.random(10 + i, P, D) for i in range(S)]))
    methods = several(Attempt, config, PromptSpec(P, D, H), start, TASKS).double()
    with torch.no_grad():
        for i, parameter in enumerate(methods.parameters()):
            parameter.copy_(rows.random(20 + i, *parameter.shape).double() * spread + (parameter.dim() == 1))
    return methods


def context(side: str = "right", extra: int = 0, filler: float = 50.0) -> Context:
    """Texts of several lengths, the last one empty; what stands on padding is larger than all text."""
    embeds, mask = torch.full((B, T + extra, H), filler, dtype=torch.float64), torch.zeros(B, T + extra)
    for i, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(T + extra - length, T + extra)
        embeds[i, where], mask[i, where] = rows.random(30 + i, length, H).double() - 2, 1
    return Context(mask.long(), embeds, mask.long(), lambda: embeds)


def by_hand(method: Attempt, row: Tensor) -> tuple[Any, Any]:
    """The prompt and the attention of one text `row [T, H]` without padding, number by number."""
    down, up = method.shared.down.weight.detach().numpy(), method.shared.up.weight.detach().numpy()
    scale, shift = method.shared.norm.weight.detach().numpy(), method.shared.norm.bias.detach().numpy()
    own = method.prompt.detach().numpy()
    pool = [*method.shared.sources.numpy(), own]
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
    methods, seen = made(), context(side, extra)
    prompt = prompts_of(methods, TASK, seen)
    assert prompt.values[prompt.prompt_index].shape == (B, P, D)
    for i, task in enumerate(TASK):
        values, attention = by_hand(methods[TASKS[task]], seen.inputs_embeds[i][seen.attention_mask[i].bool()])
        np.testing.assert_allclose(prompt.values[prompt.prompt_index[i]].numpy(), values, atol=1e-12)
        np.testing.assert_allclose(prompt.aux["attention"][i].numpy(), attention, atol=1e-12)
    weights = prompt.aux["attention"]
    assert float(weights.std(0).min()) > 1e-3, "texts must differ in what they attend to, or nothing is tested"


@torch.no_grad()
def test_rows_neither_depend_on_their_order_nor_on_each_other() -> None:
    methods, seen = made(), context()
    prompt = prompts_of(methods, TASK, seen)
    whole = prompt.values[prompt.prompt_index]
    for order in ([4, 2, 0, 1, 3], [2], [0, 0, 3]):
        part = prompts_of(methods, [TASK[i] for i in order], seen.rows(torch.tensor(order)))
        torch.testing.assert_close(part.values[part.prompt_index], whole[order], atol=1e-12, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    method, seen = made()["one"], context()
    weights = rows.random(99, B, P, D).double()
    names, values = zip(*method.named_parameters(), strict=True)

    def result(*given: Tensor) -> Tensor:
        output = torch.func.functional_call(method, dict(zip(names, given, strict=True)), (seen,))
        return (output.prompt * weights).sum()

    given = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(result, given, eps=1e-6, atol=1e-6)


def test_the_own_prompt_learns_as_itself_and_as_a_part_of_the_mixture() -> None:
    """Where the attention is even, each row gives it its gradient once, and once more by its share of the mixture."""
    methods, seen = made(temperature=1e12), context()
    prompts_of(methods, TASK, seen).values.sum().backward()
    for task, count in zip(TASKS, (2, 3), strict=True):
        each = torch.full((P, D), count * (1 + 1 / (S + 1)), dtype=torch.float64)
        torch.testing.assert_close(methods[task].prompt.grad, each)
    assert methods["one"].sources.grad is None


@torch.no_grad()
def test_limits_of_the_temperature() -> None:
    """Hot: the plain mean of all. Cold: one of them alone. The default is the paper's."""
    method = made(temperature=1e12)["two"]
    pool = torch.stack([*method.sources, method.prompt])
    torch.testing.assert_close(method(context()).prompt[0], method.prompt + pool.mean(0))
    method = made(temperature=1e-6)["two"]
    found = method(context()).prompt[0] - method.prompt
    pool = torch.stack([*method.sources, method.prompt])
    assert min(float((found - p).abs().max()) for p in pool) < 1e-9
    assert made(temperature=None)["one"].temperature == pytest.approx(math.e * D)
    wide = Attempt(Attempt.Config(), PromptSpec(2, 768, 768), PromptInit(torch.zeros(2, 768), torch.zeros(1, 2, 768)))
    assert wide.temperature == pytest.approx(2087.6, abs=0.1)


@pytest.mark.parametrize(("tasks", "each"), [(1, 231_936), (8, 96_192)])
def test_size_is_the_papers(tasks: int, each: int) -> None:
    init, names = PromptInit(torch.zeros(100, 768), torch.zeros(6, 100, 768)), tuple(map(str, range(tasks)))
    methods = several(Attempt, Attempt.Config(), PromptSpec(100, 768, 768), init, names)
    assert sum(p.numel() for p in methods.parameters()) == tasks * each


def test_a_wide_site_reads_a_narrow_text() -> None:
    """The text has the width of the embeddings, whatever the site's; torch's own start, as its seed says."""
    start = PromptInit(torch.zeros(P, D), torch.zeros(1, P, D))
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        method = Attempt(Attempt.Config(rank=64), PromptSpec(P, D, H), start)
        found.append(method.state_dict())
        assert method.shared.down.weight.shape == (64, H)
        assert method.shared.up.weight.shape == (D, 64)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not torch.equal(found[0]["shared.down.weight"], found[2]["shared.down.weight"])
    bound = 1 / math.sqrt(H)
    assert 0.95 * bound < float(found[0]["shared.down.weight"].abs().max()) <= bound


@pytest.mark.parametrize(
    ("options", "sources", "message"),
    [
        ({}, None, "method attempt: .*set prompt.init.sources"),
        ({}, torch.zeros(0, P, D), "set prompt.init.sources"),
        (
            {"rank": 0},
            torch.zeros(1, P, D),
            "options of method attempt: rank must be a whole number of at least 1, given 0",
        ),
        ({"rank": 2.5}, torch.zeros(1, P, D), "rank must be a whole number"),
        ({"temperature": 0}, torch.zeros(1, P, D), "temperature must be a number above 0, given 0"),
        ({"temperature": "hot"}, torch.zeros(1, P, D), "temperature must be a number above 0, given 'hot'"),
        ({"heat": 1}, torch.zeros(1, P, D), "'heat'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], sources: Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("attempt", options, PromptSpec(P, D, H), PromptInit(torch.zeros(P, D), sources))


def tuned(name: str, site: injection.Site = INPUT) -> SoftPromptModel:
    """The method for two tasks on a tiny model, with a temperature that lets texts differ."""
    bb = tiny.backbone(name)
    spec = injection.prompt_spec(bb, site, P)
    start = PromptInit(rows.random(5, P, spec.width), torch.stack([rows.random(i, P, spec.width) for i in range(S)]))
    torch.manual_seed(0)
    return prompted(bb, site, build_tasks("attempt", {"rank": 16, "temperature": 1.0}, spec, start, TASKS))


def batch_of(name: str, tasks: list[int], side: str = "left") -> Batch:
    """Texts of several lengths; of causal ones the first two tokens are no labels."""
    found = rows.batch(name, rows.texts(name, [4 + (3 * i) % 7 for i in range(len(tasks))]), side)
    labels = found.labels
    if name in tiny.CAUSAL:
        labels = labels.masked_fill(found.attention_mask.cumsum(1) <= 2, IGNORE)
    return Batch(found.input_ids, found.attention_mask, torch.tensor(tasks), labels)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_training_leaves_the_sources_as_they_are(name: str) -> None:
    model = tuned(name)
    before = model.prompts["one"].sources.clone()
    start = {key: p.detach().clone() for key, p in model.prompts.named_parameters()}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        objectives.task(training_step(model, batch_of(name, [0, 1, 0]))).backward()
        optimizer.step()
    assert torch.equal(model.prompts["one"].sources, before)
    assert not any("sources" in name for name in model.trainable())
    assert all(not torch.equal(p, start[key]) for key, p in model.prompts.named_parameters())


def test_a_task_alone_answers_as_among_others() -> None:
    methods, seen = made(), context()
    together = prompts_of(methods, TASK, seen)
    prompts = together.values[together.prompt_index].detach()
    for i, task in enumerate(TASKS):
        start = PromptInit(torch.zeros(P, D), torch.zeros(S, P, D))
        single = Attempt(Attempt.Config(rank=8, temperature=0.7), PromptSpec(P, D, H), start).double()
        single.load_state_dict(methods[task].state_dict())
        index = (torch.tensor(TASK) == i).nonzero()[:, 0]
        torch.testing.assert_close(single(seen.rows(index)).prompt, prompts[index], atol=1e-12, rtol=0)
        assert float(single.rms().detach()) == pytest.approx(float(single.prompt.detach().square().mean().sqrt()))
