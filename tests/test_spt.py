"""The reconstruction of semi-parametric prompt tuning: retrieval against loops, what learns, and which words ask."""

import functools
import math
import pickle
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import tiny
from closeness import assert_close
from prompted import each, prompted, prompts_of, spec_of, tensors
from rows import INPUT
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.methods import METHODS, build, build_tasks
from softprompts.methods.spt import SemiParametric, best, products
from softprompts.model import SoftPromptModel, initialization
from softprompts.model.registry import NewPrompt
from softprompts.training import objectives
from softprompts.training.shared_batch import training_step
from softprompts.types import IGNORE, Batch, Context, Prompt, PromptInit, PromptSpec

P, K, D, N = 5, 3, 8, 40
NAME = "spt-reconstruction"
FAISS = pytest.mark.filterwarnings("ignore:builtin type [sS]wig:DeprecationWarning")


def made(memory: Tensor | None = None, **options: Any) -> SemiParametric:
    """A method whose memory is `memory [N, D]`, by default random; one long trained prompt of which all is."""
    memory = rows.random(1, N, D) if memory is None else memory
    config = SemiParametric.Config(**{"k": K, **options})
    spec = PromptSpec(P, memory.shape[1], memory.shape[1])
    return SemiParametric(config, spec, PromptInit(rows.random(2, P, memory.shape[1]), memory[None]))


def prompts(method: SemiParametric, seen: Context) -> Prompt:
    """The distinct prompts of one task's rows."""
    return prompts_of({"one": method}, [0] * len(seen.input_ids), seen)


def context(words: list[list[int]], text: int = 6, width: int = D, seed: int = 5) -> Context:
    """Rows of `text` tokens of which the numbered ones, in the order of their places, are of the template."""
    embeds, mark = rows.random(seed, len(words), text, width), torch.zeros(len(words), text, dtype=torch.long)
    for i, places in enumerate(words):
        mark[i, places] = 1
    there = torch.ones_like(mark)
    return Context(there, embeds, there, lambda: embeds, instruction_mask=mark)


def by_hand(memory: Tensor, queries: list[list[float]], k: int) -> list[int]:
    """The rows of the largest inner product with any query, number by number; of equal ones the first."""
    score = [max(sum(a * b for a, b in zip(q, row, strict=True)) for q in queries) for row in memory.tolist()]
    return sorted(range(len(score)), key=lambda j: (-score[j], j))[:k]


def numbers(length: int, seed: int, *shape: int) -> Tensor:
    """Small whole numbers as floats, whose products and sums are exact, so that ties are many and are ties."""
    return torch.randint(-length, length + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@torch.no_grad()
@pytest.mark.parametrize("query", ["mean", "words"])
@pytest.mark.parametrize("whole", [False, True])
def test_retrieval_is_the_largest_products_in_order(query: str, whole: bool) -> None:
    """Each row's k memory rows behind S, by loops; with whole numbers most of them are ties."""
    memory = numbers(1, 3, N, 4) if whole else rows.random(1, N, 4)
    method, seen = made(memory, query=query), context([[0, 3], [5], [1, 2, 4, 5]], width=4)
    if whole:
        seen = replace(seen, inputs_embeds=numbers(2, 4, 3, 6, 4))
    prompt = prompts(method, seen)
    for i in range(3):
        words = seen.inputs_embeds[i][seen.instruction_mask[i].bool()].tolist()
        if query == "mean":
            words = [[sum(column) / len(words) for column in zip(*words, strict=True)]]
        values = prompt.values[prompt.prompt_index[i]]
        assert torch.equal(values[: P - K], method.shared.soft)
        assert torch.equal(values[P - K :], memory[by_hand(memory, words, K)])


@torch.no_grad()
@FAISS
@pytest.mark.parametrize("query", ["mean", "words"])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_an_index_finds_what_brute_force_finds(query: str, length: int) -> None:
    """Random memories, some of whole numbers with ties beyond the k-th, equal rows and rows that are all equal."""
    pytest.importorskip("faiss")
    for seed in range(6):
        memory = numbers(length, seed, 300, 5) if seed % 2 else rows.random(seed, 300, 5)
        memory[100:120] = memory[7]
        plain, fast = (made(memory, query=query, index=index) for index in ("torch", "faiss"))
        seen = context([[0], [1, 2], [3, 4, 5]], width=5, seed=seed)
        seen = replace(seen, inputs_embeds=numbers(2, seed, 3, 6, 5)) if seed % 2 else seen
        one, two = prompts(plain, seen), prompts(fast, seen)
        assert torch.equal(each(one), each(two))
    assert torch.equal(pickle.loads(pickle.dumps(fast))(seen).prompt, two.values), "an index stays behind"
    fast.load_state_dict({**fast.state_dict(), "shared.sources": rows.random(9, 1, 300, 5)})
    assert torch.equal(fast(seen).prompt, made(rows.random(9, 300, 5), query=query)(seen).prompt)


@torch.no_grad()
def test_it_is_a_nearest_neighbor_among_rows_made_equally_long() -> None:
    """The largest product is the smallest distance from [q; 0] to [B_j; sqrt(M² - |B_j|²)], and not to B_j."""
    memory, differs = rows.random(1, N, D), 0
    longest = memory.norm(dim=1).max()
    padded = torch.cat([memory, (longest**2 - memory.square().sum(1, keepdim=True)).clamp(min=0).sqrt()], 1)
    for seed in range(20):
        query = rows.random(100 + seed, 1, D)
        near = (padded - torch.cat([query, torch.zeros(1, 1)], 1)).norm(dim=1)
        found = best(products(memory, query), K)
        assert found.tolist() == near.sort().indices[:K].tolist()
        differs += found.tolist() != (memory - query).norm(dim=1).sort().indices[:K].tolist()
    assert differs > 10


@torch.no_grad()
def test_a_long_row_is_retrieved_by_everyone_and_the_entropy_says_so() -> None:
    """Products are not normalized: with long rows few answer for all. All alike: log k; spread: more."""
    seen = context([[i % 6] for i in range(8)])
    seen = replace(seen, inputs_embeds=seen.inputs_embeds.abs())  # so that a long positive row wins with every query
    memory = rows.random(1, N, D)
    spread = made(memory)(seen).measures["retrieval_entropy"]
    memory[17] = memory[17].abs() * 1000
    method = made(memory)
    prompt = prompts(method, seen)
    assert all(torch.equal(values[P - K], memory[17]) for values in prompt.values)
    assert len(prompt.values) == 8
    counts: dict[int, int] = {}
    for values in prompt.values[prompt.prompt_index]:
        for row in values[P - K :]:
            place = int((memory == row).all(1).nonzero())
            counts[place] = counts.get(place, 0) + 1
    by_hand = -sum(c / (8 * K) * math.log(c / (8 * K)) for c in counts.values())
    assert float(prompt.aux["retrieval_entropy"]) == pytest.approx(by_hand, abs=1e-5)
    assert float(spread) > by_hand
    alike = replace(
        seen,
        inputs_embeds=seen.inputs_embeds[:1].expand(8, -1, -1),
        instruction_mask=seen.instruction_mask[:1].expand(8, -1),
    )
    assert float(method(alike).measures["retrieval_entropy"]) == pytest.approx(math.log(K), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("query", ["mean", "words"])
@pytest.mark.parametrize("retrieval", ["hard", "soft"])
def test_the_same_words_retrieve_the_same(query: str, retrieval: str) -> None:
    """Whatever else the text says, wherever they stand, beside whoever, however padded; other words something else."""
    method = made(query=query, retrieval=retrieval, temperature=0.1)
    h, other = rows.random(20, 3, D), rows.random(21, 2, D)
    cases = [(h, [0, 1, 2]), (h, [1, 4, 6]), (other, [2, 3]), (h, [0, 2, 6]), (h[:2], [0, 1]), (h[:0], [])]
    embeds, mark = rows.random(22, 6, 7, D), torch.zeros(6, 7, dtype=torch.long)
    for i, (words, places) in enumerate(cases):
        embeds[i, places], mark[i, places] = words, 1
    mask = torch.ones(6, 7, dtype=torch.long)
    prompt = prompts(method, Context(mask, embeds, mask, lambda: embeds, instruction_mask=mark))
    assert len(prompt.values) == 4
    assert prompt.prompt_index[0] == prompt.prompt_index[1] == prompt.prompt_index[3]
    assert len(set(prompt.prompt_index.tolist())) == 4
    different = {tuple(prompt.values[u, P - K :].flatten().tolist()) for u in range(4)}
    assert len(different) == 4
    for i in range(6):
        pad = torch.full((1, 5, D), 9.0)
        one = torch.cat([pad, embeds[i : i + 1]], 1)
        there, marked = (torch.nn.functional.pad(x[i : i + 1], (5, 0)) for x in (mask, mark))
        alone = method(Context(there, one, there, lambda: one, instruction_mask=marked))  # noqa: B023
        assert torch.equal(alone.prompt[0], prompt.values[prompt.prompt_index[i]])
    # Nothing retrieved by no words: all products are equal, so the first rows answer.
    if retrieval == "hard":
        assert torch.equal(prompt.values[prompt.prompt_index[5], P - K :], method.memory[:K])


@torch.no_grad()
def test_where_nobody_says_which_words_all_count_but_answers_and_padding() -> None:
    method, seen = made(), context([[0, 1, 2, 3], [0, 1]])
    mask = seen.instruction_mask
    without = Context(seen.input_ids, seen.inputs_embeds, mask, seen.encode)
    assert torch.equal(method(without).prompt, method(replace(seen, attention_mask=torch.ones_like(mask))).prompt)
    both = method(replace(seen, instruction_mask=torch.ones_like(mask), attention_mask=mask))
    assert torch.equal(both.prompt, method(without).prompt)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3])
def test_cold_soft_retrieval_is_hard_retrieval(k: int) -> None:
    memory, seen = rows.random(1, N, D), context([[0, 3], [5]])
    hard = made(memory, k=k)(seen)
    soft = made(memory, k=k, retrieval="soft", temperature=1e-6)(seen)
    assert_close(soft.prompt, hard.prompt)
    entropies = [float(output.measures["retrieval_entropy"]) for output in (soft, hard)]
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-5)


@torch.no_grad()
def test_warm_soft_retrieval_is_the_formula() -> None:
    """The i-th mixture, by loops: all rows but the i - 1 best, by softmax of product with the mean over temperature."""
    memory, seen = rows.random(1, N, D), context([[1, 2, 4]])
    mean = (seen.inputs_embeds[0, 1] + seen.inputs_embeds[0, 2] + seen.inputs_embeds[0, 4]) / 3
    prompt = prompts(made(memory, retrieval="soft", temperature=0.5), seen)
    scores = [sum(a * b for a, b in zip(row, mean.tolist(), strict=True)) / 0.5 for row in memory.tolist()]
    ranked, spread = sorted(range(N), key=lambda j: -scores[j]), [0.0] * N
    for i in range(K):
        rest = ranked[i:]
        total = sum(math.exp(scores[j]) for j in rest)
        for j in rest:
            spread[j] += math.exp(scores[j]) / total / K
        expected = sum(math.exp(scores[j]) / total * memory[j] for j in rest)
        assert_close(prompt.values[0, P - K + i], expected)
    entropy = -sum(p * math.log(p) for p in spread)
    assert float(prompt.aux["retrieval_entropy"]) == pytest.approx(entropy, abs=1e-5)


def test_soft_retrieval_teaches_the_memory_by_values_and_by_products() -> None:
    """Its gradient is that of finite differences, and reaches every row."""
    method, seen = made(rows.random(1, 12, 4), retrieval="soft", temperature=0.5, trained=True), context([[2]], width=4)
    method, weights = method.double(), rows.random(7, P, 4).double()
    given = method.shared.sources.detach().clone().requires_grad_()

    def result(sources: Tensor) -> Tensor:
        return (torch.func.functional_call(method, {"shared.sources": sources}, (seen,)).prompt[0] * weights).sum()

    assert torch.autograd.gradcheck(result, (given,), eps=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(result(given), given)
    assert gradient.abs().sum(2).min() > 0


def tuned(name: str = "llama", bank: int = 30, **options: Any) -> SoftPromptModel:
    """The method for two tasks on a tiny model, whose memory is its vocabulary's first words."""
    bb = tiny.backbone(name)
    spec = injection.prompt_spec(bb, INPUT, P)
    memory = bb.embed(torch.arange(5, 5 + bank)).float()
    start = PromptInit(rows.random(5, P, spec.width), memory[None])
    return prompted(bb, INPUT, build_tasks(NAME, {"k": K, **options}, spec, start, ("one", "two")))


def batch_of(name: str = "llama", count: int = 4, side: str = "left") -> Batch:
    """Texts whose first two tokens are no labels and of the template; the last row has the first one's words."""
    texts = rows.texts(name, [5 + (3 * i) % 4 for i in range(count)])
    texts[-1][:2] = texts[0][:2]
    found = rows.batch(name, texts, side)
    first = (found.attention_mask.cumsum(1) <= 2) & found.attention_mask.bool()
    labels = found.labels if name in tiny.SEQ2SEQ else found.labels.masked_fill(first, IGNORE)
    return replace(found, labels=labels, instruction_mask=first.long(), task_ids=torch.arange(count) % 2)


@pytest.mark.parametrize("retrieval", ["hard", "soft"])
@pytest.mark.parametrize("trained", [False, True])
def test_what_learns(retrieval: str, trained: bool) -> None:
    """One step of SGD: a frozen memory stays to the bit; a trained one moves where it was retrieved, softly all."""
    model = tuned(retrieval=retrieval, trained=trained)
    method = model.prompts["one"]
    memory, soft = method.memory.detach().clone(), method.shared.soft.detach().clone()
    assert set(tensors(model)) == {"one.shared.soft"} | ({"one.shared.sources"} if trained else set())
    optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
    step = training_step(model, batch_of())
    assert len(step.prompt.values) == 3
    retrieved = {
        int((memory == row).all(1).nonzero())
        for values in (step.prompt.values[:, P - K :] if retrieval == "hard" else [])
        for row in values
    }
    objectives.task(step).backward()
    optimizer.step()
    moved = (method.memory != memory).any(1).nonzero()[:, 0].tolist()
    assert not torch.equal(method.shared.soft, soft)
    assert set(moved) == (set() if not trained else retrieved if retrieval == "hard" else set(range(30)))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_without_memory_it_is_prompt_tuning_bit_for_bit(name: str) -> None:
    model = tuned(name, k=0)
    plain = prompted(
        model.backbone, INPUT, build("prompt-tuning", {}, spec_of(model), PromptInit(rows.random(5, P, 32)))
    )
    batch = replace(batch_of(name), task_ids=torch.zeros(4, dtype=torch.long))
    mine, theirs = training_step(model, batch), training_step(plain, batch)
    assert torch.equal(mine.output.logits, theirs.output.logits)
    objectives.task(mine).backward()
    objectives.task(theirs).backward()
    assert torch.equal(model.prompts["one"].shared.soft.grad, plain.prompts["a"].prompt.grad)
    assert list(model.state_dict()) == ["prompts.one.shared.soft"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_row_beside_another_method_is_the_row_alone(name: str) -> None:
    """On every path, the memory's rows between S and the text by hand."""
    model, batch = tuned(name), batch_of(name)
    spec = replace(spec_of(model), length=2)
    other = build("prompt-tuning", {}, spec, PromptInit(rows.random(7, 2, 32)))
    model.registry.add(NewPrompt("plain", other, model.registry.records["one"]), model.device)
    method, batch = model.prompts["one"], replace(batch, task_ids=torch.tensor([0, 2, 2, 0]))
    for path in (None, *rows.paths(name, INPUT)):
        output = model.score(batch, path=path)
        for i in range(4):
            row = batch.rows(torch.tensor([i]))
            values = other.prompt
            if i in (0, 3):
                words = model.backbone.embed(row.input_ids)[0][row.instruction_mask[0].bool()]
                chosen = by_hand(method.memory, words.mean(0, keepdim=True).tolist(), K)
                values = torch.cat([method.shared.soft, method.memory[chosen]])
            alone = injection.score(model.backbone, row, rows.single(values, 1), INPUT).logits
            torch.testing.assert_close(rows.of_row(output, i), alone, atol=1e-5, rtol=1e-5)


def test_start_tasks_and_names() -> None:
    """S begins at the first rows of the start and is one for all tasks; trained prompts can be the memory."""
    assert NAME in METHODS
    spec, start = PromptSpec(P, D, D), PromptInit(rows.random(2, P, D), rows.random(1, 1, N, D))
    methods = torch.nn.ModuleDict(build_tasks(NAME, {"k": K}, spec, start, ("one", "two")))
    method = methods["two"]
    assert torch.equal(method.shared.soft, rows.random(2, P, D)[: P - K])
    assert sum(p.numel() for p in methods.parameters()) == (P - K) * D
    assert method.shares_parameters
    assert {name: group.unit for name, group in method.groups.items()} == {"prompt": "rms", "memory": "rms"}
    sources = rows.random(3, 2, P, D)
    found = build(NAME, {"k": 2}, PromptSpec(P, D, D), PromptInit(torch.zeros(P, D), sources))
    assert torch.equal(found.memory, torch.cat([sources[0], sources[1]]))
    calls = []

    def draw(count: int, population: int | None) -> Tensor:
        calls.append((count, population))
        return rows.random(4, count, D)

    found = build(
        NAME,
        {"k": 2, "bank": 9, "population": 50},
        PromptSpec(P, D, D),
        PromptInit(torch.zeros(P, D), draw=draw),
    )
    assert calls == [(9, 50)]
    assert torch.equal(found.memory, rows.random(4, 9, D))


@pytest.mark.parametrize(
    ("options", "sources", "message"),
    [
        ({}, None, f"method {NAME}: .*k 5 leaves no room .* prompt.num_virtual_tokens 5 counts both"),
        ({"k": 3}, None, "its memory needs words of a model, or trained prompts in prompt.init.sources"),
        ({"k": 3}, torch.zeros(1, 2, D), "a memory of 2 rows cannot give k = 3; enlarge prompt.init.sources"),
        ({"k": -1}, None, f"options of method {NAME}: k must be a whole number of at least 0, given -1"),
        ({"bank": 0}, None, "bank must be a whole number of at least 1, given 0"),
        ({"population": 0}, None, "population must be a whole number of at least 1, given 0"),
        ({"query": "max"}, None, "query 'max' is unknown; possible: mean, words"),
        ({"retrieval": "both"}, None, "retrieval 'both' is unknown; possible: hard, soft"),
        ({"index": "usearch"}, None, "index 'usearch' is unknown; possible: torch, faiss"),
        ({"temperature": 0}, None, "temperature must be a number above 0, given 0"),
        ({"index": "faiss", "trained": True}, None, "index 'faiss' finds rows of a frozen memory"),
        ({"index": "faiss", "retrieval": "soft"}, None, "index 'faiss' finds rows of a frozen memory"),
        ({"size": 1}, None, "'size' is unknown"),
        ({"trained": "no"}, None, "trained must be true or false, given 'no'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], sources: Tensor | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(NAME, options, PromptSpec(P, D, D), PromptInit(torch.zeros(P, D), sources))


def test_more_of_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words too few for the memory, sites of another width, faiss where it is not."""
    start = PromptInit(torch.zeros(P, D), draw=lambda count, population: torch.zeros(count, D))
    with pytest.raises(ConfigError, match=r"a memory of 2 rows cannot give k = 3; enlarge prompt.options.bank"):
        build(NAME, {"k": 3, "bank": 2}, PromptSpec(P, D, D), start)
    few = functools.partial(initialization.sample_vocabulary, tiny.backbone("llama"), generator=torch.Generator())
    start = PromptInit(torch.zeros(P, D), draw=lambda count, population: few(count, population).float())
    message = "its memory, prompt.options.bank: 40 different words are needed, but only 20 can be drawn; ask for fewer"
    with pytest.raises(ConfigError, match=message + ", or set a population above 20$"):
        build(NAME, {"k": 2, "bank": 40, "population": 20}, PromptSpec(P, D, D), start)
    with pytest.raises(ConfigError, match=r"1000 different words are needed, but only .* can be drawn; ask for fewer$"):
        build(NAME, {"k": 2}, PromptSpec(P, D, D), start)
    for slot in (PromptSpec(P, D, D - 1), PromptSpec(P, D, D, 0, (D,))):
        with pytest.raises(
            ConfigError, match=r"its memory has the width of the embeddings, ., and .* use site input or"
        ):
            build(NAME, {"k": 3}, slot, start)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"faiss, which is not installed: pip install 'softprompts\[retrieval\]'"):
        build(NAME, {"k": 3, "index": "faiss"}, PromptSpec(P, D, D), start)
