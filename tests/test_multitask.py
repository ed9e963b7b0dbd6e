"""Multitask prompt tuning: the decomposition by its formulas, and what training makes of shared prompt and factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rows
import test_together as together
import tiny
from softprompts import injection, methods
from softprompts.injection import Site
from softprompts.methods.multitask import MultitaskPromptTuning
from softprompts.model.learner import Learner
from softprompts.training import loop, objectives
from softprompts.types import Context, PromptInit, PromptSpec

P, D = 6, 32
TASKS = ("mnli", "qqp", "sst2")
pytestmark = pytest.mark.golden


def made(tasks=TASKS, prompt=None, factors=None, length=P, width=D, **options):
    prompt = rows.random(1, length, width) if prompt is None else prompt
    slot = PromptSpec(tuple(tasks), length, width, width)
    return MultitaskPromptTuning(MultitaskPromptTuning.Config(**options), slot, PromptInit(prompt, factors=factors))


def put(method, seed, ranks=1):
    """Random factors for every task; returns them as (u [P, r], v [r, D]) pairs."""
    pairs = []
    with torch.no_grad():
        for i in range(len(method.columns)):
            pair = rows.random(seed + i, P, ranks) + 1, rows.random(seed + 50 + i, ranks, D) + 1
            method.columns[i].copy_(pair[0])
            method.rows[i].copy_(pair[1])
            pairs.append(pair)
    return pairs


def prompts(method, task):
    ids = torch.zeros(len(task), 1, dtype=torch.long)
    found = method(Context(torch.tensor(task), ids, torch.zeros(len(task), 1, D), ids, lambda: torch.zeros(0)))
    return found.values[found.prompt_index]


# The decomposition


@pytest.mark.parametrize("ranks", [1, 3])
def test_factors_begin_at_one_and_give_the_shared_prompt_bit_for_bit(ranks):
    method = made(ranks=ranks)
    for task in TASKS:
        assert method.fold(task).equal(method.shared)
    assert prompts(method, [2, 0, 2]).equal(method.shared.expand(3, -1, -1))


def test_the_product_is_a_scaling_of_rows_and_columns():
    method = made()
    for task, (u, v) in zip(TASKS, put(method, 3), strict=True):
        expected = torch.diag(u[:, 0]) @ method.shared @ torch.diag(v[0])
        torch.testing.assert_close(method.fold(task), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 20), st.integers(0, 1000))
def test_the_gauge_is_free(scale, seed):
    method = made(("a",))
    (pair,) = put(method, seed)
    before = method.fold("a")
    with torch.no_grad():
        method.columns[0].copy_(pair[0] * scale)
        method.rows[0].copy_(pair[1] / scale)
    torch.testing.assert_close(method.fold("a"), before, rtol=1e-5, atol=1e-6)


def test_ranks():
    low = rows.random(7, P, 2) @ rows.random(8, 2, D)  # a shared prompt of rank 2
    method = made(("a",), low)
    put(method, 11)
    assert torch.linalg.matrix_rank((method.columns[0] @ method.rows[0]).detach()) == 1
    assert torch.linalg.matrix_rank(method.fold("a"), rtol=1e-5) == 2
    wide = made(("a",), ranks=3)
    put(wide, 11, 3)
    assert torch.linalg.matrix_rank((wide.columns[0] @ wide.rows[0]).detach()) == 3
    zero = low.clone()
    zero[0] = 0
    assert made(("a",), zero).fold("a")[0].abs().sum() == 0  # zeros of the shared prompt stay


def test_gradients_are_those_of_the_formula():
    method = made(("a",)).double()
    u, v = (x.double() for x in put(method, 5)[0])
    gradient = rows.random(9, P, D).double()
    ids = torch.zeros(1, 1, dtype=torch.long)
    found = method(Context(ids[0], ids, torch.zeros(1, 1, D), ids, lambda: torch.zeros(0)))
    (found.values[0] * gradient).sum().backward()
    shared = method.shared.detach()
    torch.testing.assert_close(method.shared.grad, gradient * (u @ v))
    torch.testing.assert_close(method.columns[0].grad[:, 0], (gradient * shared * v).sum(1))
    torch.testing.assert_close(method.rows[0].grad[0], (gradient * shared * u).sum(0))
    numbers = torch.autograd.gradcheck(
        lambda p, c, r: ((p * (c @ r)) ** 2).sum(),
        [x.detach().clone().requires_grad_() for x in (method.shared, method.columns[0], method.rows[0])],
    )
    assert numbers


def test_numbers_of_trained_parameters():
    def count(tasks):
        return sum(p.numel() for p in made(tasks, length=100, width=768).parameters())

    assert count(("a",)) == 77_668
    assert count([str(i) for i in range(8)]) // 8 == 10_468
    assert count([str(i) for i in range(8)]) % 8 == 0


def test_what_a_task_holds_alone_and_starts_that_bring_factors():
    method = made()
    put(method, 21)
    state = methods.state_of(method, "qqp")
    assert sorted(state) == ["columns.0", "rows.0", "shared"]
    alone = made(("qqp",), torch.zeros(P, D))
    alone.load_state_dict(state)
    assert alone.fold("qqp").equal(method.fold("qqp"))
    factors = state["columns.0"], state["rows.0"]
    again = made(("x", "y"), method.shared.detach(), factors, start="normal")
    assert again.fold("x").equal(method.fold("qqp"))
    assert again.fold("y").equal(method.fold("qqp"))
    with pytest.raises(ValueError, match=r"start's columns are \[6, 1\], but 6 prompt tokens .* ranks 2 need \[6, 2\]"):
        made(("x",), None, factors, ranks=2)


def test_pefts_start_is_nearly_nothing():
    torch.manual_seed(0)
    assert made(start="normal", length=100, width=768).fold("mnli").std() < 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 0}, "ranks must be a positive number, given 0"),
        ({"factors": "frozen"}, "factors 'frozen' is unknown; possible: trained, fixed"),
        ({"start": "one"}, "start 'one' is unknown; possible: ones, normal"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        MultitaskPromptTuning.Config(**options)


# Training


def learner(name, site, tasks, seed=1, **options):
    base = together.double(name)
    slot = injection.prompt_spec(base, site, tasks, 4)
    start = torch.randn(4, slot.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3
    method = MultitaskPromptTuning(MultitaskPromptTuning.Config(**options), slot, PromptInit(start)).double()
    with torch.no_grad():
        method.shared.copy_(start)
    return Learner(base, site, slot, method)


def losses(one, data, config, seed=0):
    return [report.loss for report in loop.fit(one, data, config, pad=0, seed=seed)]


@pytest.mark.parametrize(("name", "site"), [("llama", Site()), ("llama", Site("kv")), ("t5", Site()), ("bert", Site())])
def test_one_task_with_fixed_factors_is_prompt_tuning_curve_for_curve(name, site):
    data = together.encoded(name, 13, 1)
    plain = together.learner(together.double(name), site, 4, 1)
    fixed = learner(name, site, ("a",), factors="fixed")
    expected = losses(plain, data, together.config())
    assert losses(fixed, data, together.config()) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(fixed.method.fold("a"), plain.method.fold("a"), rtol=1e-10, atol=0)
    assert float((plain.method.fold("a") - learner(name, site, ("a",)).method.fold("a")).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("name", "site"), rows.cases(("llama", "gpt2", "qwen3", "opt", "gemma3", "t5", "bart", "bert"))
)
def test_folded_and_decomposed_answer_alike(name, site):
    """In every family and at every site; and a batch of several tasks answers as each task alone."""
    bb = tiny.backbone(name)
    slot = injection.prompt_spec(bb, site, TASKS, P)
    torch.manual_seed(0)
    method = MultitaskPromptTuning(MultitaskPromptTuning.Config(), slot, PromptInit(rows.random(2, P, slot.width)))
    with torch.no_grad():
        for i in range(len(TASKS)):
            method.columns[i].add_(rows.random(i, P, 1))
            method.rows[i].add_(rows.random(9 + i, 1, slot.width))
    one = Learner(bb, site, slot, method)
    found = rows.batch(name, rows.texts(name), "right")
    task = torch.tensor([2, 0, 1, 2])
    batch = type(found)(found.input_ids, found.attention_mask, task, found.labels)
    with torch.no_grad():
        mixed = one.forward(batch, one.prompt(batch))
        for i in range(4):
            part = batch.rows(torch.tensor([i]))
            alone = one.forward(part, one.prompt(part))
            folded = injection.score(bb, part, rows.single(method.fold(TASKS[task[i]])), site)
            torch.testing.assert_close(rows.of_row(mixed, i), alone.logits, rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(folded.logits, alone.logits, rtol=1e-6, atol=1e-6)


def test_absent_tasks_keep_factors_and_optimizer_state():
    """After a step without task `c`, whose factors had moved before, nothing of it has changed."""
    one = learner("llama", Site(), ("a", "b", "c"))
    data = together.encoded("llama", 12, 3, tasks=3)
    optimizer = torch.optim.AdamW(one.parameters().values(), lr=0.05, weight_decay=0.1)

    def step(chosen):
        optimizer.zero_grad(set_to_none=True)
        batch = together.train.collate(chosen, 0)
        objectives.task(one.step(batch)).backward()
        optimizer.step()

    step(data)
    kept = [one.method.columns[2], one.method.rows[2]]
    before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in kept]
    shared = one.method.shared.detach().clone()
    step([row for row in data if row.task != 2])
    for parameter, (value, state) in zip(kept, before, strict=True):
        assert parameter.equal(value)
        assert all(optimizer.state[parameter][key].equal(own) for key, own in state.items())
    assert not one.method.shared.equal(shared)


def test_groups_learn_at_their_own_rates():
    one = learner("llama", Site(), ("a",))
    config = together.config(rate=0.3, rate_unit="rms", rates={"factors": 0.4})
    optimizer = loop.build_optimizer(one, one.parameters(), config)
    found = {tuple(group["params"][0].shape): (len(group["params"]), group["rate"]) for group in optimizer.param_groups}
    rms = one.backbone.embedding_rms
    assert found[4, 32] == (1, pytest.approx(0.3 * rms))  # the shared prompt in rms of the words
    assert found[4, 1] == (2, pytest.approx(0.4))  # factors as it stands
    plain = loop.build_optimizer(one, one.parameters(), together.config(rate=0.3, rate_unit="rms"))
    assert sorted(group["rate"] for group in plain.param_groups) == pytest.approx(sorted([0.3, 0.3 * rms]))
