"""P-tuning: its encoders against PEFT's, where it begins, how its tokens depend on each other, how large it is."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners.p_tuning import PromptEncoder
from torch import Tensor

import rows
import test_together as together
import tiny
from closeness import GRADIENT_ROUNDINGS, assert_close
from prompted import prompted, rates_of, rows_of, several
from rows import INPUT
from softprompts import injection
from softprompts.errors import ConfigError
from softprompts.methods import build, build_tasks, check_site, fold
from softprompts.methods.p_tuning import PTuning
from softprompts.types import PromptInit, PromptSpec

P, D = 5, 12
TASKS = ("one", "two")


def made(start: Tensor | None = None, tasks: tuple[str, ...] = TASKS, **options: Any) -> Any:
    torch.manual_seed(1)
    start = rows.random(0, P, D) if start is None else start
    return several(PTuning, PTuning.Config(**options), PromptSpec(P, D, D), PromptInit(start), tasks)


def pairs(theirs: PromptEncoder, network: str) -> dict[str, Tensor]:
    """PEFT's parameters by our names of the first task's."""
    inner = {"network.inputs": theirs.embedding.weight}
    linear = [module for module in theirs.mlp_head if isinstance(module, torch.nn.Linear)]
    for i, layer in enumerate(linear[:-1]):
        inner |= {f"network.body.{2 * i}.{key}": value for key, value in layer.named_parameters()}
    if network == "lstm":
        inner |= {f"network.lstm.{key}": value for key, value in theirs.lstm_head.named_parameters()}
    return inner | {f"output.{key}": value for key, value in linear[-1].named_parameters()}


@pytest.mark.parametrize(("network", "hidden"), [("lstm", None), ("lstm", 4), ("mlp", None), ("mlp", 7)])
def test_pefts_encoder(network: str, hidden: int | None) -> None:
    """The same weights give the same prompt and the same gradients, from a start of zero; another start is added."""
    methods = made(torch.zeros(P, D), network=network, hidden=hidden, output="torch")
    method = methods["one"]
    size = hidden or (D // 2 if network == "lstm" else D)
    sizes = {"num_virtual_tokens": P, "num_transformer_submodules": 1, "token_dim": D, "encoder_hidden_size": size}
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", encoder_reparameterization_type=network.upper(), **sizes)
    torch.manual_seed(7)
    theirs = PromptEncoder(config)
    same, own = pairs(theirs, network), dict(method.named_parameters())
    assert own.keys() == same.keys()
    with torch.no_grad():
        for key, value in same.items():
            own[key].copy_(value)
    expected, found = theirs(torch.arange(P)[None])[0], rows_of(methods, [0])[0]
    assert float(expected.detach().std()) > 1e-3
    assert_close(found, expected)
    weights = rows.random(9, P, D)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for key, value in same.items():
        assert_close(own[key].grad, value.grad, GRADIENT_ROUNDINGS)
        assert float(value.grad.abs().max()) > 0
    start = rows.random(3, P, D)
    with torch.no_grad():
        method.network.start.copy_(start)
        assert_close(rows_of(methods, [0])[0], start + expected)


@torch.no_grad()
@pytest.mark.parametrize("network", ["lstm", "mlp"])
def test_it_begins_at_the_start_bit_for_bit(network: str) -> None:
    start = rows.random(0, P, D)
    methods = made(network=network)
    assert torch.equal(fold(methods["one"]), start)
    assert torch.equal(rows_of(methods, [1, 0]), start.expand(2, -1, -1))
    first, second = (methods[task].network.inputs for task in TASKS)
    assert not torch.equal(first, second), "tasks have encoders of their own"
    assert 0.5 < float(first.std()) < 1.5


@torch.no_grad()
@pytest.mark.parametrize(("network", "depends"), [("lstm", True), ("mlp", False)])
def test_whether_tokens_depend_on_each_other(network: str, depends: bool) -> None:
    """A pseudo token moves the prompt at every place with an LSTM, in both directions; with an MLP at its own alone."""
    method = made(network=network, output="torch")["one"]
    before = fold(method)
    for moved in (0, P - 1):
        kept = method.network.inputs.clone()
        method.network.inputs[moved] += 1
        changed = (fold(method) != before).any(1)
        method.network.inputs.copy_(kept)
        assert changed.tolist() == [depends or i == moved for i in range(P)]


def test_numbers_of_trained_parameters() -> None:
    def count(width: int, length: int, **options: Any) -> int:
        method = PTuning(
            PTuning.Config(**options), PromptSpec(length, width, width), PromptInit(torch.zeros(length, width))
        )
        return sum(p.numel() for p in method.parameters())

    # Two layers of four gates, each way; then 576 -> 576 -> 576.
    lstm = 2 * 4 * (288 * 576 + 288 * 288 + 2 * 288) + 2 * 4 * (288 * 576 + 288 * 288 + 2 * 288)
    assert count(576, 20) == 20 * 576 + lstm + 2 * (576 * 576 + 576) == 4_666_752
    assert count(576, 20, network="mlp") == 20 * 576 + 3 * (576 * 576 + 576)
    for h in (4, 9):
        assert count(12, 5, hidden=h) == 60 + 8 * h * (12 + 4 * h + 4) + 2 * h * (2 * h + 1) + 12 * (2 * h + 1)
        assert count(12, 5, network="mlp", hidden=h) == 60 + h * 13 + h * (h + 1) + 12 * (h + 1)
    assert count(13, 5) == 65 + 8 * 6 * (13 + 24 + 4) + 12 * 13 + 13 * 13  # odd widths are halved downwards


@torch.no_grad()
def test_a_task_alone_is_as_among_others() -> None:
    methods = made(output="torch")
    for task in TASKS:
        single = made(torch.zeros(P, D), (task,))[task]
        single.load_state_dict(methods[task].state_dict())
        assert torch.equal(fold(single), fold(methods[task]))
    assert not torch.equal(fold(methods["one"]), fold(methods["two"]))


def test_groups_learn_at_their_own_rates() -> None:
    """The last layer in units of the embeddings' rms, as it makes prompts; the rest as it stands."""
    bb = tiny.backbone("llama")
    spec, start = injection.prompt_spec(bb, INPUT, P), PromptInit(torch.zeros(P, 32))
    model = prompted(bb, INPUT, build_tasks("p-tuning", {}, spec, start, TASKS))
    groups = rates_of(model, together.config(learning_rate=0.2, learning_rate_unit="rms"))
    found = {group["rate"]: len(group["params"]) for group in groups}
    assert found == pytest.approx({1e-3: 2 * (1 + 16 + 2), 2e-3 * bb.embedding_rms: 4})
    assert sum(found.values()) == len(model.trainable())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "gru"}, "network 'gru' is unknown; possible: lstm, mlp"),
        ({"hidden": 0}, "hidden must be a whole number of at least 1, given 0"),
        ({"output": "start"}, "output 'start' is unknown; possible: zero, torch"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"prompt.options of method p-tuning: {words}"):
        build("p-tuning", options, PromptSpec(P, D, D), PromptInit(torch.zeros(P, D)))


def test_it_is_no_deep_prompt() -> None:
    with pytest.raises(ConfigError, match=r"method p-tuning cannot be used at site 'kv'.* one of: input, decoder"):
        check_site("p-tuning", "kv")
