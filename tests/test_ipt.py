"""Instance-wise prompt tuning against its equations by hand: tables, encoders, starts, counts, gradients."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rows
import tiny
from closeness import assert_close
from prompted import each, prompted, prompts_of, rates_of, spec_of
from rows import INPUT, KV, REPLACE, called
from softprompts import injection
from softprompts.config import TrainConfig
from softprompts.errors import BackboneError, ConfigError, PromptError
from softprompts.injection import generation
from softprompts.methods import build, build_tasks
from softprompts.methods.ipt import InstancePromptTuning
from softprompts.model import SoftPromptModel
from softprompts.training import objectives, optimizer
from softprompts.training.shared_batch import training_step
from softprompts.types import IGNORE, Batch, Context, Prompt, PromptInit, PromptSpec

P, D, V, T = 4, 6, 20, 9
TASKS = ("one", "two")
LENGTHS = (9, 2, 1, 4, 0, 6)
STRATEGIES = ("lookup", "cnn", "rnn", "mlp")
ENCODING = STRATEGIES[1:]


def made(options: dict[str, Any], length: int = P, layers: tuple[int, ...] = (), vocab_size: int = V) -> Any:
    """Methods of two tasks whose every parameter is random, in float64 and as in answering (without dropout)."""
    spec = PromptSpec(length, sum(layers) or D, D, vocab_size, layers)
    start = PromptInit(rows.random(0, length, spec.width))
    methods = torch.nn.ModuleDict(build_tasks("ipt", options, spec, start, TASKS))
    with torch.no_grad():
        for i, parameter in enumerate(methods.parameters()):
            parameter.copy_(rows.random(20 + i, *parameter.shape))
    return methods.double().eval()


def context(side: str = "right", extra: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Context:
    """Texts of several lengths; what stands on padding is a token of the vocabulary, and large embeddings."""
    count = len(lengths)
    ids = torch.full((count, T + extra), 7)
    embeds, mask = torch.full((count, T + extra, D), 50.0), torch.zeros(count, T + extra)
    for i, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(T + extra - length, T + extra)
        ids[i, where] = torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(i))
        embeds[i, where], mask[i, where] = rows.random(30 + i, length, D), 1
    return Context(ids, embeds, mask.long(), lambda: embeds)


def in_rows(methods: Any, seen: Context) -> Prompt:
    """The prompts of rows of both tasks in turn, in the order of the rows."""
    prompt = prompts_of(methods, [i % 2 for i in range(len(seen.input_ids))], seen)
    return Prompt(each(prompt), prompt.mask[prompt.prompt_index], torch.arange(len(prompt.prompt_index)))


def first(seen: Context, row: int, count: int) -> list[int]:
    """The first tokens of a row, by hand."""
    return [int(token) for token, there in zip(seen.input_ids[row], seen.attention_mask[row], strict=True) if there][
        :count
    ]


def vectors(method: Any, tokens: list[int]) -> list[Any]:
    """The table's vectors of tokens, by hand."""
    table = {name: value.detach().numpy() for name, value in method.shared.table.named_parameters()}
    kind, found = method.config.table, []
    for token in tokens:
        if kind == "low-rank":
            codes, directions = table["codes"][token], table["directions"]
            found.append(sum(code * direction for code, direction in zip(codes, directions, strict=True)))
        elif kind == "hashed":
            found.append(table["rows"][(token * 2654435769 % 2**32) * method.config.rows // 2**32])
        else:
            found.append(table["rows"][min(token, method.config.rows) if kind == "common" else token])
    return found


def encoded(method: Any, seen: list[Any]) -> Any:
    """The prompt [P, d] that an encoder makes of table vectors, number by number."""
    features = {"cnn": convolved, "rnn": recurrent, "mlp": mean}[method.config.strategy](method, seen)
    weight, bias = method.shared.linear.weight.detach().numpy(), method.shared.linear.bias.detach().numpy()
    p = [sum(weight[j, i] * features[i] for i in range(len(features))) + bias[j] for j in range(len(bias))]
    if method.config.strategy == "mlp":
        p = [max(0.0, value) for value in p]
    return np.array(p).reshape(method.spec.length, -1)


def convolved(method: Any, seen: list[Any]) -> list[float]:
    found = []
    for height, kernel in zip((3, 4, 5), method.shared.encoder.kernels, strict=True):
        weight, bias = kernel.weight.detach().numpy()[0], float(kernel.bias.detach())
        text = [*seen, *[np.zeros(D)] * max(0, height - len(seen))]
        windows = range(len(text) - height + 1)
        sums = [sum(float(weight[:, i] @ text[at + i]) for i in range(height)) + bias for at in windows]
        found.append(max(max(0.0, value) for value in sums))
    return found


def recurrent(method: Any, seen: list[Any]) -> list[float]:
    """A bi-LSTM of two layers by the equations in torch's documentation (gates in the order i, f, g, o)."""
    weights = {name: value.detach().numpy() for name, value in method.shared.encoder.lstm.named_parameters()}

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    def run(inputs: list[Any], suffix: str) -> list[Any]:
        h, c, states = np.zeros(64), np.zeros(64), []
        for x in inputs:
            gates = weights[f"weight_ih_{suffix}"] @ x + weights[f"bias_ih_{suffix}"]
            gates = gates + weights[f"weight_hh_{suffix}"] @ h + weights[f"bias_hh_{suffix}"]
            i, f, g, o = gates.reshape(4, 64)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            states.append(h)
        return states

    inputs = seen or [np.zeros(D)]
    for layer in ("l0", "l1"):
        ahead, back = run(inputs, layer), run(inputs[::-1], f"{layer}_reverse")
        inputs = [np.concatenate(pair) for pair in zip(ahead, back[::-1], strict=True)]
    return [*ahead[-1], *back[-1]]


def mean(method: Any, seen: list[Any]) -> Any:
    return sum(seen) / len(seen) if seen else np.zeros(D)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"table": "low-rank", "rank": 3},
        {"table": "hashed", "rows": 7},
        {"table": "common", "rows": 5},
        {"base": "start", "scale": 0.3},
    ],
    ids=str,
)
def test_lookup(options: dict[str, Any], side: str, extra: int) -> None:
    """p_i = T[x_i]; a text shorter than the prompt has a shorter one, or with a base nothing added to its end."""
    methods, seen = made(options), context(side, extra)
    prompt = in_rows(methods, seen)
    assert prompt.values.shape == (len(LENGTHS), P, D)
    for i in range(len(LENGTHS)):
        method = methods[TASKS[i % 2]]
        own = vectors(method, first(seen, i, P))
        if "base" in options:
            expected = method.prompt.detach().numpy().copy()
            for place, vector in enumerate(own):
                expected[place] += 0.3 * vector
            assert prompt.mask[i].all()
            np.testing.assert_allclose(prompt.values[i].numpy(), expected, atol=1e-12)
        else:
            assert prompt.mask[i].tolist() == [False] * (P - len(own)) + [True] * len(own)
            np.testing.assert_allclose(prompt.values[i][prompt.mask[i]].numpy(), np.reshape(own, (-1, D)), atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [None, 7])
@pytest.mark.parametrize("strategy", ENCODING)
def test_encoders(strategy: str, tokens: int | None, side: str) -> None:
    """All P tokens are made, from as many tokens as are read, whatever stands on padding."""
    methods, seen = made({"strategy": strategy, "tokens": tokens}), context(side, 2)
    prompt, method = in_rows(methods, seen), methods["one"]
    assert prompt.mask.all()
    for i in range(len(LENGTHS)):
        expected = encoded(method, vectors(method, first(seen, i, tokens or P)))
        np.testing.assert_allclose(prompt.values[i].numpy(), expected, atol=1e-12)
    assert float(prompt.values[:4].std(0).max()) > 1e-2, "texts must differ, or nothing is tested"


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_deep_prompts_keep_the_prefix_and_add_to_the_first_layer(strategy: str) -> None:
    """K[:, layer 0] += 0.05 p(x), with a p(x) as wide as that layer's part; layers may differ."""
    methods, seen = made({"strategy": strategy}, layers=(8, 4, 6)), context()
    prompt = in_rows(methods, seen)
    assert prompt.mask.all()
    for i in range(len(LENGTHS)):
        method = methods[TASKS[i % 2]]
        expected = method.prompt.detach().numpy().copy()
        own = vectors(method, first(seen, i, P))
        own = own if strategy == "lookup" else encoded(method, own)
        for place, vector in enumerate(own):
            expected[place, :8] += 0.05 * vector
        np.testing.assert_allclose(prompt.values[i].numpy(), expected, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_depend_neither_on_their_order_nor_on_each_other(strategy: str) -> None:
    method, seen = made({"strategy": strategy})["one"], context()
    whole = method(seen)
    for order in ([4, 2, 0, 1, 3], [2], [0, 0, 3]):
        index = torch.tensor(order)
        found = method(seen.rows(index))
        torch.testing.assert_close(found.prompt, whole.prompt[index], atol=1e-12, rtol=0)
        assert (found.mask is None) == (whole.mask is None)
        assert found.mask is None or torch.equal(found.mask, whole.mask[index])


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, P, P + 3])
def test_as_many_prompts_as_rows(strategy: str, count: int) -> None:
    """[B, P, d] also where B is not P."""
    assert made({"strategy": strategy})["two"](context(lengths=(5,) * count)).prompt.shape == (count, P, D)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_of_a_text_counts(strategy: str) -> None:
    """Equal first tokens, equal prompts; other orders permute what is looked up and leave a mean as it is."""
    method, seen = made({"strategy": strategy})["one"], context(lengths=(6, 6, 6))
    ids = seen.input_ids.clone()
    ids[:, :P] = torch.tensor([3, 8, 12, 5])
    ids[2, :P] = torch.tensor([12, 5, 3, 8])
    ids[:, P:6] = torch.tensor([[1, 2], [9, 4], [1, 2]])
    values = method(replace(seen, input_ids=ids)).prompt
    torch.testing.assert_close(values[0], values[1], atol=1e-12, rtol=0)
    other = {"lookup": values[0][[2, 3, 0, 1]], "mlp": values[0]}.get(strategy)
    if other is None:
        assert float((values[2] - values[0]).abs().max()) > 1e-3
    else:
        torch.testing.assert_close(values[2], other, atol=1e-12, rtol=0)


@torch.no_grad()
def test_three_filters_make_prompts_of_rank_three() -> None:
    method = made({"strategy": "cnn", "tokens": T}, vocab_size=V)["one"]
    values = method(context(lengths=(9, 8, 7, 9, 6, 9, 8, 5, 9, 7, 8, 9))).prompt.flatten(1)
    sizes = torch.linalg.svdvals(values - values.mean(0))
    assert float(sizes[3]) < 1e-10
    assert float(sizes[2]) > 1e-3


def test_dropout_is_for_training_only() -> None:
    method, seen = made({"strategy": "mlp"})["one"], context()
    values = method(seen).prompt
    assert torch.equal(values, method(seen).prompt)
    method.train()
    torch.manual_seed(0)
    dropped = [method(seen).prompt for _ in range(2)]
    assert not torch.equal(*dropped)
    there = values > 0
    kept = dropped[0][there] != 0
    torch.testing.assert_close(dropped[0][there][kept], 2 * values[there][kept])
    assert 0.3 < float(kept.double().mean()) < 0.7


def test_gradients_reach_the_rows_of_the_tokens_that_were_read() -> None:
    """dT[v] is the sum of the prompt's gradients at v's places; with SGD all other rows stay, to the bit."""
    methods, seen = made({}), context()
    weight = rows.random(3, len(LENGTHS), P, D).double()
    prompt, table = in_rows(methods, seen), methods["one"].shared.table
    (prompt.values * weight * prompt.mask[:, :, None]).sum().backward()
    expected = torch.zeros(V, D, dtype=torch.float64)
    for i in range(len(LENGTHS)):
        tokens = first(seen, i, P)
        for place, token in enumerate(tokens):
            expected[token] += weight[i, P - len(tokens) + place]
    torch.testing.assert_close(table.rows.grad, expected, atol=1e-12, rtol=0)
    unread = expected.abs().sum(1) == 0
    assert 0 < int(unread.sum()) < V
    before = table.rows.detach().clone()
    torch.optim.SGD(methods.parameters(), lr=0.1).step()
    same = (table.rows == before).all(1)
    assert torch.equal(same, unread)


@pytest.mark.parametrize(
    ("options", "vocab_size", "width", "length", "count"),
    [
        ({}, 50265, 1024, 100, 51_471_360),
        ({"strategy": "cnn"}, 50265, 1024, 100, 12_291 + 409_600 + 51_471_360),
        ({"strategy": "rnn"}, 50265, 1024, 100, 657_408 + 13_209_600 + 51_471_360),
        ({"strategy": "mlp"}, 50265, 1024, 100, 104_960_000 + 51_471_360),
        ({}, 49152, 576, 20, 28_311_552),
        ({"table": "low-rank", "rank": 16}, 49152, 576, 20, 49152 * 16 + 16 * 576),
        ({"table": "low-rank", "strategy": "cnn"}, 49152, 576, 20, 795_648 + 12 * 576 + 3 + 3 * 11_520 + 11_520),
        ({"table": "hashed", "rows": 2048}, 49152, 576, 20, 2048 * 576),
        ({"table": "common", "rows": 2048}, 49152, 576, 20, 2049 * 576),
    ],
    ids=str,
)
def test_counts(options: dict[str, Any], vocab_size: int, width: int, length: int, count: int) -> None:
    """Trained numbers by the formulas, at the sizes of RoBERTa-large and of SmolLM2-135M."""
    with torch.device("meta"):
        spec = PromptSpec(length, width, width, vocab_size)
        method = InstancePromptTuning(
            InstancePromptTuning.Config(**options), spec, PromptInit(torch.ones(length, width, device="cpu"))
        )
    assert sum(parameter.numel() for parameter in method.parameters()) == count
    if "table" in options:
        assert 0.005 < count / 134_515_008 < 0.015, "what the paper claims of its parameters"


@torch.no_grad()
def test_starts() -> None:
    """Where training begins: at the start for encoders, and for a table that is added to a base."""
    start, seen = PromptInit(rows.random(0, P, D)), context()
    spec, embeds = PromptSpec(P, D, D, 4000), seen.inputs_embeds

    def begun(**options: Any) -> Any:
        return build("ipt", options, spec, start)(seen)

    for strategy in ("cnn", "rnn"):
        for base in ("none", "start"):
            torch.testing.assert_close(begun(strategy=strategy, base=base).prompt, start.prompt.expand(6, P, D))
    for table in ("full", "low-rank", "hashed", "common"):
        torch.testing.assert_close(begun(base="start", table=table).prompt, start.prompt.expand(6, P, D))
        prompt = begun(start="words", table=table)
        for i in range(6):
            torch.testing.assert_close(prompt.prompt[i][prompt.mask[i]], embeds[i, : min(P, LENGTHS[i])])
    for options in ({}, {"table": "low-rank"}, {"table": "hashed"}, {"table": "common"}):
        for spread in (None, 0.5 / math.sqrt(3)):
            method: Any = build("ipt", {**options, "spread": spread}, spec, start)
            size = method.shared.table(torch.arange(4000)).square().mean().sqrt()
            wanted = start.prompt.square().mean().sqrt() if spread is None else torch.tensor(spread)
            torch.testing.assert_close(size, wanted, rtol=0.3, atol=0)
            if not options and spread is not None:  # the paper's U(-0.5, 0.5)
                assert 0.49 < float(method.shared.table.rows.abs().max()) <= 0.5
    mlp = begun(strategy="mlp").prompt
    assert (mlp >= 0).all()
    assert float(mlp.square().mean()) > 0
    assert (begun(start="zero").prompt == 0).all()


def test_only_the_prompts_of_a_batch_say_how_large_they_are() -> None:
    """A run's history then has the root mean square of each step's own prompts; see test_ipt_runs."""
    assert made({})["one"].rms() is None


@pytest.mark.parametrize(
    ("options", "slot", "message"),
    [
        ({"strategy": "tree"}, {}, "strategy 'tree' is unknown; possible: lookup, cnn, rnn, mlp"),
        ({"table": "tiny"}, {}, "table 'tiny' is unknown"),
        ({"base": "prefix"}, {}, "base 'prefix' is unknown; possible: none, start"),
        ({"start": "ones"}, {}, "start 'ones' is unknown; possible: uniform, zero, words"),
        ({"rank": 0}, {}, "rank must be a whole number of at least 1, given 0"),
        ({"rows": 1.5}, {}, "rows must be a whole number"),
        ({"scale": -1}, {}, "scale must be a number of at least 0, given -1"),
        ({"spread": "wide"}, {}, "spread must be a number of at least 0, given 'wide'"),
        ({"dropout": 1}, {}, "dropout must be a number from 0 to below 1, given 1"),
        ({"tokens": 5}, {}, "tokens is for strategies that encode"),
        ({"strategy": "rnn", "start": "zero"}, {}, "strategy rnn would learn nothing from a table of zeros"),
        ({"base": "none"}, {"layers": (4, 2)}, "base none would leave all layers but the first without a prompt"),
        ({"start": "words"}, {"layers": (4, 2)}, "start words needs prompts as wide as the embeddings, 6, not 4"),
        ({}, {"vocab_size": 0}, "PromptSpec.vocab_size must be at least 1"),
        ({"table": "hashed"}, {}, "table hashed of 2048 rows would not be smaller than that of all 20 tokens"),
        ({"table": "common", "rows": 20}, {}, "table common of 20 rows would not be smaller"),
        ({"heat": 1}, {}, "prompt.options of method ipt: 'heat' is unknown; possible: strategy, table"),
        ({"stratagy": "cnn"}, {}, "'stratagy' is unknown; did you mean 'strategy'\\? possible: strategy, table, rank"),
        ({"rank": True}, {}, "rank must be a whole number of at least 1, given True"),
        ({"scale": False}, {}, "scale must be a number of at least 0, given False"),
        ({"table": True}, {}, "table 'True' is unknown; possible: full, low-rank"),
    ],
)
def test_what_is_refused(options: dict[str, Any], slot: dict[str, Any], message: str) -> None:
    given = {"vocab_size": V, **slot}
    with pytest.raises(ConfigError, match=message):
        build("ipt", options, PromptSpec(P, D, D, **given), PromptInit(torch.zeros(P, D)))


def test_numbers_that_yaml_takes_for_words() -> None:
    """5e-2 is a word to YAML; a word that is no number stays one."""
    given = PromptSpec(P, D, D, vocab_size=V)
    assert build("ipt", {"spread": "5e-2"}, given, PromptInit(torch.zeros(P, D))).config.spread == 0.05


def test_texts_that_cannot_be_looked_up() -> None:
    """Embeddings without their ids, and a batch to learn from in which no text stands before the labels."""
    method, seen = made({})["one"], context()
    nameless = replace(seen, input_ids=torch.full_like(seen.input_ids, -1))
    with pytest.raises(PromptError, match="the text was given as embeddings; give input_ids"):
        method(nameless)
    empty = replace(seen, attention_mask=torch.zeros_like(seen.attention_mask))
    with pytest.raises(PromptError, match="no row of the batch has text before its labels"):
        method(empty)
    with torch.no_grad():
        assert not method(empty).mask.any()


# Beside the frozen model


def tuned(name: str, site: injection.Site = INPUT, **options: Any) -> SoftPromptModel:
    """The method for two tasks on a tiny model, every parameter random."""
    bb = tiny.backbone(name)
    spec = injection.prompt_spec(bb, site, P)
    methods = torch.nn.ModuleDict(build_tasks("ipt", options, spec, PromptInit(rows.random(5, P, spec.width)), TASKS))
    with torch.no_grad():
        for i, parameter in enumerate(methods.parameters()):
            parameter.copy_(rows.random(40 + i, *parameter.shape))
    return prompted(bb, site, methods)


def batch_of(name: str, tasks: list[int], seen: int = 2, side: str = "left") -> Batch:
    """Texts of several lengths; of causal ones the first `seen` tokens are no labels."""
    found = rows.batch(name, rows.texts(name, [6 + (3 * i) % 5 for i in range(len(tasks))]), side)
    labels = found.labels
    if name in tiny.CAUSAL:
        labels = labels.masked_fill(found.attention_mask.cumsum(1) <= seen, IGNORE)
    return Batch(found.input_ids, found.attention_mask, torch.tensor(tasks), labels)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_table_of_equal_rows_is_prompt_tuning(name: str) -> None:
    """T constant across its rows: ordinary prompt tuning with that row repeated, by the scores of the model."""
    made, batch = tuned(name), batch_of(name, [0, 1, 0], seen=P)
    spec, table = spec_of(made), made.prompts["one"].shared.table
    row = rows.random(9, spec.width)
    table.rows.copy_(row.expand_as(table.rows))
    plain = build_tasks("prompt-tuning", {}, spec, PromptInit(row.expand(P, -1)), TASKS)
    found, expected = (training_step(m, batch).output for m in (made, prompted(made.backbone, INPUT, plain)))
    assert_close(found.logits, expected.logits)


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), [("llama", KV), ("bart", KV), ("bert", REPLACE)], ids=called)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scale_zero_is_prefix_tuning(name: str, site: injection.Site, strategy: str) -> None:
    """And any other scale is not."""
    made, batch = tuned(name, site, scale=0.0, strategy=strategy), batch_of(name, [1, 1])
    method = made.prompts["two"]
    plain = build_tasks("prompt-tuning", {}, method.spec, PromptInit(method.prompt), TASKS)
    expected = training_step(prompted(made.backbone, site, plain), batch).output.logits
    assert_close(training_step(made, batch).output.logits, expected)
    method.scale = 0.5
    assert float((training_step(made, batch).output.logits - expected).abs().max()) > 1e-3


@torch.no_grad()
def test_a_text_of_no_words_has_no_prompt() -> None:
    """Its first answer token is scored by nothing, whatever stands beside it; and there is nothing to go on from."""
    made, candidates = tuned("llama"), [[7], [8, 9]]
    nothing, answer = torch.tensor([], dtype=torch.long), torch.tensor([7, 9])
    found = {}
    for seed in (1, 2):
        ids, mask = rows.pad([torch.cat([rows.ids(seed, 5), answer]), answer], "right")
        labels = torch.where(torch.tensor([[5], [0]]) <= torch.arange(7), ids, IGNORE).masked_fill(mask == 0, IGNORE)
        batch = Batch(ids, mask, torch.zeros(2, dtype=torch.long), labels)
        output = made.score(batch)
        assert output.path == "concatenation: a row has a prompt of no tokens"
        found[seed] = rows.of_row(output, 1)
        assert len(rows.of_row(output, 0)) == 2
        texts = Batch(*rows.pad([rows.ids(seed, 5), nothing], "right"), torch.zeros(2, dtype=torch.long))
        scores = injection.score_continuations(made.backbone, texts, made.make_prompts(texts), INPUT, candidates)
        assert scores[1, 0] == 0
        found[seed] = torch.cat([found[seed].flatten(), scores[1].float()])
        with pytest.raises(BackboneError, match="a row has no text, and its prompt"):
            generation.generate(made.backbone, texts, made.make_prompts(texts), INPUT, max_new_tokens=1)
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=1e-5)
    alone = Batch(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    scores = injection.score_continuations(made.backbone, alone, made.make_prompts(alone), INPUT, candidates)
    torch.testing.assert_close(scores[0].float(), found[1][-2:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_causal_prompt_does_not_see_the_answer(strategy: str) -> None:
    made, batch = tuned("llama", strategy=strategy), batch_of("llama", [0, 1, 0])
    prompt = made.make_prompts(batch)
    ids = batch.input_ids.masked_fill(batch.labels != IGNORE, 11)
    other = made.make_prompts(Batch(ids, batch.attention_mask, batch.task_ids, batch.labels))
    assert torch.equal(prompt.values, other.values)
    assert not torch.equal(prompt.values, made.make_prompts(Batch(ids, batch.attention_mask, batch.task_ids)).values)


def test_training_drops_and_evaluation_does_not() -> None:
    """Evaluation after a step gets the prompts without dropout, whatever was done before."""
    made, batch = tuned("llama", strategy="mlp"), batch_of("llama", [0, 1])
    torch.manual_seed(0)
    expected = made.make_prompts(batch).values
    assert not torch.equal(training_step(made, batch).prompt.values, expected)
    assert torch.equal(made.make_prompts(batch).values, expected)


@pytest.mark.parametrize("table", ["full", "low-rank"])
def test_rows_that_no_text_reads_are_left_alone(table: str) -> None:
    """AdamW with weight decay and all: rows move from the first step that reads them on, and from then on always."""
    made = tuned("llama", table=table)
    config = TrainConfig(learning_rate=0.1, weight_decay=0.1, max_steps=4)
    adamw = optimizer.build_optimizer(rates_of(made, config), config)
    shared = made.prompts["one"].shared
    held = shared.table.rows if table == "full" else shared.table.codes
    moved = []
    for seed in (0, 1):
        before = held.detach().clone()
        found = rows.batch("llama", rows.texts("llama", [4, 5], 50 * seed))
        labels = found.labels.masked_fill(found.attention_mask.cumsum(1) <= 3, IGNORE)
        batch = Batch(found.input_ids, found.attention_mask, torch.tensor([0, 1]), labels)
        adamw.zero_grad()
        objectives.task(training_step(made, batch)).backward()
        optimizer.set_rates(adamw, config, seed)
        adamw.step()
        moved.append(set((held != before).any(1).nonzero()[:, 0].tolist()))
        read = set(found.input_ids[:, :3].flatten().tolist())
        assert moved[-1] == read | (moved[0] if seed else set())
    assert moved[0] < moved[1]


def test_a_task_alone_answers_as_among_others() -> None:
    methods, seen = made({"base": "start"}), context()
    prompts = in_rows(methods, seen).values.detach()
    for i, task in enumerate(TASKS):
        start = PromptInit(torch.zeros(P, D))
        single: Any = build("ipt", {"base": "start"}, PromptSpec(P, D, D, V), start)
        single.double().load_state_dict(methods[task].state_dict())
        index = (torch.arange(len(LENGTHS)) % 2 == i).nonzero()[:, 0]
        torch.testing.assert_close(single(seen.rows(index)).prompt, prompts[index], atol=1e-12, rtol=0)


@torch.no_grad()
def test_features_are_what_the_classifier_of_pretraining_reads() -> None:
    seen = context()
    for strategy, by_hand in (("lookup", mean), ("cnn", convolved), ("rnn", recurrent), ("mlp", mean)):
        method = made({"strategy": strategy})["one"]
        found = method.features(seen)
        for i in range(len(LENGTHS)):
            expected: Tensor = by_hand(method, vectors(method, first(seen, i, P)))
            np.testing.assert_allclose(found[i].numpy(), expected, atol=1e-12)
