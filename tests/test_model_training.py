"""SoftPromptModel.forward in training mode: labeled positions only, the same loss and gradient; tuned kernels."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import tiny
from closeness import GRADIENT_ROUNDINGS, assert_close
from softprompts import SoftPromptModel, injection
from softprompts.backbone.kernels import Kernels
from softprompts.config import PromptConfig
from softprompts.model import setup
from softprompts.types import IGNORE

PROMPT_TOKENS = 4
FAMILIES = ("gpt2", "llama", "gemma3", "t5", "bart", "bert")


def prompted_model(name: str, **options: Any) -> SoftPromptModel:
    torch.manual_seed(0)
    stock = copy.deepcopy(tiny.backbone(name).model)
    return SoftPromptModel(stock, PromptConfig(num_virtual_tokens=PROMPT_TOKENS, **options))


def padded(name: str, side: str) -> dict[str, Tensor]:
    """Three texts of 5, 2 and 7 tokens, padded on `side`; every second label is ignored."""
    ids, mask = rows.pad([rows.ids(seed, length) for seed, length in ((1, 5), (2, 2), (3, 7))], side)
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, 1::2] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradient(model: SoftPromptModel, batch: dict[str, Any]) -> tuple[Any, Tensor]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    (parameter,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    assert parameter.grad is not None
    return output, parameter.grad.clone()


@pytest.mark.golden
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_mode_has_the_loss_and_gradient_of_eval_mode_and_no_logits(name: str, side: str) -> None:
    model, batch = prompted_model(name), padded(name, side)
    every, expected = loss_and_gradient(model, batch)
    labeled, gradient = loss_and_gradient(model.train(), batch)
    assert every.logits.shape[:2] == batch["input_ids"].shape
    assert labeled.logits is None
    assert type(labeled) is type(every)
    assert_close(labeled.loss, every.loss)
    assert_close(gradient, expected, GRADIENT_ROUNDINGS)


@pytest.mark.parametrize("keep", [0, 2])
def test_training_mode_returns_the_logits_that_a_caller_asks_for(keep: int) -> None:
    model, batch = prompted_model("llama"), padded("llama", "right")
    expected = model(**batch, logits_to_keep=keep)
    output = model.train()(**batch, logits_to_keep=keep)
    assert_close(output.logits, expected.logits)
    assert_close(output.loss, expected.loss)


def test_the_loss_of_an_accumulated_batch_is_divided_by_the_given_number_of_labels() -> None:
    model, batch = prompted_model("llama"), padded("llama", "right")
    count = int((batch["labels"] != IGNORE).sum())
    mean = model.train()(**batch).loss
    assert_close(model(**batch, num_items_in_batch=2 * count).loss, mean / 2)
    assert_close(model(**batch, num_items_in_batch=torch.tensor(count)).loss, mean)


def test_a_large_vocabulary_is_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = prompted_model("llama").train(), padded("llama", "right")
    whole, expected = loss_and_gradient(model, batch)
    monkeypatch.setattr(injection.scoring, "MAX_LOGITS", 2 * tiny.VOCABULARY)
    parts, gradient = loss_and_gradient(model, batch)
    assert_close(parts.loss, whole.loss)
    assert_close(gradient, expected, GRADIENT_ROUNDINGS)


def test_labels_of_padding_do_not_count() -> None:
    model, batch = prompted_model("llama").train(), padded("llama", "right")
    expected = model(**batch).loss
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, 7)
    assert_close(model(**batch).loss, expected)


def test_only_labeled_positions_reach_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = prompted_model("llama").train(), padded("llama", "right")
    projected = []
    head = model.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, arguments, logits: projected.append(logits.numel()))
    model(**batch)
    handle.remove()
    assert sum(projected) == int((batch["labels"] != IGNORE).sum()) * tiny.VOCABULARY


def test_a_stock_model_is_tuned_once_before_its_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def autotune(backbone: Any, **options: Any) -> setup.TunedKernels:
        measured.append(backbone.device)
        return setup.TunedKernels(Kernels(path="shared"), {})

    monkeypatch.setattr(setup, "autotune", autotune)
    model, batch = prompted_model("llama"), padded("llama", "right")
    assert measured == []  # building a model costs no measurement
    model(**batch)
    model.train()(**batch)
    model.eval().generate(batch["input_ids"], max_new_tokens=1)
    assert len(measured) == 1
    assert model.backbone.kernels == Kernels(path="shared")
    model.to(torch.bfloat16)
    model(**batch)
    assert len(measured) == 2  # another dtype has other kernels


def test_autotune_false_and_a_backbone_keep_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "autotune", lambda *_, **__: pytest.fail("measured"))
    batch = padded("llama", "right")
    config = PromptConfig(num_virtual_tokens=PROMPT_TOKENS)
    SoftPromptModel(copy.deepcopy(tiny.backbone("llama").model), config, autotune=False)(**batch)
    SoftPromptModel(tiny.backbone("llama"), config)(**batch)
