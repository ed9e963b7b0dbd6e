"""Residual prompt tuning: its formula, prompt tuning where nothing is added, gradients, size, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rows
import test_together as together
import tiny
from rows import called
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.methods import build, state_of
from softprompts.methods.prompt_tuning import PromptTuning
from softprompts.methods.residual import ResidualPromptTuning
from softprompts.model.learner import Learner
from softprompts.training import loop
from softprompts.types import Context, PromptInit, PromptSpec

P, D, B = 4, 10, 6
TASKS = ("one", "two")


def made(tasks: tuple[str, ...] = TASKS, **options: Any) -> ResidualPromptTuning:
    """A method for two tasks in float64, as it begins."""
    torch.manual_seed(1)
    config = ResidualPromptTuning.Config(**{"bottleneck": B, **options})
    return ResidualPromptTuning(config, PromptSpec(tasks, P, D, D), PromptInit(rows.random(0, P, D))).double()


def moved(method: ResidualPromptTuning) -> ResidualPromptTuning:
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.add_(rows.random(30 + i, *parameter.shape))
    return method


def prompts(method: Any, tasks: list[int]) -> Tensor:
    """The prompt of each row of a batch."""
    ids = torch.zeros(len(tasks), 1, dtype=torch.long)
    found = method(Context(torch.tensor(tasks), ids, torch.zeros(len(tasks), 1, D), ids, lambda: torch.zeros(0)))
    return found.values[found.prompt_index]


def stock(method: ResidualPromptTuning, task: int, token: int) -> nn.Sequential:
    """The network of a token as torch's own modules, with the same weights."""
    parts = method.networks[task].state_dict()
    n = token if len(parts["down"]) > 1 else 0
    found = nn.Sequential(nn.Linear(D, B), nn.ReLU(), nn.Linear(B, D), nn.LayerNorm(D)).double()
    with torch.no_grad():
        found[0].weight.copy_(parts["down"][n].T)
        found[0].bias.copy_(parts["down_bias"][n, 0])
        found[2].weight.copy_(parts["up"][n].T)
        found[2].bias.copy_(parts["up_bias"][n, 0])
        found[3].weight.copy_(method.scales[task][n])
        found[3].bias.copy_(method.shifts[task][n])
    return found


@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("output", ["zero", "torch"])
def test_formula(per_token: bool, output: str) -> None:
    """Token by token with torch's own layers, for networks that are shared and that are not."""
    method = moved(made(per_token=per_token, output=output))
    found = prompts(method, [1, 0])
    for row, task in ((0, 1), (1, 0)):
        for i, token in enumerate(method.prompts[task]):
            torch.testing.assert_close(found[row, i], token + stock(method, task, i)(token), atol=1e-12, rtol=1e-12)
        assert torch.equal(method.fold(TASKS[task]), found[row])
    same = torch.stack([method.prompts[0][0]] * P)
    method.prompts[0].copy_(same)
    assert torch.allclose(method.fold("one")[0], method.fold("one")[1]) is not per_token


@torch.no_grad()
def test_the_papers_start() -> None:
    """Scales of one and torch's own start of the weights: a norm's output is added to the start."""
    method = made(output="torch")
    added = method.fold("one") - method.prompts[0]
    torch.testing.assert_close(added.mean(1), torch.zeros(P).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(added.square().mean(1), torch.ones(P).double(), atol=1e-2, rtol=0)
    wide = ResidualPromptTuning(
        ResidualPromptTuning.Config(bottleneck=100), PromptSpec(("a",), P, 400, 8), PromptInit(torch.zeros(P, 400))
    )
    for name, bound in (("down", 0.05), ("down_bias", 0.05), ("up", 0.1), ("up_bias", 0.1)):
        top = float(getattr(wide.networks[0], name).abs().max())
        assert 0.9 * bound < top <= bound, name


@pytest.mark.parametrize("per_token", [False, True])
def test_gradients(per_token: bool) -> None:
    method = moved(made(("one",), per_token=per_token))
    names, values = zip(*method.named_parameters(), strict=True)
    weights = rows.random(9, P, D).double()
    ids = torch.zeros(1, 1, dtype=torch.long)
    seen = Context(torch.zeros(1, dtype=torch.long), ids, torch.zeros(1, 1, D), ids, lambda: torch.zeros(0))

    def result(*given: Tensor) -> Tensor:
        return (
            torch.func.functional_call(method, dict(zip(names, given, strict=True)), (seen,)).values * weights
        ).sum()

    assert torch.autograd.gradcheck(result, tuple(v.detach().clone().requires_grad_() for v in values), atol=1e-6)


@pytest.mark.parametrize(("name", "site"), [("llama", Site()), ("llama", Site("kv")), ("t5", Site())], ids=called)
def test_with_zero_output_it_is_prompt_tuning(name: str, site: Site) -> None:
    """Values and the prompt's gradient to the bit; and, where the output stays zero, the whole curve of training."""
    base = together.double(name)
    slot = injection.prompt_spec(base, site, ("a",), P)
    start = torch.randn(P, slot.width, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.3
    plain = together.learner(base, site, P, 3)
    method = ResidualPromptTuning(ResidualPromptTuning.Config(bottleneck=B), slot, PromptInit(start)).double()
    with torch.no_grad():
        method.prompts[0].copy_(start)
    one = Learner(base, site, slot, method)
    data = together.encoded(name, 13, 1)
    batch = loop.collate(data[:4], 0)
    gradients = []
    for each in (plain, one):
        step = each.step(batch)
        torch.nn.functional.cross_entropy(step.output.logits, step.output.labels).backward()
        gradients.append((step.prompt.values.detach(), each.method.prompts[0].grad))
        each.method.zero_grad(set_to_none=True)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert float(gradients[0][1].abs().max()) > 0
    method.scales.requires_grad_(False)
    method.shifts.requires_grad_(False)
    curves = [[r.loss for r in loop.fit(each, data, together.config(steps=5), pad=0)] for each in (plain, one)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-12)
    torch.testing.assert_close(method.fold("a"), plain.method.fold("a"), rtol=1e-10, atol=0)
    assert float((method.fold("a") - start).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("length", "width", "options", "expected"),
    [
        (10, 768, {}, 10 * 768 + 768 * 800 + 800 + 800 * 768 + 768 + 2 * 768),
        (10, 512, {"bottleneck": 50}, 10 * 512 + 2 * 512 * 50 + 50 + 3 * 512),
        (10, 512, {"bottleneck": 50, "per_token": True}, 10 * (512 + 2 * 512 * 50 + 50 + 3 * 512)),
    ],
)
def test_numbers_of_trained_parameters(length: int, width: int, options: dict[str, Any], expected: int) -> None:
    slot = PromptSpec(("a",), length, width, width)
    method = ResidualPromptTuning(ResidualPromptTuning.Config(**options), slot, PromptInit(torch.zeros(length, width)))
    count = options.get("per_token", False) * (length - 1) + 1
    b = options.get("bottleneck", 800)
    assert sum(p.numel() for p in method.parameters()) == expected
    assert expected == length * width + count * (b * (2 * width + 1) + 3 * width)


@torch.no_grad()
def test_a_task_alone_is_as_among_others() -> None:
    method = moved(made(per_token=True))
    for task in TASKS:
        single = made((task,), per_token=True)
        single.load_state_dict(state_of(method, task))
        assert torch.equal(single.fold(task), method.fold(task))


def test_groups_learn_at_their_own_rates() -> None:
    bb = tiny.backbone("llama")
    slot = injection.prompt_spec(bb, Site(), TASKS, P)
    one = Learner(
        bb, Site(), slot, ResidualPromptTuning(ResidualPromptTuning.Config(), slot, PromptInit(torch.zeros(P, 32)))
    )
    config = together.config(rate=0.2, rate_unit="rms")
    groups = loop.build_optimizer(one, one.parameters(), config).param_groups
    assert {g["rate"]: len(g["params"]) for g in groups} == pytest.approx({0.2 * bb.embedding_rms: 6, 1e-3: 8})
    plain = Learner(bb, Site(), slot, PromptTuning(PromptTuning.Config(), slot, PromptInit(torch.zeros(P, 32))))
    usual = loop.build_optimizer(plain, plain.parameters(), config).param_groups[0]["rate"]
    assert groups[0]["rate"] == usual, "the prompt learns as it does in prompt tuning"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bottleneck": 0}, "bottleneck must be a whole number from 1 on, given 0"),
        ({"per_token": 1}, "per_token must be true or false, given 1"),
        ({"output": "one"}, "output 'one' is unknown; possible: zero, torch"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"prompt.options of method residual: {words}"):
        build("residual", options, PromptSpec(TASKS, P, D, D), PromptInit(torch.zeros(P, D)))
