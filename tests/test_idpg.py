"""IDPG against its formula written out by hand: generators, kinds, sizes, encoders, gradients, layers, mixed rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from softprompts.model.learner import Learner
from torch import Tensor

import rows
import tiny
from closeness import GRADIENT_ROUNDINGS, assert_close
from rows import INPUT, called
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.methods import build, state_of
from softprompts.methods.idpg import Idpg, phm
from softprompts.methods.prompt_tuning import PromptTuning
from softprompts.training import objectives
from softprompts.types import IGNORE, Batch, Context, PromptInit, PromptSpec, pool_states

P, E, B, T = 3, 8, 5, 7
WIDTHS = {"S": (12, ()), "M": (12, (4, 4, 4)), "L": (12, (4, 4, 4))}
TASKS = ("one", "two")
LENGTHS = (7, 3, 1, 5, 0)
GENERATORS = (
    {"generator": "linear"},
    {"generator": "dnn", "hidden": 6},
    {"generator": "phm", "hidden": 4, "phm": 2},
    {"generator": "phm", "hidden": 8, "phm": 4, "shared": True},
)


def options(**given: Any) -> dict[str, Any]:
    """Small options that read word embeddings as they are."""
    return {"encoder": "static", "normalize": False, **given}


def made(kind: str = "S", tasks: tuple[str, ...] = TASKS, **given: Any) -> Idpg:
    """A method whose every parameter is random, in float64 and eval mode."""
    width, layers = WIDTHS[kind]
    slot = PromptSpec(P, width, E, layers=layers, encoders={"backbone": 6, "minilm": 10})
    method = (
        Idpg(Idpg.Config(**options(kind=kind, **given)), slot, PromptInit(rows.random(0, P, width))).double().eval()
    )
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.copy_(rows.random(20 + i, *parameter.shape).double())
    return method


def context(side: str = "right", extra: int = 0, filler: float = 50.0) -> Context:
    """Texts of several lengths, the last one empty; what stands on padding is larger than all text."""
    embeds, mask = torch.full((B, T + extra, E), filler, dtype=torch.float64), torch.zeros(B, T + extra)
    for i, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(T + extra - length, T + extra)
        embeds[i, where], mask[i, where] = rows.random(30 + i, length, E).double(), 1
    return Context(torch.tensor([1, 0, 1, 1, 0]), mask.long(), embeds, mask.long(), lambda: embeds[..., :6])


def weights(method: Idpg, name: str, task: int, generator: int) -> Any:
    """W1 or W2 as a plain matrix; of PHM number by number from the definition of the Kronecker product."""
    weight = getattr(method, name)[task][generator].detach().numpy()
    if method.config.generator != "phm":
        return weight
    rules = getattr(method, "rules" if method.config.shared else f"{name}_rules")[task][generator].detach().numpy()
    n, high, wide = weight.shape
    found = np.zeros((n * high, n * wide))
    for a, b in zip(rules, weight, strict=True):
        for row in range(n * high):
            for column in range(n * wide):
                found[row, column] += a[row // high, column // wide] * b[row % high, column % wide]
    return found


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def by_hand(method: Idpg, row: Tensor, task: int) -> Any:
    """The prompt [P, D] of one text `row [T, E]` without padding."""
    x = [sum(float(token[i]) for token in row) / max(1, len(row)) for i in range(E)]
    if method.config.normalize:
        size = math.sqrt(sum(value**2 for value in x) / E)
        x = [value / size if size else 0.0 for value in x]
    layers = method.slot.layers if method.kind != "S" else (method.slot.width,)
    found = method.bias[task].detach().numpy().copy()
    at = 0
    for layer, width in enumerate(layers):
        number = layer if method.kind == "L" else 0
        inner = x
        if method.config.generator != "linear":
            bias = method.hidden[task][number].tolist()
            inner = [gelu(v + b) for v, b in zip(weights(method, "down", task, number) @ x, bias, strict=True)]
        out = weights(method, "up", task, number) @ inner
        for token in range(P):
            for i in range(width):
                found[token, at + i] += out[token * width + i]
        at += width
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("given", GENERATORS, ids=lambda g: "-".join(map(str, g.values())))
def test_formula(kind: str, given: dict[str, Any]) -> None:
    """Every row's prompt, on either side of any padding, whatever stands there; rows of two tasks in one batch."""
    for normalize, side, extra in ((False, "left", 3), (True, "right", 0)):
        method, seen = made(kind, **given, normalize=normalize), context(side, extra)
        prompt = method(seen)
        assert prompt.values.shape == (B, P, 12)
        assert prompt.mask.all()
        assert prompt.prompt_index.tolist() == list(range(B))
        for i, task in enumerate(seen.task_ids.tolist()):
            expected = by_hand(method, seen.inputs_embeds[i][seen.attention_mask[i].bool()], task)
            np.testing.assert_allclose(prompt.values[i].numpy(), expected, atol=1e-12)
        own = prompt.values - torch.stack([method.bias[task] for task in seen.task_ids.tolist()])
        assert float(own[[0, 2, 3]].std(0).max()) > 1e-2, "texts must differ, or nothing is tested"


@torch.no_grad()
@pytest.mark.parametrize(("high", "wide"), [(4, 12), (12, 4), (8, 8)])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_phm_is_the_sum_of_kronecker_products(n: int, high: int, wide: int) -> None:
    """Whichever product comes first; with n = 1 it is a dense layer but for the number A."""
    values, rules = rows.random(1, 2, 5, wide).double(), rows.random(2, 2, n, n, n).double()
    blocks = rows.random(3, 2, n, high // n, wide // n).double()
    found = phm(values, rules, blocks)
    for group in range(2):
        matrix = sum(torch.kron(a, b) for a, b in zip(rules[group], blocks[group], strict=True))
        torch.testing.assert_close(found[group], values[group] @ matrix.T, atol=1e-12, rtol=0)
        if n == 1:
            dense = float(rules[group]) * torch.nn.functional.linear(values[group], blocks[group, 0])
            torch.testing.assert_close(found[group], dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(phm(values[0], rules[:1], blocks[:1])[0], found[0], atol=1e-12, rtol=0)


def test_phm_of_one_is_the_dnn() -> None:
    """With A = 1 and the same weights both generators make the same prompts, and the same gradients."""
    dense, hyper = made(generator="dnn", hidden=4), made(generator="phm", hidden=4, phm=1)
    state = dict(dense.state_dict())
    state |= {name: value[:, None] for name, value in state.items() if name.startswith(("up.", "down."))}
    state |= {f"{name}_rules.{i}": torch.ones(1, 1, 1, 1) for name in ("up", "down") for i in range(2)}
    hyper.load_state_dict(state)
    seen, noise = context(), rows.random(9, B, P, 12).double()
    for method in (dense, hyper):
        (method(seen).values * noise).sum().backward()
    torch.testing.assert_close(hyper(seen).values, dense(seen).values, atol=1e-12, rtol=0)
    for name in ("up", "down"):
        for task in range(2):
            ours, theirs = getattr(hyper, name)[task].grad[:, 0], getattr(dense, name)[task].grad
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kind", "count", "given"),
    [
        ("S", 107_520, {"generator": "phm", "hidden": 256, "phm": 16, "shared": True}),
        ("M", 137_216, {"generator": "phm", "hidden": 16, "phm": 16}),
        ("M", 221_184, {"generator": "dnn", "hidden": 16}),
        ("S", 1_578_240 - 256, {"generator": "dnn", "hidden": 256}),  # this one is reported with the hidden bias
        ("M", 144_688, {"generator": "phm", "hidden": 16, "phm": 4, "encoder": "minilm"}),
    ],
)
def test_sizes_are_the_papers(kind: str, count: int, given: dict[str, Any]) -> None:
    """RoBERTa-large, 5 prompt tokens; the hidden bias, which the paper's table leaves out, comes on top."""
    layers = (1024,) * 24 if kind == "M" else ()
    slot = PromptSpec(5, 1024 * (24 if kind == "M" else 1), 1024, layers=layers, encoders={"minilm": 300})
    method = build("idpg", options(kind=kind, **given), slot, PromptInit(torch.zeros(5, slot.width)))
    sizes = {name: parameter.numel() for name, parameter in method.named_parameters()}
    hidden = sizes.pop("hidden.0")
    assert hidden == given["hidden"]
    assert sum(sizes.values()) == count


def test_a_generator_for_each_layer_and_task() -> None:
    """Kind L has every part of kind M for each layer but the output bias, and each task has all of it."""
    for given in GENERATORS:
        one, each = made("M", ("a",), **given), made("L", **given)
        for name, value in one.named_parameters():
            times = 1 if name.startswith("bias") else 3
            assert getattr(each, name.partition(".")[0])[1].numel() == times * value.numel(), name
    assert {kind: build("idpg", {}, PromptSpec(16, 48, 32, layers=layers, encoders={"backbone": 32}),
                        PromptInit(torch.zeros(16, 48))).kind
            for kind, layers in (("none", ()), ("alike", (16,) * 3), ("mixed", (16, 32)))
            } == {"none": "S", "alike": "M", "mixed": "S"}  # fmt: skip


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("given", GENERATORS, ids=lambda g: "-".join(map(str, g.values())))
def test_gradients_are_those_of_finite_differences(kind: str, given: dict[str, Any]) -> None:
    method, seen = made(kind, **given), context()
    noise = rows.random(99, B, P, 12).double()
    names, values = zip(*method.named_parameters(), strict=True)

    def result(*now: Tensor) -> Tensor:
        prompt = torch.func.functional_call(method, dict(zip(names, now, strict=True)), (seen,))
        return (prompt.values * noise).sum()

    now = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(result, now, eps=1e-6, atol=1e-6, fast_mode=True)


@torch.no_grad()
def test_starts() -> None:
    """Zero: at the start itself, with all else drawn. Normal: everything is drawn with the spread asked for."""
    start = rows.random(4, 8, 512)
    slot = PromptSpec(8, 512, 256)
    for given in ({"generator": "linear"}, {"generator": "dnn"}, {"generator": "phm"}):
        torch.manual_seed(0)
        zero = build("idpg", options(**given), slot, PromptInit(start))
        seen = Context(torch.zeros(2).long(), torch.ones(2, 3), rows.random(5, 2, 3, 256), torch.ones(2, 3), lambda: 1)
        assert torch.equal(zero(seen).values, start.expand(2, -1, -1))
        drawn = build("idpg", options(**given, start="normal", spread=0.2), slot, PromptInit(start))
        assert float((drawn(seen).values - start).abs().max()) > 0.1
        assert torch.equal(drawn.bias[0], start)
        assert not zero.up[0].any()
        for name, value in drawn.named_parameters():
            if name != "bias.0":
                assert float(value.std()) == pytest.approx(0.2, rel=0.15), name
        for name, value in zero.named_parameters():
            if not name.startswith(("bias", "up.")):
                assert float(value.std()) == pytest.approx(0.05, rel=0.15), name


def test_dropout_is_for_training_alone() -> None:
    """On M(x) and on the hidden units, with the chance asked for; what is left is scaled up."""
    method, seen = made(generator="dnn", hidden=6, dropout=0.25), context()
    expected = method(seen).values.detach()
    method.train()
    torch.manual_seed(0)
    many = torch.stack([method(seen).values.detach() for _ in range(4)])
    assert float(many.std(0)[[0, 1, 2, 3]].max()) > 1e-3
    method.eval()
    assert torch.equal(method(seen).values.detach(), expected)
    assert torch.equal(made(generator="dnn", hidden=6, dropout=0.0).train()(seen).values, expected)
    # On M(x): a linear generator without bias, over rows of ones, shows each unit's draw.
    linear = Idpg(
        Idpg.Config(**options(generator="linear", dropout=0.25)),
        PromptSpec(1, E, E),
        PromptInit(torch.zeros(1, E)),
    )
    with torch.no_grad():
        linear.up[0].copy_(torch.eye(E)[None])
    ones = torch.ones(500, 1, E)
    drawn = linear.train()(Context(torch.zeros(500).long(), ones[..., 0], ones, ones[..., 0], lambda: ones)).values
    assert sorted(drawn.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert float((drawn == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    # On the hidden units: without M(x), whatever is dropped is one of their biases' parts.
    with torch.no_grad():
        method.down[0].zero_()
        parts = method.up[0][0] * torch.nn.functional.gelu(method.hidden[0])
        found = (method.train()(seen).values[1] - method.bias[0]).flatten()
        draws = torch.cartesian_prod(*[torch.tensor([0.0, 1 / 0.75], dtype=torch.float64)] * 6)
        assert float((draws @ parts.T - found).abs().amax(1).min()) < 1e-12
        assert float((found - parts.sum(1)).abs().max()) > 1e-6


def test_no_gradient_reaches_what_is_read() -> None:
    method = made(generator="dnn", hidden=6)
    seen = context()
    seen.inputs_embeds.requires_grad_()
    method(seen).values.sum().backward()
    assert seen.inputs_embeds.grad is None


@torch.no_grad()
def test_ways_of_pooling() -> None:
    seen = context("left", 2)
    for how, place in (("first", 0), ("last", -1)):
        found = pool_states(seen.inputs_embeds, seen.attention_mask, how)
        for i, length in enumerate(LENGTHS):
            text = seen.inputs_embeds[i][seen.attention_mask[i].bool()]
            assert torch.equal(found[i], text[place] if length else torch.zeros(E, dtype=torch.float64))
    found = pool_states(seen.inputs_embeds, seen.attention_mask, "mean")
    torch.testing.assert_close(found[1], seen.inputs_embeds[1, -3:].mean(0))
    assert not found[4].any()
    with pytest.raises(ValueError, match="first, last or mean, not 'max'"):
        pool_states(seen.inputs_embeds, seen.attention_mask, "max")


@torch.no_grad()
def test_what_is_read_is_what_was_asked_for() -> None:
    """Static: embeddings; backbone: its states, pooled; cached and minilm: a vector for each text."""
    seen, asked = context(), []

    def sentence(name: str) -> Tensor:
        asked.append(name)
        return rows.random(len(name), B, 10 if name == "minilm" else 6).double()

    seen = Context(seen.task_ids, seen.input_ids, seen.inputs_embeds, seen.attention_mask, seen.encode, sentence)
    for given, expected in (
        ({"encoder": "backbone", "pool": "last"}, pool_states(seen.encode(), seen.attention_mask, "last")),
        ({"encoder": "backbone"}, pool_states(seen.encode(), seen.attention_mask, "mean")),  # what this slot says
        ({"encoder": "backbone", "cache": True, "pool": "first"}, rows.random(14, B, 6).double()),
        ({"encoder": "minilm"}, rows.random(6, B, 10).double()),
    ):
        method = made(generator="linear", **given)
        for i, task in enumerate(seen.task_ids.tolist()):
            value = method.bias[task] + (method.up[task][0] @ expected[i]).view(P, 12)
            torch.testing.assert_close(method(seen).values[i], value, atol=1e-12, rtol=0)
    assert set(asked) == {"backbone-first", "minilm"}


@pytest.mark.parametrize(
    ("given", "slot", "message"),
    [
        ({"generator": "cnn"}, {}, "method idpg: generator 'cnn' is unknown; possible: linear, dnn, phm"),
        ({"encoder": "glove"}, {}, "encoder 'glove' is unknown; possible: static, backbone, minilm"),
        ({"hidden": 0}, {}, "hidden must be a whole number from 1 on, given 0"),
        ({"phm": 2.5}, {}, "phm must be a whole number from 1 on, given 2.5"),
        ({"dropout": 1}, {}, "dropout must be a number from 0 to below 1, given 1"),
        ({"spread": -1}, {}, "spread must be a number from 0 to below inf, given -1"),
        ({"pool": "last", "encoder": "static"}, {}, "pool and cache are for encoder backbone, not static"),
        ({"heads": 2}, {}, "'heads' is unknown.* possible: kind, generator, hidden, phm, shared, encoder"),
        ({"shared": "no"}, {}, "shared must be true or false, given 'no'"),
        ({"hidden": True}, {}, "hidden must be a whole number, given True"),
        ({"encoder": "minilm"}, {}, "method idpg: encoder 'minilm' is not here; possible: static, backbone"),
        ({"kind": "M"}, {}, "kind M has a prompt for every layer, .*possible: S, or set prompt.site: layers"),
        ({"kind": "L"}, {"layers": (16, 32)}, "kind L needs layers of one width, .* are 16, 32 wide; possible: S"),
        ({"phm": 3}, {}, "phm 3 does not divide 40, the width of M.x.; possible: 1, 2, 4, 8"),
        ({"phm": 5}, {}, "phm 5 does not divide 256, hidden; possible: 1, 2, 4, 8"),
        ({"phm": 10, "hidden": 10}, {}, "phm 10 does not divide 192, what W2 makes; possible: 1, 2"),
    ],
)
def test_what_is_refused(given: dict[str, Any], slot: dict[str, Any], message: str) -> None:
    one = PromptSpec(4, 48, 40, encoders={"backbone": 40}, **slot)
    with pytest.raises(ConfigError, match=message):
        build("idpg", given, one, PromptInit(torch.zeros(4, 48)))


def learner(name: str, site: injection.Site = INPUT, method: Any = Idpg, spread: float = 0.0, **given: Any) -> Learner:
    """A method for two tasks on a tiny model; with `spread` its parameters are no longer those of the start."""
    bb = tiny.backbone(name)
    slot = injection.prompt_spec(bb, site, P)
    torch.manual_seed(0)
    made = method(method.Config(**given), slot, PromptInit(rows.random(5, P, slot.width))).eval()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters() if spread else ()):
            parameter.add_(rows.random(70 + i, *parameter.shape) * spread)
    return Learner(bb, site, slot, made)


def batch_of(name: str, tasks: list[int], side: str = "left", extra: int = 0) -> Batch:
    """Texts of several lengths; of causal ones the first two tokens are no labels."""
    found = rows.batch(name, rows.texts(name, [4 + (3 * i) % 7 for i in range(len(tasks))]), side, extra)
    labels = found.labels
    if name in tiny.CAUSAL:
        labels = labels.masked_fill(found.attention_mask.cumsum(1) <= 2, IGNORE)
    return Batch(found.input_ids, found.attention_mask, torch.tensor(tasks), labels)


@pytest.mark.parametrize(("name", "site"), rows.cases(("llama", "t5", "bert")), ids=called)
def test_a_generator_of_zeros_is_prompt_tuning_with_its_bias(name: str, site: injection.Site) -> None:
    """Scores and the gradient of the bias, which each task's own rows alone give it."""
    ours, theirs = learner(name, site, phm=1), learner(name, site, PromptTuning)
    batch = batch_of(name, [0, 1, 1, 0])
    steps = [one.step(batch) for one in (ours, theirs)]
    torch.testing.assert_close(steps[0].output.logits, steps[1].output.logits, atol=1e-5, rtol=1e-5)
    for step in steps:
        objectives.task(step).backward()
    for i in range(2):
        mine, other = ours.method.bias[i].grad, theirs.method.prompts[i].grad
        assert float(other.abs().max()) > 1e-4
        assert_close(mine, other, GRADIENT_ROUNDINGS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_layers_of_zeros_are_the_prompt_at_the_input(name: str) -> None:
    """Kind S is kind L whose generators behind the first are 0, and the first part of kind M with the same weights."""
    single = learner(name, spread=0.5, phm=4, hidden=8)
    deep = learner(name, rows.ADD, kind="L", phm=4, hidden=8)
    shared = learner(name, rows.ADD, kind="M", phm=4, hidden=8)
    for task in range(2):
        for part in single.method.per_task:
            value = getattr(single.method, part)[task]
            if part == "bias":
                for other in (deep, shared):
                    other.method.bias[task].zero_()[:, : value.shape[1]] = value
                continue
            getattr(deep.method, part)[task].zero_()[0] = value[0]
            getattr(shared.method, part)[task].copy_(value)
    batch = batch_of(name, [0, 1, 1, 0])
    prompts = [one.prompt(batch) for one in (single, deep, shared)]
    width = single.slot.width
    for other in prompts[1:]:
        torch.testing.assert_close(other.values[..., :width], prompts[0].values, atol=1e-5, rtol=1e-4)
    assert float((prompts[1].values[..., width:]).abs().max()) == 0
    expected = single.forward(batch, prompts[0]).logits
    torch.testing.assert_close(deep.forward(batch, prompts[1]).logits, expected, atol=1e-5, rtol=1e-5)
    # Kind M makes the same of the text for every layer: with weights of 0 too nothing but the input's prompt is left.
    made = prompts[2].values.unflatten(-1, (-1, width))
    assert float((made[:, :, 1] - made[:, :, -1]).abs().max()) < 1e-5
    assert float(made[:, :, 1].abs().max()) > 1e-3
    for one in (single, shared):
        for part in one.method.up:
            part.zero_()
    expected = single.forward(batch, single.prompt(batch)).logits
    torch.testing.assert_close(shared.forward(batch, shared.prompt(batch)).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layer_prompts_touch_the_prompts_positions_alone(name: str) -> None:
    """A layer's input is the output of the one before, with the layer's own part added on the prompt's positions."""
    one = learner(name, rows.ADD, spread=0.5, phm=4)
    bb, batch = one.backbone, batch_of(name, [0, 1, 1], "right")
    prompt = one.prompt(batch)
    parts = injection.split_by_layer(prompt.values, bb)
    before: list[Tensor] = []
    after: list[Tensor] = []

    def left(_: Any, __: Any, output: Any) -> None:
        before.append(output if isinstance(output, Tensor) else output[0])

    def entered(_: Any, args: Any, kwargs: Any) -> None:
        after.append(args[0] if args else kwargs["hidden_states"])

    # The first module inside a layer sees the states behind all hooks of the layer itself.
    inner = [layer.input_layernorm if name == "llama" else layer.attention for layer in bb.layers]
    handles = [layer.register_forward_hook(left) for layer in bb.layers]
    handles += [module.register_forward_pre_hook(entered, with_kwargs=True) for module in inner]
    try:
        injection.score(bb, batch, prompt, rows.ADD, path="concatenation")
    finally:
        for handle in handles:
            handle.remove()
    place = 0 if name == "llama" else 1
    for layer in range(1, len(bb.layers)):
        moved = after[layer] - before[layer - 1]
        there = torch.zeros(moved.shape[1], dtype=torch.bool)
        there[place : place + P] = True
        assert float(moved[:, ~there].abs().max()) == 0
        torch.testing.assert_close(moved[:, there], parts[layer][prompt.prompt_index], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["static", "backbone", "cached"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_prompt_ignores_neighbors_and_padding(name: str, encoder: str) -> None:
    given = {"encoder": "backbone", "cache": True} if encoder == "cached" else {"encoder": encoder}
    one = learner(name, spread=0.3, phm=4, **given)
    tasks = [0, 1, 1, 0, 1]
    expected = one.prompt(batch_of(name, tasks)).values
    assert float((expected[1] - expected[2]).abs().max()) > 1e-2
    for side, extra in (("right", 0), ("left", 4), ("right", 3)):
        one.sentences.kept.clear()
        found = one.prompt(batch_of(name, tasks, side, extra)).values
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    batch = batch_of(name, tasks, "right", 3)
    for order in ([4, 2, 0, 1, 3], [2], [0, 0, 3]):
        one.sentences.kept.clear()
        found = one.prompt(batch.rows(torch.tensor(order))).values
        torch.testing.assert_close(found, expected[order], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "pool"), [("llama", "last"), ("t5", "mean"), ("bert", "first"), ("roberta", "first")])
def test_the_backbone_reads_the_text_alone(name: str, pool: str) -> None:
    """M(x) is the stock model's last hidden state of the text: of causal models what stands before the first label."""
    one = learner(name, generator="linear", normalize=False)
    assert one.slot.pool == pool
    for part in one.method.up:
        part.copy_(rows.random(3, *part.shape))
    batch = batch_of(name, [0, 1, 1, 0])
    prompt = one.prompt(batch)
    for i, task in enumerate(batch.task_ids.tolist()):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()]
        ids = ids[:2] if name in tiny.CAUSAL else ids
        states = one.backbone.encoder(input_ids=ids[None]).last_hidden_state[0]
        state = {"last": states[-1], "first": states[0], "mean": states.mean(0)}[pool]
        expected = one.method.bias[task] + (one.method.up[task][0] @ state).view(P, -1)
        torch.testing.assert_close(prompt.values[i], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ALL)
def test_the_slot_tells_the_width_of_states(name: str) -> None:
    bb = tiny.backbone(name)
    batch = rows.batch(name, rows.texts(name, (3,)))
    states = injection.score(
        bb, Batch(batch.input_ids, batch.attention_mask, batch.task_ids), None, INPUT, return_hidden_states=True
    ).hidden
    assert injection.prompt_spec(bb, INPUT, P, {"minilm": 384}).encoders == {
        "backbone": states.shape[-1],
        "minilm": 384,
    }


@torch.no_grad()
def test_a_task_alone_answers_as_among_others() -> None:
    method, seen = made("M", generator="phm", hidden=4, phm=2), context()
    prompts = method(seen).values
    for i, task in enumerate(TASKS):
        single = made("M", (task,), generator="phm", hidden=4, phm=2)
        single.load_state_dict(state_of(method, task))
        index = (seen.task_ids == i).nonzero()[:, 0]
        part = Context(
            torch.zeros(len(index)).long(),
            seen.input_ids,
            seen.inputs_embeds[index],
            seen.attention_mask[index],
            seen.encode,
        )
        torch.testing.assert_close(single(part).values, prompts[index], atol=1e-12, rtol=0)
    assert float(method.size()) == pytest.approx(float(torch.stack(list(method.bias)).square().mean().sqrt()))


def test_every_parameter_has_one_rate() -> None:
    for given in GENERATORS:
        for name, _ in made("M", **given).named_parameters():
            assert sum(name.startswith(group.parameters) for group in Idpg.groups.values()) == 1, name
