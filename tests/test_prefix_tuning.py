"""Prefix tuning and P-tuning v2: against its formula, PEFT's encoder and a stock model that reads the start's words."""

import math
import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import Tensor

import rows
import test_together as together
import tiny
import tokenizers_tiny
from closeness import GRADIENT_ROUNDINGS, assert_close
from prompted import prompted, rates_of, rows_of, several
from rows import INPUT, KV, REPLACE, called
from softprompts import backbone as b
from softprompts import injection
from softprompts.config import InitConfig
from softprompts.data import collate
from softprompts.errors import ConfigError
from softprompts.injection import Site
from softprompts.methods import build, build_tasks, check_site, fold
from softprompts.methods.prefix_tuning import PrefixTuning
from softprompts.model import SoftPromptModel, initialization
from softprompts.training.shared_batch import training_step
from softprompts.types import PromptInit, PromptSpec

P, D, H = 4, 24, 6
TASKS = ("one", "two")
NETWORK = {"reparametrize": True, "hidden": 8}


def made(start: Tensor | None = None, tasks: tuple[str, ...] = TASKS, **options: Any) -> Any:
    torch.manual_seed(1)
    start = rows.random(0, P, D) if start is None else start
    spec = PromptSpec(P, D, H, layers=(8, 8, 8))
    return several(PrefixTuning, PrefixTuning.Config(**options), spec, PromptInit(start), tasks)


def perturbed(method: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(method.parameters()):
            parameter.add_(rows.random(30 + i, *parameter.shape))
    return method


# What it is


@torch.no_grad()
def test_without_a_network_it_is_the_matrix() -> None:
    methods = made()
    assert [name for name, _ in methods.named_parameters()] == ["one.prompt", "two.prompt"]
    perturbed(methods)
    found = rows_of(methods, [1, 0, 1])
    assert torch.equal(found, torch.stack([methods[name].prompt for name in ("two", "one", "two")]))
    assert torch.equal(fold(methods["two"]), methods["two"].prompt)


@torch.no_grad()
@pytest.mark.parametrize("output", ["zero", "torch"])
def test_the_network_number_by_number(output: str) -> None:
    methods = perturbed(made(**NETWORK, output=output))
    found = rows_of(methods, [1, 0])
    for row, task in ((0, "two"), (1, "one")):
        parts = methods[task].network.state_dict()
        for i in range(P):
            given = parts["inputs"][i].tolist()
            hidden = [
                math.tanh(sum(w * x for w, x in zip(weights, given, strict=True)) + bias)
                for weights, bias in zip(parts["hidden.weight"].tolist(), parts["hidden.bias"].tolist(), strict=True)
            ]
            for d in range(D):
                weights, bias = parts["output.weight"][d].tolist(), float(parts["output.bias"][d])
                expected = float(parts["start"][i, d]) + sum(w * h for w, h in zip(weights, hidden, strict=True)) + bias
                assert float(found[row, i, d]) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_it_begins_at_the_start_bit_for_bit_or_where_the_papers_do() -> None:
    start = rows.random(0, P, D)
    for options in ({}, NETWORK):
        assert torch.equal(fold(made(**options)["one"]), start)
    away = fold(made(torch.zeros(P, D), **NETWORK, output="torch")["one"])
    assert 0.01 < float(away.std()) < 1
    assert not torch.equal(away, fold(made(torch.zeros(P, D), **NETWORK, output="torch")["two"]))


def test_numbers_of_trained_parameters() -> None:
    def count(**options: Any) -> int:
        slot = PromptSpec(20, 11_520, 576, layers=(384,) * 30)
        method = PrefixTuning(PrefixTuning.Config(**options), slot, PromptInit(torch.zeros(20, 11_520)))
        return sum(p.numel() for p in method.parameters())

    assert count() == 230_400  # 20 tokens of 30 layers with keys and values of 3 heads of 64
    assert count(reparametrize=True) == 20 * 576 + 512 * 577 + 11_520 * 513 == 6_216_704
    assert count(reparametrize=True, hidden=100) == 20 * 576 + 100 * 577 + 11_520 * 101


# Against others


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, NETWORK], ids=["plain", "network"])
@pytest.mark.parametrize(("name", "site"), [("llama", KV), ("llama", REPLACE), ("t5", KV)], ids=called)
def test_a_prefix_from_a_text_is_that_text(name: str, site: Site, options: dict[str, Any]) -> None:
    """From the keys and values (or states) of an instruction, training begins where the stock model reads it."""
    tokenizer = {"llama": tokenizers_tiny.byte_bpe, "t5": tokenizers_tiny.unigram}[name]()
    bb = b.wrap(tiny.model(name, tokenizer=tokenizer), tokenizer, name=name)
    text = "Review: a warm film."
    words = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    slot = injection.prompt_spec(bb, site, len(words))
    start = initialization.initialize(InitConfig(kind="text", text=text), bb, site, slot)
    model = prompted(bb, site, PrefixTuning(PrefixTuning.Config(**options), slot, start))
    texts = rows.texts(name)
    batch = rows.batch(name, texts, "left")
    output = model.score(batch)
    without = injection.score(bb, batch, None, site)
    for i, row in enumerate(texts):
        expected = rows.read_words(bb, site, words, row)
        torch.testing.assert_close(rows.of_row(output, i), expected, atol=1e-5, rtol=1e-5)
        if len(row) > 1:
            plain = rows.of_row(without, i)
            assert float((expected[-len(plain) :] - plain).abs().max()) > 1e-2, "the text must matter"


@pytest.mark.parametrize("projection", [False, True])
def test_pefts_encoder(projection: bool) -> None:
    """The same weights give the same prefix and the same gradients; both begin without a start."""
    options = NETWORK | {"output": "torch"} if projection else {}
    methods = perturbed(made(torch.zeros(P, D), ("a",), **options))
    method = methods["a"]
    sizes = {"num_virtual_tokens": P, "token_dim": H, "num_layers": 2, "encoder_hidden_size": 8}  # 2 · 2 · H = D
    theirs = PrefixEncoder(peft.PrefixTuningConfig(task_type="CAUSAL_LM", prefix_projection=projection, **sizes))
    own = dict(method.named_parameters())
    if projection:
        pairs = {"inputs": theirs.embedding.weight, "hidden.weight": theirs.transform[0].weight}
        pairs |= {"hidden.bias": theirs.transform[0].bias, "output.weight": theirs.transform[2].weight}
        pairs |= {"output.bias": theirs.transform[2].bias}
        pairs = {f"network.{key}": value for key, value in pairs.items()}
    else:
        pairs = {"prompt": theirs.embedding.weight}
    assert own.keys() == pairs.keys()
    with torch.no_grad():
        for key, value in pairs.items():
            value.copy_(own[key])
    expected, found = theirs(torch.arange(P)), rows_of(methods, [0])[0]
    assert_close(found, expected)
    weights = rows.random(9, P, D)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for key, value in pairs.items():
        assert_close(own[key].grad, value.grad, GRADIENT_ROUNDINGS)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT 0.21.2, transformers 5.24
def test_pefts_scores() -> None:
    """The same prefix gives the same scores under PEFT's prefix tuning, layer by layer and head by head."""
    model = tiny.model("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own remarks about models without a name
        theirs = peft.get_peft_model(
            tiny.model("gpt2"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        ).eval()
    bb = b.wrap(model, name="gpt2")
    slot = injection.prompt_spec(bb, KV, P)
    values = rows.random(2, P, slot.width)
    theirs.prompt_encoder.default.embedding.weight.copy_(values)
    model = prompted(bb, KV, PrefixTuning(PrefixTuning.Config(), slot, PromptInit(values)))
    for row in rows.texts("gpt2")[:2]:
        batch = rows.batch("gpt2", [row])
        expected = theirs(input_ids=row[None], attention_mask=torch.ones(1, len(row))).logits[0, :-1]
        found = model.score(batch).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Training


def test_dropout_is_of_training_alone() -> None:
    start = rows.random(0, 50, D) + 3
    slot = PromptSpec(50, D, H, layers=(8, 8, 8))
    for options in ({}, NETWORK):
        config = PrefixTuning.Config(dropout=0.25, **options)
        methods = several(PrefixTuning, config, slot, PromptInit(start), TASKS)
        torch.manual_seed(0)
        found = rows_of(methods.train(), [0, 1, 0])
        kept = found != 0
        assert 0.7 < float(kept.float().mean()) < 0.8
        torch.testing.assert_close(found[kept], (start / 0.75).expand_as(found)[kept])
        assert torch.equal(found[0], found[2]), "rows of a task share a prompt"
        assert not torch.equal(kept[0], kept[1])
        assert torch.equal(fold(methods["one"]), start), "folding leaves nothing out, in whatever mode"
        assert torch.equal(rows_of(methods.eval(), [0, 1]), start.expand(2, -1, -1))


def test_a_network_trains_tasks_as_apart_as_they_are_alone() -> None:
    """Three steps on rows of two tasks equal three steps of each task's own method on its rows."""
    base = together.double("llama")
    slot = injection.prompt_spec(base, KV, P)
    data = together.encoded("llama", 8, 3, tasks=2)
    start = PromptInit(rows.random(4, P, slot.width))

    def tuned(names: tuple[str, ...]) -> SoftPromptModel:
        torch.manual_seed(3)
        methods = several(PrefixTuning, PrefixTuning.Config(**NETWORK), slot, start, TASKS).double()
        with torch.no_grad():
            for parameter in methods["two"].parameters():
                parameter.add_(0.01)
        return prompted(base, KV, {name: methods[name] for name in names})

    def losses(model: SoftPromptModel) -> list[Tensor]:
        optimizer, sums = torch.optim.SGD(model.trainable().values(), lr=0.1), []
        for _ in range(3):
            chosen = [
                replace(row, task_id=model.tasks.index(TASKS[row.task_id]))
                for row in data
                if TASKS[row.task_id] in model.tasks
            ]
            batch = collate(chosen, 0)
            step = training_step(model, batch)
            scores = torch.nn.functional.cross_entropy(step.output.logits, step.output.labels, reduction="none")
            each = [scores[batch.task_ids[step.output.batch_rows] == i].sum() for i in range(len(model.tasks))]
            sums.append(torch.stack(each).detach())
            optimizer.zero_grad()
            torch.stack(each).sum().backward()
            optimizer.step()
        return sums

    both = losses(tuned(TASKS))
    for task, name in enumerate(TASKS):
        alone = losses(tuned((name,)))
        torch.testing.assert_close(torch.stack(alone)[:, 0], torch.stack(both)[:, task], rtol=1e-9, atol=1e-9)
    assert float((both[0] - both[2]).abs().min()) > 1e-4


def test_groups_learn_at_their_own_rates() -> None:
    bb = tiny.backbone("llama")
    slot = injection.prompt_spec(bb, KV, P)
    for options, rates, expected in (
        ({}, {}, {0.2 * bb.embedding_rms: 2}),
        (NETWORK, {}, {1e-3: 10}),
        (NETWORK, {"network": 0.03}, {0.03: 10}),
    ):
        start = PromptInit(torch.zeros(P, slot.width))
        model = prompted(bb, KV, build_tasks("prefix-tuning", options, slot, start, TASKS))
        config = together.config(learning_rate=0.2, learning_rate_unit="rms", learning_rates=rates)
        groups = rates_of(model, config)
        assert {group["rate"]: len(group["params"]) for group in groups} == pytest.approx(expected)


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": 0}, "hidden must be a whole number of at least 1, given 0"),
        ({"reparametrize": "yes"}, "reparametrize must be true or false, given 'yes'"),
        ({"output": "none"}, "output 'none' is unknown; possible: zero, torch"),
        ({"dropout": 1}, "dropout must be a number from 0 to below 1, given 1"),
        ({"dropout": "a tenth"}, "dropout must be a number from 0 to below 1, given 'a tenth'"),
        ({"mlp": True}, "'mlp'"),
    ],
)
@pytest.mark.parametrize("name", ["prefix-tuning", "p-tuning-v2"])
def test_options_that_cannot_be(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"prompt.options of method {name}: .*{words}"):
        build(name, options, PromptSpec(P, D, H), PromptInit(torch.zeros(P, D)))


def test_sites() -> None:
    for name in ("prefix-tuning", "p-tuning-v2"):
        for site in ("kv", "layers"):
            check_site(name, site)
        with pytest.raises(ConfigError, match=f"method {name} cannot be used at site 'input'.*one of: kv, layers"):
            check_site(name, INPUT.name)
