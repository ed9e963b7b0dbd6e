"""Multitask prompt tuning: the decomposition by its formulas, and what training makes of shared prompt and factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rows
import test_together as together
import tiny
from closeness import assert_close
from prompted import plain, prompted, rates_of, rows_of, several
from softprompts import injection
from softprompts.data import collate
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.methods import build_tasks, fold, parse_options
from softprompts.methods.multitask import MultitaskPromptTuning
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import PromptInit, PromptSpec
from trainees import fit

P, D = 6, 32
TASKS = ("mnli", "qqp", "sst2")
pytestmark = pytest.mark.golden


def made(tasks=TASKS, prompt=None, factors=None, length=P, width=D, **options):
    prompt = rows.random(1, length, width) if prompt is None else prompt
    spec, config = PromptSpec(length, width, width), MultitaskPromptTuning.Config(**options)
    return several(MultitaskPromptTuning, config, spec, PromptInit(prompt, factors=factors), tasks)


def put(methods, seed, ranks=1):
    """Random factors for every task; returns them as (u [P, r], v [r, D]) pairs."""
    pairs = []
    with torch.no_grad():
        for i, method in enumerate(methods.values()):
            pair = rows.random(seed + i, P, ranks) + 1, rows.random(seed + 50 + i, ranks, D) + 1
            method.columns.copy_(pair[0])
            method.rows.copy_(pair[1])
            pairs.append(pair)
    return pairs


# The decomposition


@pytest.mark.parametrize("ranks", [1, 3])
def test_factors_begin_at_one_and_give_the_shared_prompt_bit_for_bit(ranks):
    methods = made(ranks=ranks)
    shared = methods["mnli"].shared.prompt
    for method in methods.values():
        assert fold(method).equal(shared)
    assert rows_of(methods, [2, 0, 2]).equal(shared.expand(3, -1, -1))


def test_the_product_is_a_scaling_of_rows_and_columns():
    methods = made()
    for method, (u, v) in zip(methods.values(), put(methods, 3), strict=True):
        expected = torch.diag(u[:, 0]) @ method.shared.prompt @ torch.diag(v[0])
        assert_close(fold(method), expected)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 20), st.integers(0, 1000))
def test_the_gauge_is_free(scale, seed):
    methods = made(("a",))
    (pair,) = put(methods, seed)
    method = methods["a"]
    before = fold(method)
    with torch.no_grad():
        method.columns.copy_(pair[0] * scale)
        method.rows.copy_(pair[1] / scale)
    assert_close(fold(method), before)


def test_ranks():
    low = rows.random(7, P, 2) @ rows.random(8, 2, D)  # a shared prompt of rank 2
    methods = made(("a",), low)
    put(methods, 11)
    method = methods["a"]
    assert torch.linalg.matrix_rank((method.columns @ method.rows).detach()) == 1
    assert torch.linalg.matrix_rank(fold(method), rtol=1e-5) == 2
    wide = made(("a",), ranks=3)
    put(wide, 11, 3)
    assert torch.linalg.matrix_rank((wide["a"].columns @ wide["a"].rows).detach()) == 3
    zero = low.clone()
    zero[0] = 0
    assert fold(made(("a",), zero)["a"])[0].abs().sum() == 0  # zeros of the shared prompt stay


def test_gradients_are_those_of_the_formula():
    methods = made(("a",)).double()
    u, v = (x.double() for x in put(methods, 5)[0])
    gradient, method = rows.random(9, P, D).double(), methods["a"]
    (rows_of(methods, [0])[0] * gradient).sum().backward()
    shared = method.shared.prompt.detach()
    torch.testing.assert_close(method.shared.prompt.grad, gradient * (u @ v))
    torch.testing.assert_close(method.columns.grad[:, 0], (gradient * shared * v).sum(1))
    torch.testing.assert_close(method.rows.grad[0], (gradient * shared * u).sum(0))
    numbers = torch.autograd.gradcheck(
        lambda p, c, r: ((p * (c @ r)) ** 2).sum(),
        [x.detach().clone().requires_grad_() for x in (method.shared.prompt, method.columns, method.rows)],
    )
    assert numbers


def test_numbers_of_trained_parameters():
    def count(tasks):
        return sum(p.numel() for p in made(tasks, length=100, width=768).parameters())

    assert count(("a",)) == 77_668
    assert count([str(i) for i in range(8)]) // 8 == 10_468
    assert count([str(i) for i in range(8)]) % 8 == 0


def test_what_a_task_holds_alone_and_starts_that_bring_factors():
    methods = made()
    put(methods, 21)
    state = methods["qqp"].state_dict()
    assert sorted(state) == ["columns", "rows", "shared.prompt"]
    alone = made(("qqp",), torch.zeros(P, D))["qqp"]
    alone.load_state_dict(state)
    expected = fold(methods["qqp"])
    assert fold(alone).equal(expected)
    factors = state["columns"], state["rows"]
    again = made(("x", "y"), state["shared.prompt"], factors, start="normal")
    assert fold(again["x"]).equal(expected)
    assert fold(again["y"]).equal(expected)
    with pytest.raises(ValueError, match=r"start's columns are \[6, 1\], but 6 prompt tokens .* ranks 2 need \[6, 2\]"):
        made(("x",), None, factors, ranks=2)


def test_pefts_start_is_nearly_nothing():
    torch.manual_seed(0)
    assert fold(made(start="normal", length=100, width=768)["mnli"]).std() < 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 0}, "ranks must be a whole number of at least 1, given 0"),
        ({"factors": "frozen"}, "factors 'frozen' is unknown; possible: trained, fixed"),
        ({"start": "one"}, "start 'one' is unknown; possible: ones, normal"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        parse_options("multitask-prompt-tuning", options)


# Training


def tuned(name, site, tasks, seed=1, **options):
    base = together.double(name)
    spec, start = injection.prompt_spec(base, site, 4), together.random_start(base, site, 4, seed)
    config = MultitaskPromptTuning.Config(**options)
    methods = several(MultitaskPromptTuning, config, spec, PromptInit(start), tasks).double()
    with torch.no_grad():
        methods[tasks[0]].shared.prompt.copy_(start)
    return prompted(base, site, methods)


def losses(model, data, config, seed=0):
    return [report.loss for report in fit(model, data, config, seed=seed)]


@pytest.mark.parametrize(("name", "site"), [("llama", Site()), ("llama", Site("kv")), ("t5", Site()), ("bert", Site())])
def test_one_task_with_fixed_factors_is_prompt_tuning_curve_for_curve(name, site):
    data = together.encoded(name, 13, 1)
    usual = together.tuned(together.double(name), site, 4, 1)
    fixed = tuned(name, site, ("a",), factors="fixed")
    expected = losses(usual, data, together.config())
    assert losses(fixed, data, together.config()) == pytest.approx(expected, rel=1e-12)
    found = plain(usual.prompts["a"])
    torch.testing.assert_close(plain(fixed.prompts["a"]), found, rtol=1e-10, atol=0)
    assert float((found - plain(tuned(name, site, ("a",)).prompts["a"])).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("name", "site"), rows.cases(("llama", "gpt2", "qwen3", "opt", "gemma3", "t5", "bart", "bert"))
)
def test_folded_and_decomposed_answer_alike(name, site):
    """In every family and at every site; and a batch of several tasks answers as each task alone."""
    bb = tiny.backbone(name)
    spec = injection.prompt_spec(bb, site, P)
    torch.manual_seed(0)
    methods = build_tasks("multitask-prompt-tuning", {}, spec, PromptInit(rows.random(2, P, spec.width)), TASKS)
    with torch.no_grad():
        for i, method in enumerate(methods.values()):
            method.columns.add_(rows.random(i, P, 1))
            method.rows.add_(rows.random(9 + i, 1, spec.width))
    model = prompted(bb, site, methods)
    found = rows.batch(name, rows.texts(name), "right")
    task = torch.tensor([2, 0, 1, 2])
    batch = type(found)(found.input_ids, found.attention_mask, task, found.labels)
    with torch.no_grad():
        mixed = model.score(batch)
        for i in range(4):
            part = batch.rows(torch.tensor([i]))
            alone = model.score(part)
            folded = injection.score(bb, part, rows.single(fold(methods[TASKS[task[i]]])), site)
            torch.testing.assert_close(rows.of_row(mixed, i), alone.logits, rtol=1e-5, atol=2e-5)
            assert_close(folded.logits, alone.logits)


def test_absent_tasks_keep_factors_and_optimizer_state():
    """After a step without task `c`, whose factors had moved before, nothing of it has changed."""
    model = tuned("llama", Site(), ("a", "b", "c"))
    data = together.encoded("llama", 12, 3, tasks=3)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=0.05, weight_decay=0.1)

    def step(chosen):
        optimizer.zero_grad(set_to_none=True)
        objectives.task(training_step(model, collate(chosen, 0))).backward()
        optimizer.step()

    step(data)
    kept = [model.prompts["c"].columns, model.prompts["c"].rows]
    before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in kept]
    shared = model.prompts["a"].shared.prompt.detach().clone()
    step([row for row in data if row.task_id != 2])
    for parameter, (value, state) in zip(kept, before, strict=True):
        assert parameter.equal(value)
        assert all(optimizer.state[parameter][key].equal(own) for key, own in state.items())
    assert not model.prompts["a"].shared.prompt.equal(shared)


def test_groups_learn_at_their_own_rates():
    model = tuned("llama", Site(), ("a",))
    config = together.config(learning_rate=0.3, learning_rate_unit="rms", learning_rates={"factors": 0.4})
    groups = rates_of(model, config)
    found = {tuple(group["params"][0].shape): (len(group["params"]), group["rate"]) for group in groups}
    rms = model.backbone.embedding_rms
    assert found[4, 32] == (1, pytest.approx(0.3 * rms))  # the shared prompt in rms of the words
    assert found[4, 1] == (2, pytest.approx(0.4))  # factors as it stands
    usual = rates_of(model, together.config(learning_rate=0.3, learning_rate_unit="rms"))
    assert sorted(group["rate"] for group in usual) == pytest.approx(sorted([0.3, 0.3 * rms]))
