"""IDPG against its formula written out by hand: generators, kinds, sizes, encoders, gradients, layers, mixed rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rows
import tiny
from closeness import GRADIENT_ROUNDINGS, assert_close
from prompted import each, methods_of, prompted, prompts_of, several, spec_of
from rows import INPUT, called
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.methods import build, build_tasks
from softprompts.methods.idpg import Idpg, phm
from softprompts.model import SoftPromptModel
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import IGNORE, Batch, Context, PromptInit, PromptSpec, pool_states

P, E, B, T = 3, 8, 5, 7
WIDTHS = {"S": (12, ()), "M": (12, (4, 4, 4)), "L": (12, (4, 4, 4))}
TASKS = ("one", "two")
LENGTHS = (7, 3, 1, 5, 0)
TASK = [1, 0, 1, 1, 0]
GENERATORS = (
    {"generator": "linear"},
    {"generator": "dnn", "hidden": 6},
    {"generator": "phm", "hidden": 4, "phm": 2},
    {"generator": "phm", "hidden": 8, "phm": 4, "shared": True},
)


def options(**given: Any) -> dict[str, Any]:
    """Small options that read word embeddings as they are."""
    return {"encoder": "static", "normalize": False, **given}


def made(kind: str = "S", tasks: tuple[str, ...] = TASKS, **given: Any) -> Any:
    """Methods whose every parameter is random, in float64 and eval mode."""
    width, layers = WIDTHS[kind]
    spec = PromptSpec(P, width, E, layers=layers, encoders={"backbone": 6, "minilm": 10})
    config, start = Idpg.Config(**options(kind=kind, **given)), PromptInit(rows.random(0, P, width))
    methods = several(Idpg, config, spec, start, tasks).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(methods.parameters()):
            parameter.copy_(rows.random(20 + i, *parameter.shape).double())
    return methods


def context(side: str = "right", extra: int = 0, filler: float = 50.0) -> Context:
    """Texts of several lengths, the last one empty; what stands on padding is larger than all text."""
    embeds, mask = torch.full((B, T + extra, E), filler, dtype=torch.float64), torch.zeros(B, T + extra)
    for i, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(T + extra - length, T + extra)
        embeds[i, where], mask[i, where] = rows.random(30 + i, length, E).double(), 1
    return Context(mask.long(), embeds, mask.long(), lambda: embeds[..., :6])


def weights(method: Idpg, name: str, generator: int) -> Any:
    """W1 or W2 as a plain matrix; of PHM number by number from the definition of the Kronecker product."""
    weight = getattr(method, name)[generator].detach().numpy()
    if method.config.generator != "phm":
        return weight
    rules = getattr(method, "rules" if method.config.shared else f"rules_{name}")[generator].detach().numpy()
    n, high, wide = weight.shape
    found = np.zeros((n * high, n * wide))
    for a, b in zip(rules, weight, strict=True):
        for row in range(n * high):
            for column in range(n * wide):
                found[row, column] += a[row // high, column // wide] * b[row % high, column % wide]
    return found


def gelu(value: float) -> float:
    return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))


def by_hand(method: Idpg, row: Tensor) -> Any:
    """The prompt [P, D] of one text `row [T, E]` without padding."""
    x = [sum(float(token[i]) for token in row) / max(1, len(row)) for i in range(E)]
    if method.config.normalize:
        size = math.sqrt(sum(value**2 for value in x) / E)
        x = [value / size if size else 0.0 for value in x]
    layers = method.spec.layers if method.kind != "S" else (method.spec.width,)
    found = method.bias.detach().numpy().copy()
    at = 0
    for layer, width in enumerate(layers):
        number = layer if method.kind == "L" else 0
        inner = x
        if method.config.generator != "linear":
            bias = method.hidden[number].tolist()
            inner = [gelu(v + b) for v, b in zip(weights(method, "down", number) @ x, bias, strict=True)]
        out = weights(method, "up", number) @ inner
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
        methods, seen = made(kind, **given, normalize=normalize), context(side, extra)
        prompt = prompts_of(methods, TASK, seen)
        values = each(prompt)
        assert values.shape == (B, P, 12)
        assert prompt.mask.all()
        for i, task in enumerate(TASK):
            expected = by_hand(methods[TASKS[task]], seen.inputs_embeds[i][seen.attention_mask[i].bool()])
            np.testing.assert_allclose(values[i].numpy(), expected, atol=1e-12)
        own = values - torch.stack([methods[TASKS[task]].bias for task in TASK])
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
    state |= {name: value[:, None] for name, value in state.items() if name.endswith((".up", ".down"))}
    state |= {f"{task}.rules_{name}": torch.ones(1, 1, 1, 1) for name in ("up", "down") for task in TASKS}
    hyper.load_state_dict(state)
    seen, noise = context(), rows.random(9, B, P, 12).double()
    for methods in (dense, hyper):
        (each(prompts_of(methods, TASK, seen)) * noise).sum().backward()
    found, expected = (each(prompts_of(methods, TASK, seen)) for methods in (hyper, dense))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for name in ("up", "down"):
        for task in TASKS:
            ours, theirs = getattr(hyper[task], name).grad[:, 0], getattr(dense[task], name).grad
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
    hidden = sizes.pop("hidden")
    assert hidden == given["hidden"]
    assert sum(sizes.values()) == count


def test_a_generator_for_each_layer_and_task() -> None:
    """Kind L has every part of kind M for each layer but the output bias, and each task has all of it."""
    for given in GENERATORS:
        one, layered = made("M", ("a",), **given)["a"], made("L", **given)["two"]
        for name, value in one.named_parameters():
            times = 1 if name == "bias" else 3
            assert getattr(layered, name).numel() == times * value.numel(), name
    assert {kind: build("idpg", {}, PromptSpec(16, 48, 32, layers=layers, encoders={"backbone": 32}),
                        PromptInit(torch.zeros(16, 48))).kind
            for kind, layers in (("none", ()), ("alike", (16,) * 3), ("mixed", (16, 32)))
            } == {"none": "S", "alike": "M", "mixed": "S"}  # fmt: skip


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("given", GENERATORS, ids=lambda g: "-".join(map(str, g.values())))
def test_gradients_are_those_of_finite_differences(kind: str, given: dict[str, Any]) -> None:
    method, seen = made(kind, **given)["one"], context()
    noise = rows.random(99, B, P, 12).double()
    names, values = zip(*method.named_parameters(), strict=True)

    def result(*now: Tensor) -> Tensor:
        prompt = torch.func.functional_call(method, dict(zip(names, now, strict=True)), (seen,))
        return (prompt * noise).sum()

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
        seen = Context(torch.ones(2, 3), rows.random(5, 2, 3, 256), torch.ones(2, 3), lambda: 1)
        assert torch.equal(zero(seen), start.expand(2, -1, -1))
        drawn = build("idpg", options(**given, start="normal", spread=0.2), slot, PromptInit(start))
        assert float((drawn(seen) - start).abs().max()) > 0.1
        assert torch.equal(drawn.bias, start)
        assert not zero.up.any()
        for name, value in drawn.named_parameters():
            if name != "bias":
                assert float(value.std()) == pytest.approx(0.2, rel=0.15), name
        for name, value in zero.named_parameters():
            if not name.startswith(("bias", "up")):
                assert float(value.std()) == pytest.approx(0.05, rel=0.15), name


def test_dropout_is_for_training_alone() -> None:
    """On M(x) and on the hidden units, with the chance asked for; what is left is scaled up."""
    method, seen = made(generator="dnn", hidden=6, dropout=0.25)["one"], context()
    expected = method(seen).detach()
    method.train()
    torch.manual_seed(0)
    many = torch.stack([method(seen).detach() for _ in range(4)])
    assert float(many.std(0)[[0, 1, 2, 3]].max()) > 1e-3
    method.eval()
    assert torch.equal(method(seen).detach(), expected)
    assert torch.equal(made(generator="dnn", hidden=6, dropout=0.0)["one"].train()(seen), expected)
    # On M(x): a linear generator without bias, over rows of ones, shows each unit's draw.
    linear = Idpg(
        Idpg.Config(**options(generator="linear", dropout=0.25)),
        PromptSpec(1, E, E),
        PromptInit(torch.zeros(1, E)),
    )
    with torch.no_grad():
        linear.up.copy_(torch.eye(E)[None])
    ones = torch.ones(500, 1, E)
    drawn = linear.train()(Context(ones[..., 0], ones, ones[..., 0], lambda: ones))
    assert sorted(drawn.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert float((drawn == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    # On the hidden units: without M(x), whatever is dropped is one of their biases' parts.
    with torch.no_grad():
        method.down.zero_()
        parts = method.up[0] * torch.nn.functional.gelu(method.hidden)
        found = (method.train()(seen)[1] - method.bias).flatten()
        draws = torch.cartesian_prod(*[torch.tensor([0.0, 1 / 0.75], dtype=torch.float64)] * 6)
        assert float((draws @ parts.T - found).abs().amax(1).min()) < 1e-12
        assert float((found - parts.sum(1)).abs().max()) > 1e-6


def test_no_gradient_reaches_what_is_read() -> None:
    method = made(generator="dnn", hidden=6)["one"]
    seen = context()
    seen.inputs_embeds.requires_grad_()
    method(seen).sum().backward()
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

    seen = Context(seen.input_ids, seen.inputs_embeds, seen.attention_mask, seen.encode, sentence)
    for given, expected in (
        ({"encoder": "backbone", "pool": "last"}, pool_states(seen.encode(), seen.attention_mask, "last")),
        ({"encoder": "backbone"}, pool_states(seen.encode(), seen.attention_mask, "mean")),  # what this slot says
        ({"encoder": "backbone", "cache": True, "pool": "first"}, rows.random(14, B, 6).double()),
        ({"encoder": "minilm"}, rows.random(6, B, 10).double()),
    ):
        methods = made(generator="linear", **given)
        values = each(prompts_of(methods, TASK, seen))
        for i, task in enumerate(TASK):
            method = methods[TASKS[task]]
            value = method.bias + (method.up[0] @ expected[i]).view(P, 12)
            torch.testing.assert_close(values[i], value, atol=1e-12, rtol=0)
    assert set(asked) == {"backbone-first", "minilm"}


@pytest.mark.parametrize(
    ("given", "slot", "message"),
    [
        ({"generator": "cnn"}, {}, "method idpg: generator 'cnn' is unknown; possible: linear, dnn, phm"),
        ({"encoder": "glove"}, {}, "encoder 'glove' is unknown; possible: static, backbone, minilm"),
        ({"hidden": 0}, {}, "hidden must be a whole number of at least 1, given 0"),
        ({"phm": 2.5}, {}, "phm must be a whole number of at least 1, given 2.5"),
        ({"dropout": 1}, {}, "dropout must be a number from 0 to below 1, given 1"),
        ({"spread": -1}, {}, "spread must be a number of at least 0, given -1"),
        ({"pool": "last", "encoder": "static"}, {}, "pool and cache are for encoder backbone, not static"),
        ({"heads": 2}, {}, "'heads' is unknown.* possible: kind, generator, hidden, phm, shared, encoder"),
        ({"shared": "no"}, {}, "shared must be true or false, given 'no'"),
        ({"hidden": True}, {}, "hidden must be a whole number of at least 1, given True"),
        ({"encoder": "minilm"}, {}, "method idpg: encoder 'minilm' is not available; possible: static, backbone"),
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


def tuned(
    name: str, site: injection.Site = INPUT, method: str = "idpg", spread: float = 0.0, **given: Any
) -> SoftPromptModel:
    """A method for two tasks on a tiny model; with `spread` its parameters are no longer those of the start."""
    bb = tiny.backbone(name)
    spec = injection.prompt_spec(bb, site, P)
    torch.manual_seed(0)
    model = prompted(bb, site, build_tasks(method, given, spec, PromptInit(rows.random(5, P, spec.width)), TASKS))
    with torch.no_grad():
        for i, parameter in enumerate(model.prompts.parameters() if spread else ()):
            parameter.add_(rows.random(70 + i, *parameter.shape) * spread)
    return model


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
    ours, theirs = tuned(name, site, phm=1), tuned(name, site, "prompt-tuning")
    batch = batch_of(name, [0, 1, 1, 0])
    steps = [training_step(model, batch) for model in (ours, theirs)]
    torch.testing.assert_close(steps[0].output.logits, steps[1].output.logits, atol=1e-5, rtol=1e-5)
    for step in steps:
        objectives.task(step).backward()
    for task in TASKS:
        mine, other = ours.prompts[task].bias.grad, theirs.prompts[task].prompt.grad
        assert float(other.abs().max()) > 1e-4
        assert_close(mine, other, GRADIENT_ROUNDINGS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_layers_of_zeros_are_the_prompt_at_the_input(name: str) -> None:
    """Kind S is kind L whose generators behind the first are 0, and the first part of kind M with the same weights."""
    single = tuned(name, spread=0.5, phm=4, hidden=8)
    deep = tuned(name, rows.ADD, kind="L", phm=4, hidden=8)
    shared = tuned(name, rows.ADD, kind="M", phm=4, hidden=8)
    for task in TASKS:
        for part, value in single.prompts[task].named_parameters():
            if part == "bias":
                for other in (deep, shared):
                    other.prompts[task].bias.zero_()[:, : value.shape[1]] = value
                continue
            getattr(deep.prompts[task], part).zero_()[0] = value[0]
            getattr(shared.prompts[task], part).copy_(value)
    batch = batch_of(name, [0, 1, 1, 0])
    prompts = [model.make_prompts(batch) for model in (single, deep, shared)]
    width = spec_of(single).width
    for other in prompts[1:]:
        torch.testing.assert_close(other.values[..., :width], prompts[0].values, atol=1e-5, rtol=1e-4)
    assert float((prompts[1].values[..., width:]).abs().max()) == 0
    expected = single.score(batch, prompts=prompts[0]).logits
    torch.testing.assert_close(deep.score(batch, prompts=prompts[1]).logits, expected, atol=1e-5, rtol=1e-5)
    # Kind M makes the same of the text for every layer: with weights of 0 too nothing but the input's prompt is left.
    made = prompts[2].values.unflatten(-1, (-1, width))
    assert float((made[:, :, 1] - made[:, :, -1]).abs().max()) < 1e-5
    assert float(made[:, :, 1].abs().max()) > 1e-3
    for one in (single, shared):
        for method in methods_of(one):
            method.up.zero_()
    expected = single.score(batch).logits
    torch.testing.assert_close(shared.score(batch).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layer_prompts_touch_the_prompts_positions_alone(name: str) -> None:
    """A layer's input is the output of the one before, with the layer's own part added on the prompt's positions."""
    one = tuned(name, rows.ADD, spread=0.5, phm=4)
    bb, batch = one.backbone, batch_of(name, [0, 1, 1], "right")
    prompt = one.make_prompts(batch)
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
    one = tuned(name, spread=0.3, phm=4, **given)
    tasks = [0, 1, 1, 0, 1]
    expected = each(one.make_prompts(batch_of(name, tasks)))
    assert float((expected[1] - expected[2]).abs().max()) > 1e-2
    for side, extra in (("right", 0), ("left", 4), ("right", 3)):
        one.registry.encoders.kept.clear()
        found = each(one.make_prompts(batch_of(name, tasks, side, extra)))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    batch = batch_of(name, tasks, "right", 3)
    for order in ([4, 2, 0, 1, 3], [2], [0, 0, 3]):
        one.registry.encoders.kept.clear()
        found = each(one.make_prompts(batch.rows(torch.tensor(order))))
        torch.testing.assert_close(found, expected[order], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "pool"), [("llama", "last"), ("t5", "mean"), ("bert", "first"), ("roberta", "first")])
def test_the_backbone_reads_the_text_alone(name: str, pool: str) -> None:
    """M(x) is the stock model's last hidden state of the text: of causal models what stands before the first label."""
    one = tuned(name, generator="linear", normalize=False)
    assert spec_of(one).pool == pool
    for method in methods_of(one):
        method.up.copy_(rows.random(3, *method.up.shape))
    batch = batch_of(name, [0, 1, 1, 0])
    prompt = one.make_prompts(batch)
    for i, task in enumerate(batch.task_ids.tolist()):
        ids = batch.input_ids[i][batch.attention_mask[i].bool()]
        ids = ids[:2] if name in tiny.CAUSAL else ids
        states = one.backbone.encoder(input_ids=ids[None]).last_hidden_state[0]
        state = {"last": states[-1], "first": states[0], "mean": states.mean(0)}[pool]
        method = methods_of(one)[task]
        expected = method.bias + (method.up[0] @ state).view(P, -1)
        torch.testing.assert_close(each(prompt)[i], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ALL)
def test_the_slot_tells_the_width_of_states(name: str) -> None:
    bb = tiny.backbone(name)
    batch = rows.batch(name, rows.texts(name, (3,)))
    states = injection.score(
        bb, Batch(batch.input_ids, batch.attention_mask, batch.task_ids), None, INPUT, return_hidden_states=True
    ).hidden_states
    assert injection.prompt_spec(bb, INPUT, P, {"minilm": 384}).encoders == {
        "backbone": states.shape[-1],
        "minilm": 384,
    }


@torch.no_grad()
def test_a_task_alone_answers_as_among_others() -> None:
    methods, seen = made("M", generator="phm", hidden=4, phm=2), context()
    prompts = each(prompts_of(methods, TASK, seen))
    for i, task in enumerate(TASKS):
        single = made("M", (task,), generator="phm", hidden=4, phm=2)[task]
        single.load_state_dict(methods[task].state_dict())
        index = (torch.tensor(TASK) == i).nonzero()[:, 0]
        torch.testing.assert_close(single(seen.rows(index)), prompts[index], atol=1e-12, rtol=0)
        assert float(single.rms()) == pytest.approx(float(single.bias.square().mean().sqrt()))


def test_every_parameter_has_one_rate() -> None:
    for given in GENERATORS:
        for name, _ in made("M", **given)["one"].named_parameters():
            assert sum(name.startswith(group.parameters) for group in Idpg.groups.values()) == 1, name
