"""SoftPromptModel: a stock model for Trainer, pipelines and people, scoring as words in the prompt's place would."""

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

import rows
import tiny
import tokenizers_tiny
from closeness import tolerance
from softprompts.config import InitConfig, PromptConfig
from softprompts.errors import ArtifactError, BackboneError, ConfigError
from softprompts.injection import Site
from softprompts.model import SoftPromptModel, initialization
from softprompts.model.peft import PromptTuningConfig
from softprompts.types import IGNORE

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
RANDOM = InitConfig(kind="random")
WORDS = rows.ids(70, 4)
DEEP = ("gpt2", "llama", "qwen3", "gemma3")
LM = [(name, "input") for name in tiny.MAIN] + [(name, site) for name in DEEP for site in ("layers", "kv")]
HEADS = [
    *[(name, "sequence") for name in ("gpt2", "llama", "qwen3", "opt", "gemma3", "bert", "roberta", "albert")],
    *[(name, "token") for name in ("gpt2", "llama", "qwen3", "bert", "roberta", "albert")],
    *[(name, "span") for name in ("gpt2", "llama", "opt", "bert", "roberta", "albert")],
]


def prompted(name: str, head: str = "lm", site: str = "input", words: Tensor | None = WORDS, **more: Any) -> Any:
    """A tiny model with a prompt that does what `words` would do."""
    length = 4 if words is None else len(words)
    model = SoftPromptModel(
        tiny.model(name, head, **more), PromptConfig(num_virtual_tokens=length, site=site, init=RANDOM), tokenizer=None
    )
    if words is not None:
        put(model, "default", initialization.from_ids(model.backbone, Site(site), words))
    return model


def put(model: Any, task: str, values: Tensor) -> None:
    with torch.no_grad():
        model.prompts[task].prompt.copy_(values)


def with_words(name: str, row: Tensor, words: Tensor = WORDS) -> tuple[Tensor, Tensor]:
    """The row with the words where the prompt is, and which of its columns are the row's own."""
    place = 1 if name in tiny.MASKED else 0
    own = torch.cat([torch.arange(place), torch.arange(place, len(row)) + len(words)])
    return torch.cat([row[:place], words, row[place:]])[None], own


@pytest.mark.golden
@pytest.mark.parametrize(("name", "site"), LM)
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_loss_are_those_of_the_stock_model_on_words(name: str, site: str, side: str) -> None:
    model = prompted(name, site=site)
    stock: Any = model.model
    texts = rows.texts(name, (5, 9, 2))
    ids, mask = rows.pad(texts, side, 1, value=3)
    targets = rows.targets(texts) if name in tiny.SEQ2SEQ else texts
    labels = rows.pad(targets, "right" if name in tiny.SEQ2SEQ else side, 1, value=IGNORE)[0]
    found = model(input_ids=ids, attention_mask=mask, labels=labels)
    losses, counts = [], []
    for i, text in enumerate(texts):
        full, own = with_words(name, text)
        if name in tiny.SEQ2SEQ:
            expected = stock(input_ids=full, labels=targets[i][None])
            given, logits = labels[i] != IGNORE, expected.logits[0]
        else:
            answers = torch.full_like(full, IGNORE)
            scored = own if site != "kv" else own[1:]  # keys and values score no label themselves
            answers[0, scored] = full[0, scored]
            expected = stock(input_ids=full, labels=answers)
            given, logits = mask[i].bool(), expected.logits[0, own]
        torch.testing.assert_close(found.logits[i, given], logits, **CLOSE)
        assert found.logits.shape[1] == labels.shape[1]
        counts.append(int(given.sum()) - (site == "kv"))
        losses.append(expected.loss.item() * counts[-1])
    assert type(found) is type(expected)
    assert found.loss.item() == pytest.approx(sum(losses) / sum(counts), abs=1e-5)
    assert found.logits.shape[:2] == labels.shape


@pytest.mark.golden
@pytest.mark.parametrize(("name", "head"), HEADS)
def test_heads_score_as_the_stock_model_scores_words(name: str, head: str) -> None:
    """Token classification, spans and pooling: stock shapes, and labels mean text columns (PEFT fails at all three)."""
    model = prompted(name, head)
    stock: Any = model.model
    texts = rows.texts(name, (6, 9, 3))
    for side in ("right", "left"):
        ids, mask = rows.pad(texts, side, 1, value=3)
        given = model(input_ids=ids, attention_mask=mask)
        for i, text in enumerate(texts):
            full, own = with_words(name, text)
            expected = stock(input_ids=full)
            assert type(given) is type(expected)
            valid = mask[i].bool()
            if head == "sequence":
                torch.testing.assert_close(given.logits[i], expected.logits[0], **CLOSE)
            elif head == "token":
                assert given.logits.shape[:2] == ids.shape
                torch.testing.assert_close(given.logits[i, valid], expected.logits[0, own], **CLOSE)
            else:
                torch.testing.assert_close(given.start_logits[i, valid], expected.start_logits[0, own], **CLOSE)
                torch.testing.assert_close(given.end_logits[i, valid], expected.end_logits[0, own], **CLOSE)
                assert (given.start_logits[i, ~valid] < -1e30).all()  # padding is never an answer


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_losses_of_heads_are_the_stock_losses(name: str) -> None:
    text = rows.texts(name, (8,))[0]
    full, own = with_words(name, text)
    one, all_of_it = text[None], torch.ones_like(text[None])

    tokens = torch.arange(8) % 3
    answers = torch.full_like(full, IGNORE)
    answers[0, own] = tokens
    model = prompted(name, "token")
    expected = model.model(input_ids=full, labels=answers).loss
    torch.testing.assert_close(model(one, all_of_it, labels=tokens[None]).loss, expected, **CLOSE)

    model, place = (
        prompted(name, "span"),
        torch.tensor([3]),
    )
    end = torch.tensor([5])
    expected = model.model(input_ids=full, start_positions=own[3:4], end_positions=own[5:6]).loss
    found = model(one, all_of_it, start_positions=place[0], end_positions=end).loss
    # The stock loss also weighs the words' columns, which are no answers here.
    scores = model.model(input_ids=full)
    pair = [
        functional.cross_entropy(s[:, own], p)
        for s, p in ((scores.start_logits, torch.tensor([3])), (scores.end_logits, end))
    ]
    torch.testing.assert_close(found, sum(pair) / 2, **CLOSE)
    assert float(expected) > 0


@pytest.mark.parametrize(
    ("labels", "count", "problem"),
    [
        (torch.tensor([2]), 3, None),
        (torch.tensor([[1.0, 0.0, 1.0]]), 3, None),
        (torch.tensor([0.7]), 1, None),
        (torch.tensor([[0.7]]), 1, "regression"),
        (torch.tensor([[0.7, 0.1, 2.0]]), 3, "regression"),
    ],
    ids=["classes", "several", "value", "values", "vector"],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_losses_of_sequence_heads_are_the_stock_losses(
    name: str, labels: Tensor, count: int, problem: str | None
) -> None:
    model = prompted(name, "sequence", labels=count)
    model.config.problem_type = problem
    text = rows.texts(name, (6,))[0]
    found = model(text[None], labels=labels).loss
    assert model.config.problem_type == problem  # the stock model writes into its configuration here
    expected = model.model(input_ids=with_words(name, text)[0], labels=labels).loss
    torch.testing.assert_close(found, expected, **CLOSE)


def test_what_a_causal_call_may_ask_for() -> None:
    model = prompted("llama")
    ids, mask = rows.pad(rows.texts("llama", (5, 8)), "left", value=3)
    whole = model(ids, mask)
    assert whole.loss is None
    torch.testing.assert_close(model(ids, mask, logits_to_keep=2).logits, whole.logits[:, -2:], **CLOSE)
    some = model(ids, mask, logits_to_keep=torch.tensor([6, 3])).logits
    torch.testing.assert_close(some, whole.logits[:, [6, 3]], **CLOSE)
    labels = ids.masked_fill(mask == 0, IGNORE)
    summed = model(ids, mask, labels=labels, num_items_in_batch=torch.tensor(26))
    torch.testing.assert_close(summed.loss, model(ids, mask, labels=labels).loss / 2, **CLOSE)
    pair = model(ids, mask, labels=labels, return_dict=False)
    assert isinstance(pair, tuple)
    torch.testing.assert_close(pair[1][mask.bool()], whole.logits[mask.bool()], **CLOSE)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, whole.logits)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(
        model(ids, mask, position_ids=positions).logits[mask.bool()], whole.logits[mask.bool()], **CLOSE
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_behind_the_first_token_scores_the_token_behind_it(side: str) -> None:
    model = SoftPromptModel(
        tiny.model("llama"), PromptConfig(num_virtual_tokens=4, placement="after_start", init=RANDOM)
    )
    put(model, "default", initialization.from_ids(model.backbone, Site(), WORDS))
    text = rows.ids(2, 6)
    full = torch.cat([text[:1], WORDS, text[1:]])[None]
    answers = full.clone()
    answers[0, 1:5] = IGNORE
    expected = model.model(input_ids=full, labels=answers)
    ids, mask = rows.pad([text], side, 2, value=3)
    found = model(ids, mask, labels=ids)  # padding is never scored, whatever its label
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    own = expected.logits[:, [0, 5, 6, 7, 8, 9]]
    torch.testing.assert_close(found.logits[:, mask[0].bool()], own, **CLOSE)
    # Trainer leaves each row's first label out of its count where `loss_type` says so; nothing scores it here.
    assert model.loss_type == "ForCausalLM"
    counted = model(
        ids, mask, labels=ids, num_items_in_batch=int((ids[:, 1:] != IGNORE).logical_and(mask[:, 1:]).sum())
    )
    if side == "right":
        torch.testing.assert_close(counted.loss, expected.loss, **CLOSE)
    assert SoftPromptModel(tiny.model("llama"), PromptConfig(num_virtual_tokens=4, init=RANDOM)).loss_type is None


def test_features_are_the_texts_states() -> None:
    model = prompted("bert", "features")
    text = rows.texts("bert", (6,))[0]
    full, own = with_words("bert", text)
    found, expected = model(text[None]), model.model(input_ids=full)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state[:, own], **CLOSE)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, **CLOSE)


@pytest.mark.parametrize(("name", "head"), [("t5", "sequence"), ("bart", "sequence"), ("bart", "span")])
def test_heads_of_encoder_decoders_do_not_depend_on_the_batch(name: str, head: str) -> None:
    model = prompted(name, head)
    texts = [torch.cat([row, torch.tensor([2])]) for row in rows.texts(name, (5, 8))]
    ids, mask = rows.pad(texts, "right", 2, value=0)
    found = model(ids, mask)
    for i, text in enumerate(texts):
        alone = model(text[None])
        if head == "sequence":
            torch.testing.assert_close(found.logits[i], alone.logits[0], **CLOSE)
        else:
            torch.testing.assert_close(found.start_logits[i, mask[i].bool()], alone.start_logits[0], **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_only_prompts_need_a_gradient_and_only_they_are_in_the_state(name: str) -> None:
    model = prompted(name)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompts.default.prompt"]
    assert list(model.state_dict()) == ["prompts.default.prompt"]
    assert list(model.state_dict(prefix="wrapped.")) == ["wrapped.prompts.default.prompt"]
    before = copy.deepcopy(model.model.state_dict())
    text = rows.texts(name, (6,))[0][None]
    model.train()
    assert model.training
    assert not any(module.training for module in model.model.modules())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(text, labels=text).loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in model.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.model.state_dict().values(), strict=True))


def test_heads_are_copies_for_each_task_and_the_models_own_stays() -> None:
    config = PromptConfig(num_virtual_tokens=3, init=RANDOM)
    model = SoftPromptModel(tiny.model("bert", "sequence"), config, "sst2")
    model.add_task("mnli")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{part}.{task}.{name}"
        for task in ("sst2", "mnli")
        for part, name in (("prompts", "prompt"), ("heads", "classifier.weight"), ("heads", "classifier.bias"))
    }
    assert set(model.state_dict()) == trained
    own: Any = model.model
    before, module = own.classifier.weight.clone(), own.classifier
    ids = torch.stack([torch.cat([torch.tensor([1]), rows.ids(i, 5)]) for i in range(4)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    model(ids, labels=torch.tensor([0, 1, 2, 0]), tasks=["sst2", "mnli", "sst2", "mnli"]).loss.backward()
    optimizer.step()
    assert torch.equal(own.classifier.weight, before)
    assert own.classifier is module
    heads = [model.heads[task].get_parameter("classifier.weight") for task in ("sst2", "mnli")]
    assert not torch.equal(heads[0], before)
    assert not torch.equal(heads[0], heads[1])
    mixed = model(ids, tasks=["sst2", "mnli", "sst2", "mnli"]).logits
    for i, task in enumerate(["sst2", "mnli", "sst2", "mnli"]):
        torch.testing.assert_close(mixed[i], model(ids[i : i + 1], tasks=task).logits[0], **CLOSE)
    assert not torch.allclose(mixed[0], model(ids[:1], tasks="mnli").logits[0], atol=1e-3)


def test_modules_to_save_names_parts_of_the_head() -> None:
    backbone = tiny.model("roberta", "sequence")
    only = PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["out_proj"])
    model = SoftPromptModel(backbone, only)
    assert [k for k in model.state_dict() if k.startswith("heads")] == [
        "heads.default.classifier.out_proj.weight",
        "heads.default.classifier.out_proj.bias",
    ]
    model.add_task("none", PromptConfig(num_virtual_tokens=3, init=RANDOM), modules_to_save=[])
    assert not any("heads.none" in key for key in model.state_dict())
    model.add_task("all", PromptConfig(num_virtual_tokens=3, init=RANDOM), modules_to_save=["classifier"])
    assert len([key for key in model.state_dict() if "heads.all" in key]) == 4
    with pytest.raises(ConfigError, match=r"'clasifier' is not a module of the head.*did you mean 'classifier'"):
        model.add_task("typo", PromptConfig(num_virtual_tokens=3, init=RANDOM), modules_to_save=["clasifier"])
    with pytest.raises(ConfigError, match="possible: none"):
        SoftPromptModel(tiny.model("gpt2"), PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["lm_head"]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_mixed_tasks_in_one_batch_equal_each_task_alone(name: str) -> None:
    """PEFT ignores adapter_names in forward, and the prompt in a mixed generate."""
    model = SoftPromptModel(tiny.model(name), PromptConfig(num_virtual_tokens=3, init=RANDOM), "short")
    model.add_task("long", PromptConfig(num_virtual_tokens=6, init=RANDOM))
    for i, task in enumerate(model.tasks):
        put(model, task, rows.random(i, 3 + 3 * i, 32))
    texts = rows.texts(name, (5, 8, 3))
    ids, mask = rows.pad(texts, "right", value=0)
    names = ["long", "short", "long"]
    labels = ids.masked_fill(mask == 0, IGNORE)
    found = model(ids, mask, labels=labels, tasks=names).logits
    assert torch.equal(found, model(ids, mask, labels=labels, task_ids=torch.tensor([1, 0, 1])).logits)
    for i, text in enumerate(texts):
        alone = model(text[None], labels=text[None], tasks=names[i]).logits
        torch.testing.assert_close(found[i, : len(text)], alone[0], **CLOSE)
    assert not torch.allclose(found[0], model(ids, mask, labels=labels, tasks="short").logits[0], atol=1e-3)
    if name != "bert":
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        together = model.generate(ids, attention_mask=mask, tasks=names, **options)
        for i, text in enumerate(texts):
            alone = model.generate(text[None], tasks=names[i], **{**options, "pad_token_id": None})
            assert torch.equal(together[i, -4:], alone[0, -4:])


def test_peers_placement(tmp_path: Path) -> None:
    model = SoftPromptModel(tiny.model("bert"), PromptConfig(num_virtual_tokens=3, init=RANDOM), "after")
    model.add_task("first", PromptConfig(num_virtual_tokens=5, placement="first", init=RANDOM))
    for i, task in enumerate(model.tasks):
        put(model, task, rows.random(i, 3 + 2 * i, 32))
    model.save_pretrained(tmp_path)
    model.load_prompt(tmp_path / "after", "again")
    ids = torch.stack(rows.texts("bert", (6, 6, 6)))
    names = ["first", "after", "again"]
    found = model(ids, tasks=names).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(found[i], model(ids[i : i + 1], tasks=name).logits[0], **CLOSE)
    assert not torch.allclose(found[0], model(ids[:1], tasks="after").logits[0], atol=1e-3)


def test_the_active_task_serves_rows_that_name_none() -> None:
    model = SoftPromptModel(tiny.model("llama"), PromptConfig(num_virtual_tokens=3, init=RANDOM), "mnli")
    model.add_task("sst2", PromptConfig(num_virtual_tokens=5, init=RANDOM))
    ids = rows.ids(1, 6)[None]
    first = model(ids).logits
    assert torch.equal(first, model(ids, tasks="mnli").logits)
    model.task = "sst2"
    assert torch.equal(model(ids).logits, model(ids, task_ids=[1]).logits)
    assert not torch.allclose(model(ids).logits, first, atol=1e-4)
    model.remove_task("sst2")
    assert (model.tasks, model.task) == (("mnli",), "mnli")
    assert torch.equal(model(ids).logits, first)
    model.remove_task("mnli")
    with pytest.raises(ConfigError, match="no prompt is loaded; use add_task or load_prompt"):
        model(ids)


def test_mistakes_are_named() -> None:
    model = SoftPromptModel(tiny.model("llama"), PromptConfig(num_virtual_tokens=3, init=RANDOM), "sst2")
    model.add_task("mnli", PromptConfig(num_virtual_tokens=3, init=RANDOM))
    model.add_task("deep", PromptConfig(num_virtual_tokens=3, site="kv", init=RANDOM))
    ids = rows.texts("llama", (4, 4))
    two = torch.stack(ids)
    with pytest.raises(ConfigError, match=r"^no prompt 'sts2'; did you mean 'sst2'\? loaded: deep, mnli, sst2$"):
        model(two, tasks="sts2")
    with pytest.raises(ConfigError, match=r"^no prompt 'xyz'; loaded: deep, mnli, sst2$"):
        model.remove_task("xyz")
    with pytest.raises(ConfigError, match="did you mean 'mnli'"):
        model.task = "mnl"
    with pytest.raises(ConfigError, match="3 tasks are named for 2 rows"):
        model(two, tasks=["sst2"] * 3)
    with pytest.raises(ConfigError, match="not both"):
        model(two, tasks="sst2", task_ids=[0])
    with pytest.raises(ConfigError, match="loaded: 0 sst2, 1 mnli, 2 deep"):
        model(two, task_ids=[0, 3])
    with pytest.raises(BackboneError, match=r"mnli at input \(replace\), deep at kv \(replace\)"):
        model(two, tasks=["mnli", "deep"])
    with pytest.raises(ConfigError, match="prompt 'mnli' already exists"):
        model.add_task("mnli")
    with pytest.raises(ConfigError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ConfigError, match="attention_mask must be"):
        model(two, attention_mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(BackboneError, match="gradient checkpointing has no effect"):
        model.gradient_checkpointing_enable()
    with pytest.raises(BackboneError, match="start one process for each device"):
        model._replicate_for_data_parallel()
    with pytest.raises(ConfigError, match="unknown method 'prompt-tunning'; did you mean 'prompt-tuning'"):
        model.add_task("typo", PromptConfig(method="prompt-tunning"))
    with pytest.raises(ConfigError, match=r"prompt.options of method prompt-tuning: .*'rank'"):
        model.add_task("typo", PromptConfig(options={"rank": 3}))
    with pytest.raises(ConfigError, match="labels or decoder_input_ids"):
        prompted("t5")(two)


def test_without_its_prompt_it_is_the_stock_model() -> None:
    model = prompted("llama", "sequence")
    with torch.no_grad():
        model.heads["default"].get_parameter("score.weight").zero_()
    ids = rows.ids(3, 6)[None]
    with model.no_prompt():
        assert torch.equal(model(ids, labels=torch.tensor([1])).logits, model.model(input_ids=ids).logits)
    assert not torch.allclose(model(ids).logits, model.model(input_ids=ids).logits, atol=1e-4)
    writer = prompted("gpt2")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with writer.no_prompt():
        assert torch.equal(writer.generate(ids, **options), writer.model.generate(ids, **options))


def test_generate_takes_what_the_stock_model_takes() -> None:
    model = prompted("llama")
    ids, mask = rows.pad(rows.texts("llama", (4, 7)), "left", value=0)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    full = torch.cat([WORDS.expand(2, -1), ids], 1)
    whole = torch.cat([ids[:, :3], WORDS.expand(2, -1), ids[:, 3:]], 1)
    whole[1] = full[1]
    expected = model.model.generate(
        whole, attention_mask=torch.cat([mask[:, :3], mask.new_ones(2, 4), mask[:, 3:]], 1), **options, pad_token_id=0
    )
    for found in (
        model.generate(ids, attention_mask=mask, **options),
        model.generate(input_ids=ids, **options),  # padding is found by its id, as in the stock model
        model.generate(inputs=ids, attention_mask=mask, **options, use_cache=True),
    ):
        assert torch.equal(found[:, :7], ids)
        assert torch.equal(found[:, 7:], expected[:, 11:])
    # Where padding also ends texts, as with most causal tokenizers, the stock model takes all for text.
    both = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [9, 0], "pad_token_id": 0}
    taken = model.generate(ids, attention_mask=torch.ones_like(ids), **both)
    assert torch.equal(model.generate(ids, **both), taken)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **options), expected[:, 11:])


def test_it_passes_for_the_stock_model() -> None:
    model = prompted("gpt2")
    stock: Any = model.model
    for name in ("config", "generation_config", "main_input_name", "base_model_prefix", "name_or_path"):
        assert getattr(model, name) == getattr(stock, name)
    assert (model.device, model.dtype) == (stock.device, stock.dtype)
    assert model.can_generate()
    assert model.get_input_embeddings() is stock.get_input_embeddings()
    assert model.get_output_embeddings() is stock.get_output_embeddings()
    assert not prompted("bert", "sequence").can_generate()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.prompts["default"].prompt.dtype == torch.float32
    assert model(rows.ids(1, 5)[None]).logits.dtype == torch.bfloat16
    classifier = prompted("bert", "sequence").to(torch.bfloat16)
    assert classifier(rows.texts("bert", (5,))[0][None]).logits.dtype == torch.bfloat16
    twin = copy.deepcopy(prompted("llama"))
    put(twin, "default", rows.random(1, 4, 32))
    assert torch.isfinite(twin(rows.ids(1, 5)[None]).logits).all()
    assert twin.backbone.model is twin.model
    assert isinstance(twin, SoftPromptModel)
    assert type(twin).__name__ == "LlamaForCausalLM"
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again(rows.ids(1, 5)[None]).logits, twin(rows.ids(1, 5)[None]).logits)


NAMES = ["a.b", "train", "items", "%", "with space", "..", "a/b"]


def test_any_name_will_do_and_many_tasks_come_back_in_order(tmp_path: Path) -> None:
    model = SoftPromptModel(tiny.model("llama"), PromptConfig(num_virtual_tokens=3, init=RANDOM), NAMES[0])
    for name in NAMES[1:]:
        model.add_task(name, PromptConfig(num_virtual_tokens=3, init=RANDOM))
    with torch.no_grad():
        for i, parameter in enumerate(model.prompts.parameters()):
            parameter.copy_(rows.random(i, 3, 32))
    assert len(model.state_dict()) == len(NAMES)
    model.save_pretrained(tmp_path / "all")
    assert {path.parent for path in (tmp_path / "all").iterdir()} == {tmp_path / "all"}
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
    again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path / "all")
    assert again.tasks == model.tasks == tuple(NAMES)
    ids = rows.ids(1, 5).expand(len(NAMES), -1)
    places = torch.arange(len(NAMES))
    assert torch.equal(model(ids, task_ids=places).logits, again(ids, task_ids=places).logits)
    SoftPromptModel(tiny.model("llama"), PromptConfig(num_virtual_tokens=3, init=RANDOM)).save_pretrained(
        tmp_path / "one"
    )
    with pytest.raises(ArtifactError, match="already holds a prompt; give another directory for these 7"):
        model.save_pretrained(tmp_path / "one")
    with pytest.raises(ArtifactError, match="is not empty and is not an artifact"):
        SoftPromptModel(tiny.model("llama"), PromptConfig(num_virtual_tokens=3, init=RANDOM)).save_pretrained(
            tmp_path / "all"
        )


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "head", "site"),
    [("llama", "lm", s) for s in ("input", "layers", "kv")]
    + [("t5", "lm", "decoder"), ("bert", "lm", "input"), ("bert", "sequence", "input"), ("gpt2", "span", "input")],
)
def test_saved_and_loaded_scores_are_equal_bit_for_bit(tmp_path: Path, name: str, head: str, site: str) -> None:
    model = prompted(name, head, site, words=None)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.add_(rows.random(len(key), *value.shape))
    model.save_pretrained(tmp_path)
    again = SoftPromptModel.from_pretrained(tiny.model(name, head), tmp_path)
    text = rows.texts(name, (6,))[0][None]
    labels = {"labels": text} if head == "lm" else {}
    found, expected = again(text, **labels), model(text, **labels)
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert all(p.requires_grad for p in (*again.prompts.parameters(), *again.heads.parameters()))
    assert list(again.state_dict()) == list(model.state_dict())


def test_peers_training_on(tmp_path: Path) -> None:
    """PEFT refuses to load a prompt for training."""
    ids = torch.stack([rows.ids(i, 6) for i in range(4)])

    def steps(model: Any, optimizer: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    straight = prompted("llama", words=None)
    sgd = torch.optim.SGD(straight.prompts.parameters(), lr=0.5)
    steps(straight, sgd, 3)
    straight.save_pretrained(tmp_path)
    steps(straight, sgd, 3)
    again = SoftPromptModel.from_pretrained(tiny.model("llama"), tmp_path)
    steps(again, torch.optim.SGD(again.prompts.parameters(), lr=0.5), 3)
    assert torch.equal(straight.prompts["default"].prompt, again.prompts["default"].prompt)
    again.save_pretrained(tmp_path / "more")
    first, second = (json.loads((path / "softprompts.json").read_text()) for path in (tmp_path, tmp_path / "more"))
    assert (first["parents"], second["parents"]) == ([], [first["digest"]])


def test_peers_wrong_weights(tmp_path: Path) -> None:
    model = prompted("llama", words=None)
    model.save_pretrained(tmp_path)
    other = SoftPromptModel(tiny.model("llama", seed=1), PromptConfig(num_virtual_tokens=2, init=RANDOM), "mine")
    with pytest.raises(ArtifactError, match="made for other weights: sketch distance"):
        other.load_prompt(tmp_path)
    assert other.tasks == ("mine",)
    name, warnings = other.load_prompt(tmp_path, "theirs", allow_other_weights=True)
    assert name == "theirs"
    assert "other weights" in warnings[0]
    assert other.tasks == ("mine", "theirs")
    with pytest.raises(ArtifactError, match="head 'lm', but LlamaForSequenceClassification"):
        SoftPromptModel.from_pretrained(tiny.model("llama", "sequence"), tmp_path, allow_other_weights=True)
    with pytest.raises(ArtifactError, match="no directory"):
        model.load_prompt(tmp_path / "nowhere")
    classifier = prompted("bert", "sequence")
    classifier.save_pretrained(tmp_path / "three")
    with pytest.raises(ArtifactError, match=r"head .* does not fit this model's"):
        SoftPromptModel.from_pretrained(
            tiny.model("bert", "sequence", labels=5), tmp_path / "three", allow_other_weights=True
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_directory_of_peft_is_used_and_trained_on(tmp_path: Path) -> None:
    base = tiny.model("gpt2")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = SoftPromptModel.from_pretrained(base, tmp_path)
    ids = rows.ids(4, 7)[None]
    expected = theirs(input_ids=ids, labels=ids)
    found = ours(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits[:, 5:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    assert ours.prompts[tmp_path.name].prompt.requires_grad


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_configuration_in_pefts_words(tmp_path: Path) -> None:
    tokenizers_tiny.byte_bpe().save_pretrained(tmp_path)
    model = tiny.model("llama")
    model.resize_token_embeddings(300)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=6,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="positive or negative?",
        tokenizer_name_or_path=str(tmp_path),
    )
    names = (
        "task_type",
        "num_virtual_tokens",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
    )
    same = peft.PromptTuningConfig(**{name: getattr(config, name) for name in names})
    theirs = peft.get_peft_model(copy.deepcopy(model), same)
    ours = SoftPromptModel(model, config)
    weight = theirs.prompt_encoder["default"].embedding.weight
    assert torch.equal(ours.prompts["default"].prompt, weight)


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A few rows for Trainer: class by first token, tags by parity, or the text itself."""

    def __init__(self, kind: str, count: int = 12) -> None:
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.cat([torch.tensor([1]), rows.ids(i, 4 + (i % 3 if self.kind == "sequence" else 2))])
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        more = {
            "lm": {"labels": ids.clone()},
            "mixed": {"labels": ids.clone(), "task_ids": i % 2},
            "sequence": {"labels": int(ids[1]) % 3},
            "token": {"labels": ids % 3},
            "span": {"start_positions": 1 + i % 3, "end_positions": 2 + i % 3},
        }
        return row | more[self.kind]


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key in batch[0]:
        values = [torch.as_tensor(row[key]) for row in batch]
        size = max(value.numel() for value in values)
        padded = [functional.pad(v, (0, size - len(v))) if v.dim() else v for v in values]
        found[key] = torch.stack(padded)
    return found


def trainer(model: Any, directory: Path, kind: str, **more: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        str(directory),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 4, "learning_rate": 0.01, "dataloader_pin_memory": False, **more},
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Rows(kind), eval_dataset=Rows(kind), data_collator=collate
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", "lm"), ("llama", "lm"), ("bert", "sequence"), ("llama", "sequence"), ("bert", "token"), ("bert", "span")],
)
def test_trainer_trains_it_as_it_is(tmp_path: Path, name: str, kind: str) -> None:
    """Unpatched: loss falls, metrics get stock lengths, the best checkpoint is loaded, the backbone is kept."""
    model = prompted(name, kind, words=None)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    seen: list[Any] = []
    run = trainer(
        model,
        tmp_path,
        kind,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        num_train_epochs=6,
        metric_for_best_model="eval_loss",
    )

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids))
        return {"seen": 1.0}

    run.compute_metrics = compute_metrics
    first = run.evaluate()
    assert first["eval_seen"] == 1.0
    run.train()
    history = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert min(history) < first["eval_loss"]
    predictions, labels = seen[-1]
    if kind == "span":
        assert [p.shape for p in predictions] == [(12, 7), (12, 7)]
        assert [p.shape for p in labels] == [(12,), (12,)]
    else:
        assert isinstance(predictions, np.ndarray)
        assert predictions.shape == ((12, 3) if kind == "sequence" else (*labels.shape, 3 if kind == "token" else 96))
    assert run.state.best_model_checkpoint is not None
    saved = Path(run.state.best_model_checkpoint) / "model.safetensors"
    assert saved.stat().st_size < 10_000  # prompt and head only
    assert run.evaluate()["eval_loss"] == pytest.approx(min(history), abs=tolerance(min(history)))
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_peers_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT fails at load_best_model_at_end with prompts."""
    model = prompted("gpt2", words=None)
    run = trainer(
        model,
        tmp_path,
        "lm",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="eval_loss",
        max_steps=4,
    )
    with caplog.at_level(logging.WARNING):
        run.train()
    history = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert history[0] == max(history)
    assert run.evaluate()["eval_loss"] == pytest.approx(history[0], abs=tolerance(history[0]))
    assert not any("missing keys" in r.message or "unexpected keys" in r.message for r in caplog.records)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_label_smoothing_shifts_as_for_the_stock_model(tmp_path: Path, name: str) -> None:
    """Trainer goes by the class's name here; a model that it does not know would learn unshifted labels in silence."""
    model = prompted(name)
    run = trainer(model, tmp_path, "lm", label_smoothing_factor=0.1)
    ids = torch.stack(rows.texts(name, (6, 6)))
    inputs = {"input_ids": ids, "labels": ids}
    full = torch.cat([WORDS.expand(2, -1), ids], 1)
    if name == "t5":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=ids)
        expected = model.model(input_ids=full, decoder_input_ids=inputs["decoder_input_ids"]).logits
    else:
        expected = model.model(input_ids=full).logits[:, 4:]
    wanted = run.label_smoother({"logits": expected}, ids, shift_labels=name == "llama")
    torch.testing.assert_close(run.compute_loss(model, inputs), wanted, **CLOSE)


def test_trainer_resumes(tmp_path: Path) -> None:
    straight = prompted("llama", words=None)
    trainer(straight, tmp_path / "a", "lm", save_strategy="steps", save_steps=3).train()
    again = prompted("llama", words=None)
    trainer(again, tmp_path / "b", "lm", save_strategy="no").train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3")
    )
    torch.testing.assert_close(again.state_dict(), straight.state_dict(), **CLOSE)


@pytest.mark.parametrize("site", ["input", "kv"])
def test_trainer_takes_batches_of_mixed_tasks_and_accumulates_exactly(tmp_path: Path, site: str) -> None:
    """Loss and gradient are sums over the labels that the prompt can score, divided by their number."""
    found = []
    for size, accumulate in ((12, 1), (3, 4)):
        model = prompted("llama", words=None, site=site)
        model.add_task("other")
        run = trainer(
            model,
            tmp_path,
            "mixed",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            num_train_epochs=1,
            save_strategy="no",
            max_grad_norm=0.0,
        )
        whole = collate([Rows("mixed")[i] for i in range(12)])
        with torch.no_grad():
            expected = model(**whole).loss.item()
        assert run.train().training_loss == pytest.approx(expected, rel=1e-5)
        found.append(model.state_dict())
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    assert not torch.equal(*found[0].values())


def test_a_sequence_to_sequence_trainer_generates_with_the_prompt(tmp_path: Path) -> None:
    model = prompted("t5", words=None)
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        max_steps=2,
        generation_max_length=6,
        dataloader_pin_memory=False,
    )
    seen = []
    run = transformers.Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows("lm"),
        eval_dataset=Rows("lm", 4),
        data_collator=collate,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )
    run.train()
    run.evaluate()
    ids = torch.stack([Rows("lm")[i]["input_ids"] for i in range(4)])
    expected = model.generate(ids, max_length=6)
    assert seen[0][:, : expected.shape[1]].tolist() == expected.tolist()
    with model.no_prompt():
        assert model.generate(ids, max_length=6).tolist() != expected.tolist()


def tokenized(name: str, head: str) -> tuple[Any, Any]:
    tokenizer = tokenizers_tiny.wordpiece() if name == "bert" else tokenizers_tiny.byte_bpe()
    model = tiny.model(name, head)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def test_pipelines_take_the_model_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    config = PromptConfig(num_virtual_tokens=5, init=InitConfig(kind="vocabulary"))

    model, tokenizer = tokenized("llama", "lm")
    writer: Any = SoftPromptModel(model, config, tokenizer=tokenizer)
    write = transformers.pipeline("text-generation", model=writer, tokenizer=tokenizer, device="cpu")
    texts = ["Review: a warm film.", "Who wrote the play about the king?"]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "return_full_text": False}
    one_by_one = [write(text, **options)[0]["generated_text"] for text in texts]
    tokenizer.padding_side = "left"
    assert [x[0]["generated_text"] for x in write(texts, batch_size=2, **options)] == one_by_one
    with writer.no_prompt():
        assert [write(text, **options)[0]["generated_text"] for text in texts] != one_by_one
    full = write(texts[0], do_sample=False, max_new_tokens=5)[0]["generated_text"]
    assert full == texts[0] + one_by_one[0]

    for name in ("bert", "llama"):
        model, tokenizer = tokenized(name, "sequence")
        classifier: Any = SoftPromptModel(model, config, tokenizer=tokenizer)
        classify = transformers.pipeline("text-classification", model=classifier, tokenizer=tokenizer, device="cpu")
        given = tokenizer(texts[0], return_tensors="pt")
        scores = classifier(**given).logits.softmax(-1)[0].detach()
        assert classify(texts[0]) == [
            {"label": f"LABEL_{int(scores.argmax())}", "score": pytest.approx(float(scores.max()))}
        ]
        together = classify(texts, batch_size=2)
        assert together[0]["score"] == pytest.approx(float(scores.max()), abs=1e-5)

    model, tokenizer = tokenized("bert", "token")
    tagger: Any = SoftPromptModel(model, config, tokenizer=tokenizer)
    tag = transformers.pipeline("token-classification", model=tagger, tokenizer=tokenizer, device="cpu")
    found = tag(texts[0], ignore_labels=[])
    assert len(found) == len(tokenizer(texts[0], add_special_tokens=False)["input_ids"])

    model, tokenizer = tokenized("bert", "lm")
    filler: Any = SoftPromptModel(model, config, tokenizer=tokenizer)
    fill = transformers.pipeline("fill-mask", model=filler, tokenizer=tokenizer, device="cpu")
    best = fill("a warm [MASK] film.", top_k=1)[0]
    given = tokenizer("a warm [MASK] film.", return_tensors="pt")
    at = int((given.input_ids[0] == tokenizer.mask_token_id).nonzero())
    assert best["token"] == int(filler(**given).logits[0, at].argmax())
    assert not any("not supported" in record.message for record in caplog.records)
