"""Golden: a stock head says of text behind a prompt of words what it says of the words and the text."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

import rows
import tiny
from closeness import assert_close
from rows import ADD, INPUT, REPLACE, called
from softprompts import backbone as b
from softprompts import injection
from softprompts.model import initialization
from softprompts.training import objectives
from softprompts.types import IGNORE, Batch, Output, Prompt, Step

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLASSES = {
    "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "span": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "features": auto.MODEL_MAPPING,
}
DEEP = ("gpt2", "llama", "gemma3", "bert", "t5")


def cases() -> list[tuple[str, str, injection.Site]]:
    """Every family that has the head at site input, some at all sites where words are exact."""
    found = []
    for head, classes in CLASSES.items():
        for name in tiny.ALL:
            if type(tiny.CONFIGS[name]()) not in classes:
                continue
            deep = [s for s in rows.sites(name) if s.name in ("layers", "kv")] if name in DEEP else []
            if name not in tiny.CAUSAL:
                deep = [s for s in deep if s == ADD]
            found += [(name, head, site) for site in (INPUT, *deep)]
    return found


def stock(bb: b.Backbone, head: str, full: Tensor, text: Tensor, where: list[int]) -> Tensor:
    """What the stock model says of `full`: [C] of a sequence, else of the positions `where`, one row each."""
    model = bb.model
    if bb.family.name == "seq2seq":  # the prompt is the encoder's alone; the decoder reads the text
        more = {"decoder_input_ids": rows.shifted(bb, text)[None]}
        if head == "span":
            out = model(input_ids=full[None], **more)
            return torch.stack([out.start_logits, out.end_logits], -1)[0]
        states = bb.trunk(input_ids=full[None], **more).last_hidden_state
        return model.classification_head(states[:, -1])[0] if head == "sequence" else states[0]
    out = model(input_ids=full[None])
    if head == "sequence":
        return out.logits[0]
    if head == "span":
        return torch.stack([out.start_logits, out.end_logits], -1)[0, where]
    return (out.last_hidden_state if head == "features" else out.logits)[0, where]


def ours(output: Output, head: str, index: int, batch: Batch) -> Tensor:
    """The same of our output."""
    if head == "sequence":
        return output.logits[index]
    if head == "token":
        return rows.of_row(output, index)
    if head == "features":
        return output.hidden_states[index][batch.attention_mask[index].bool()]
    both = output.logits.view(2, len(batch.input_ids), -1)[:, index]
    assert (both[:, batch.attention_mask[index] == 0] == torch.finfo(both.dtype).min).all(), (
        "padding must never be chosen"
    )
    return both[:, batch.attention_mask[index].bool()].T


def with_labels(batch: Batch, head: str) -> Batch:
    """Labels that fit the head."""
    count = len(batch.input_ids)
    labels = {
        "sequence": torch.arange(count) % 3,
        "token": (batch.input_ids % 3).masked_fill(batch.attention_mask == 0, IGNORE),
        "span": torch.stack([batch.attention_mask.argmax(1), batch.attention_mask.argmax(1)], 1),
    }
    return replace(batch, labels=labels.get(head))


@torch.no_grad()
@pytest.mark.parametrize(("name", "head", "site"), cases(), ids=called)
def test_heads(name: str, head: str, site: injection.Site) -> None:
    bb = tiny.backbone(name, head)
    assert bb.head == head
    words = rows.ids(7, 4)
    values = initialization.from_ids(bb, site, words)
    texts = rows.texts(name)
    end = bb.model.config.eos_token_id
    if name in tiny.SEQ2SEQ:
        texts = [torch.cat([text, torch.tensor([end])]) for text in texts]
    place = int(injection.resolve_placement(bb, site) == "after_start")
    sides = (("right", 0), ("left", 2))
    for (side, extra), path in itertools.product(sides, (None, *rows.paths(name, site))):
        text, mask = rows.pad(texts, side, extra, value=3)
        batch = with_labels(Batch(text, mask, torch.zeros(len(texts), dtype=torch.long)), head)
        output = injection.score(bb, batch, rows.single(values, len(texts)), site, path=path)
        bare = injection.score(bb, batch, None, site)
        for i, row in enumerate(texts):
            full = torch.cat([row[:place], words, row[place:]])
            where = [*range(place), *range(place + 4, len(full))]
            torch.testing.assert_close(ours(output, head, i, batch), stock(bb, head, full, row, where), **CLOSE)
            unprompted = stock(bb, head, row, row, list(range(len(row))))
            torch.testing.assert_close(ours(bare, head, i, batch), unprompted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bart", "t5", "bert"])
def test_heads_mixed_rows(name: str) -> None:
    """Sequence scores of a batch with prompts of several lengths equal those of each row alone."""
    bb = tiny.backbone(name, "sequence")
    texts = [torch.cat([t, torch.tensor([2])]) for t in rows.texts(name)]
    values = [rows.random(i, n, bb.embedding_size) for i, n in enumerate((2, 9))]
    text, mask = rows.pad(texts, "left", 1, value=3)
    batch = Batch(text, mask, torch.zeros(4))
    mixed = injection.score(bb, batch, rows.several(values, [0, 1, 1, 0]), INPUT).logits
    for i, who in enumerate([0, 1, 1, 0]):
        alone = Batch(texts[i][None], torch.ones(1, len(texts[i])), torch.zeros(1))
        torch.testing.assert_close(
            mixed[i], injection.score(bb, alone, rows.single(values[who]), INPUT).logits[0], **CLOSE
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sequence_head_reads_a_prompt_behind_the_text(name: str) -> None:
    """A suffix prompt is what the pooled state has read last; otherwise it could not be trained."""
    bb = tiny.backbone(name, "sequence")
    texts = rows.texts(name, (5, 3))
    values = rows.random(0, 4, 32)
    text, mask = rows.pad(texts, "left", 1, value=3)
    batch = Batch(text, mask, torch.zeros(2), prompt_offsets=torch.tensor([5, 3]))
    output = injection.score(bb, batch, rows.single(values, 2), INPUT)
    for i, row in enumerate(texts):
        state = bb.trunk(inputs_embeds=torch.cat([bb.embedding(row), values])[None]).last_hidden_state[0, -1]
        torch.testing.assert_close(output.logits[i], bb.model.score(state), **CLOSE)


def spans(out: Any, where: list[int], labels: Tensor) -> Tensor:
    """The stock loss of spans, chosen among the text's own positions."""
    start, end = out.start_logits[:, where], out.end_logits[:, where]
    entropy = torch.nn.functional.cross_entropy
    return (entropy(start, labels[:, 0]) + entropy(end, labels[:, 1])) / 2


def losses(name: str, head: str, labels: Tensor, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Our loss of one row behind a prompt of words, and the stock model's of words and text."""
    bb = b.wrap(tiny.model(name, head, classes), name=name)
    words, row = rows.ids(7, 4), rows.texts(name, (6,))[0]
    batch = Batch(row[None], torch.ones(1, 6), torch.zeros(1), labels)
    prompt = rows.single(initialization.from_ids(bb, INPUT, words))
    output = injection.score(bb, batch, prompt, INPUT)
    place = int(bb.family.name == "masked")
    full = torch.cat([row[:place], words, row[place:]])[None]
    given: dict[str, Tensor] = {"labels": labels}
    if head == "token":
        given["labels"] = torch.cat([labels[:, :place], torch.full((1, 4), IGNORE), labels[:, place:]], 1)
    if head == "span":
        given = {}
    out = bb.model(input_ids=full, **given)
    theirs = out.loss if head != "span" else spans(out, [*range(place), *range(place + 4, 10)], labels)
    return objectives.task(Step(batch, prompt, output)), theirs


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "roberta"])
def test_losses(name: str) -> None:
    """Classes, several labels, values, tags and spans: the loss is the stock model's."""
    for head, labels, classes in (
        ("sequence", torch.tensor([2]), 3),
        ("sequence", torch.tensor([[1.0, 0.0, 1.0]]), 3),
        ("sequence", torch.tensor([0.7]), 1),
        ("token", torch.tensor([[0, IGNORE, 2, 1, 0, 1]]), 3),
        ("span", torch.tensor([[2, 4]]), 2),
    ):
        mine, theirs = losses(name, head, labels, classes)
        assert_close(mine, theirs)


@torch.no_grad()
def test_losses_of_batches() -> None:
    """Over a padded batch the loss is the mean over rows (classes, values) or over labeled tokens (tags)."""
    bb = tiny.backbone("llama", "sequence", 1)
    text, mask = rows.pad(rows.texts("llama"), "left", value=3)
    batch = Batch(text, mask, torch.zeros(4), torch.tensor([0.5, -1.0, 2.0, 0.0]))
    prompt: Prompt = rows.single(rows.random(0, 3, 32), 4)
    output = injection.score(bb, batch, prompt, INPUT)
    assert output.logits.shape == (4, 1)
    expected = (output.logits[:, 0] - batch.labels).square().mean()
    torch.testing.assert_close(objectives.task(Step(batch, prompt, output)), expected)


def test_no_labels_no_loss() -> None:
    bb = tiny.backbone("llama")
    batch = rows.batch("llama", rows.texts("llama"))
    prompt = rows.single(rows.random(0, 3, 32), 4)
    for labels in (None, torch.full_like(batch.labels, IGNORE)):
        output = injection.score(bb, replace(batch, labels=labels), prompt, INPUT)
        assert output.last_state is not None
        with pytest.raises(ValueError, match="the batch holds no label to learn from"):
            objectives.task(Step(batch, prompt, output))


def test_labels_are_optional() -> None:
    """Sequence and span heads score without labels; hidden states come where asked for, in the text's layout."""
    for head, shape in (("sequence", (4, 3)), ("span", (8, 10))):
        text, mask = rows.pad(rows.texts("bert"), "left", 1)
        output = injection.score(tiny.backbone("bert", head), Batch(text, mask, torch.zeros(4)), None, INPUT)
        assert output.logits.shape == shape
        assert output.labels is None
    batch = rows.batch("llama", rows.texts("llama"), "left", 1)
    for site in (INPUT, REPLACE):
        values = rows.random(0, 3, injection.prompt_width(tiny.backbone("llama"), site))
        one, *others = (
            injection.score(
                tiny.backbone("llama"), batch, rows.single(values, 4), site, return_hidden_states=True, path=path
            ).hidden_states
            for path in rows.paths("llama", site)
        )
        assert one.shape == (4, 10, 32)
        assert (one[batch.attention_mask == 0] == 0).all()
        for other in others:
            torch.testing.assert_close(one, other, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.SEQ2SEQ)
def test_hidden_of_encoder_decoder_models(name: str) -> None:
    """Hidden states asked for are the text's, so the encoder's, whatever the decoder is fed."""
    bb, texts = tiny.backbone(name), rows.texts(name)
    batch, values = rows.batch(name, texts, "left", 2), rows.random(0, 3, 32)
    for given in (batch, replace(batch, labels=None)):
        hidden = injection.score(bb, given, rows.single(values, 4), INPUT, return_hidden_states=True).hidden_states
        for i, row in enumerate(texts):
            full = torch.cat([values, bb.embedding(row)])[None]
            expected = bb.encoder(inputs_embeds=full).last_hidden_state[0, 3:]
            torch.testing.assert_close(hidden[i][batch.attention_mask[i].bool()], expected, **CLOSE)
