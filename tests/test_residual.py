"""Residual prompt tuning: its formula, prompt tuning where nothing is added, gradients, size, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rows
import test_together as together
import tiny
from prompted import plain, prompted, rates_of, rows_of, several
from rows import called
from softprompts import injection
from softprompts.data import collate
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.methods import build, build_tasks, fold
from softprompts.methods.residual import ResidualPromptTuning
from softprompts.training.shared_batch import training_step
from softprompts.types import Context, PromptInit, PromptSpec
from trainees import fit

P, D, B = 4, 10, 6
TASKS = ("one", "two")


def made(tasks: tuple[str, ...] = TASKS, **options: Any) -> Any:
    """Methods of two tasks in float64, as it begins."""
    torch.manual_seed(1)
    config = ResidualPromptTuning.Config(**{"bottleneck": B, **options})
    return several(ResidualPromptTuning, config, PromptSpec(P, D, D), PromptInit(rows.random(0, P, D)), tasks).double()


def moved(method: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.add_(rows.random(30 + i, *parameter.shape))
    return method


def stock(method: ResidualPromptTuning, token: int) -> nn.Sequential:
    """The network of a token as torch's own modules, with the same weights."""
    parts = method.network.state_dict()
    n = token if len(parts["down"]) > 1 else 0
    found = nn.Sequential(nn.Linear(D, B), nn.ReLU(), nn.Linear(B, D), nn.LayerNorm(D)).double()
    with torch.no_grad():
        found[0].weight.copy_(parts["down"][n].T)
        found[0].bias.copy_(parts["down_bias"][n, 0])
        found[2].weight.copy_(parts["up"][n].T)
        found[2].bias.copy_(parts["up_bias"][n, 0])
        found[3].weight.copy_(method.scale[n])
        found[3].bias.copy_(method.shift[n])
    return found


@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("output", ["zero", "torch"])
def test_formula(per_token: bool, output: str) -> None:
    """Token by token with torch's own layers, for networks that are shared and that are not."""
    methods = moved(made(per_token=per_token, output=output))
    found = rows_of(methods, [1, 0])
    for row, task in ((0, "two"), (1, "one")):
        for i, token in enumerate(methods[task].prompt):
            torch.testing.assert_close(found[row, i], token + stock(methods[task], i)(token), atol=1e-12, rtol=1e-12)
        assert torch.equal(fold(methods[task]), found[row].float())
    method = methods["one"]
    method.prompt.copy_(torch.stack([method.prompt[0]] * P))
    assert torch.allclose(fold(method)[0], fold(method)[1]) is not per_token


@torch.no_grad()
def test_the_papers_start() -> None:
    """Scales of one and torch's own start of the weights: a norm's output is added to the start."""
    method = made(output="torch")["one"]
    added = plain(method) - method.prompt
    torch.testing.assert_close(added.mean(1), torch.zeros(P).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(added.square().mean(1), torch.ones(P).double(), atol=1e-2, rtol=0)
    wide = ResidualPromptTuning(
        ResidualPromptTuning.Config(bottleneck=100), PromptSpec(P, 400, 8), PromptInit(torch.zeros(P, 400))
    )
    for name, bound in (("down", 0.05), ("down_bias", 0.05), ("up", 0.1), ("up_bias", 0.1)):
        top = float(getattr(wide.network, name).abs().max())
        assert 0.9 * bound < top <= bound, name


@pytest.mark.parametrize("per_token", [False, True])
def test_gradients(per_token: bool) -> None:
    method = moved(made(("one",), per_token=per_token))["one"]
    names, values = zip(*method.named_parameters(), strict=True)
    weights = rows.random(9, P, D).double()

    def result(*given: Tensor) -> Tensor:
        prompt = torch.func.functional_call(method, dict(zip(names, given, strict=True)), (Context.empty(),))
        return (prompt * weights).sum()

    assert torch.autograd.gradcheck(result, tuple(v.detach().clone().requires_grad_() for v in values), atol=1e-6)


@pytest.mark.parametrize(("name", "site"), [("llama", Site()), ("llama", Site("kv")), ("t5", Site())], ids=called)
def test_with_zero_output_it_is_prompt_tuning(name: str, site: Site) -> None:
    """Values and the prompt's gradient to the bit; and, where the output stays zero, the whole curve of training."""
    base = together.double(name)
    spec, start = injection.prompt_spec(base, site, P), together.random_start(base, site, P, 3)
    usual = together.tuned(base, site, P, 3)
    method = build("residual", {"bottleneck": B}, spec, PromptInit(start)).double()
    with torch.no_grad():
        method.prompt.copy_(start)
    one = prompted(base, site, method)
    data = together.encoded(name, 13, 1)
    batch = collate(data[:4], 0)
    gradients = []
    for each in (usual, one):
        step = training_step(each, batch)
        torch.nn.functional.cross_entropy(step.output.logits, step.output.labels).backward()
        gradients.append((step.prompt.values.detach(), each.prompts["a"].prompt.grad))
        each.prompts.zero_grad(set_to_none=True)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert float(gradients[0][1].abs().max()) > 0
    method.scale.requires_grad_(False)
    method.shift.requires_grad_(False)
    curves = [[r.loss for r in fit(each, data, together.config(max_steps=5))] for each in (usual, one)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-12)
    torch.testing.assert_close(plain(method), plain(usual.prompts["a"]), rtol=1e-10, atol=0)
    assert float((plain(method) - start).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("length", "width", "options", "expected"),
    [
        (10, 768, {}, 10 * 768 + 768 * 800 + 800 + 800 * 768 + 768 + 2 * 768),
        (10, 512, {"bottleneck": 50}, 10 * 512 + 2 * 512 * 50 + 50 + 3 * 512),
        (10, 512, {"bottleneck": 50, "per_token": True}, 10 * (512 + 2 * 512 * 50 + 50 + 3 * 512)),
    ],
)
def test_numbers_of_trained_parameters(length: int, width: int, options: dict[str, Any], expected: int) -> None:
    slot = PromptSpec(length, width, width)
    method = ResidualPromptTuning(ResidualPromptTuning.Config(**options), slot, PromptInit(torch.zeros(length, width)))
    count = options.get("per_token", False) * (length - 1) + 1
    b = options.get("bottleneck", 800)
    assert sum(p.numel() for p in method.parameters()) == expected
    assert expected == length * width + count * (b * (2 * width + 1) + 3 * width)


@torch.no_grad()
def test_a_task_alone_is_as_among_others() -> None:
    methods = moved(made(per_token=True))
    for task in TASKS:
        single = made((task,), per_token=True)[task]
        single.load_state_dict(methods[task].state_dict())
        assert torch.equal(fold(single), fold(methods[task]))


def test_groups_learn_at_their_own_rates() -> None:
    bb = tiny.backbone("llama")
    spec, start = injection.prompt_spec(bb, Site(), P), PromptInit(torch.zeros(P, 32))
    config = together.config(learning_rate=0.2, learning_rate_unit="rms")
    groups = rates_of(prompted(bb, Site(), build_tasks("residual", {}, spec, start, TASKS)), config)
    assert {g["rate"]: len(g["params"]) for g in groups} == pytest.approx({0.2 * bb.embedding_rms: 6, 1e-3: 8})
    usual = rates_of(prompted(bb, Site(), build("prompt-tuning", {}, spec, start)), config)[0]["rate"]
    assert groups[0]["rate"] == usual, "the prompt learns as it does in prompt tuning"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bottleneck": 0}, "bottleneck must be a whole number of at least 1, given 0"),
        ({"per_token": 1}, "per_token must be true or false, given 1"),
        ({"output": "one"}, "output 'one' is unknown; possible: zero, torch"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"prompt.options of method residual: {words}"):
        build("residual", options, PromptSpec(P, D, D), PromptInit(torch.zeros(P, D)))
