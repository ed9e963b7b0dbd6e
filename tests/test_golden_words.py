"""Golden: a prompt made of words, or put in front by hand, gives what the stock model gives."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import rows
import tiny
from rows import ADD, INPUT, KV, REPLACE, called
from softprompts import injection
from softprompts.backbone.cache import cache_argument
from softprompts.errors import BackboneError
from softprompts.model import initialization
from softprompts.types import Batch

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PADDINGS = (("right", 0), ("left", 0), ("left", 3))
BIDIRECTIONAL = (*tiny.SEQ2SEQ, *tiny.MASKED)
# What an encoder does to words depends on the text, so hidden states kept from the words alone cannot replace it.
WORDS = [(n, s) for n, s in rows.cases(tiny.ALL) if not (n in BIDIRECTIONAL and s == REPLACE)]


def places(name: str, batch: Batch) -> list[int]:
    """Where the prompt enters by default."""
    return [1 if name in tiny.MASKED else 0] * len(batch.input_ids)


def check(
    name: str, site: injection.Site, values: Tensor, reference: Callable[..., Tensor], place: str = "auto"
) -> None:
    """Compare every row, padded in every way, with the stock model on that row alone."""
    bb = tiny.backbone(name)
    texts = rows.texts(name)
    for side, extra in PADDINGS:
        batch = rows.batch(name, texts, side, extra)
        where = [0] * len(texts) if place == "first" else places(name, batch)
        output = injection.score(bb, batch, rows.single(values, len(texts)), site)
        for i, row in enumerate(texts):
            torch.testing.assert_close(rows.of_row(output, i), reference(row, where[i]), **CLOSE)
    alone = injection.score(bb, rows.batch(name, texts[:1]), rows.single(values), site)
    torch.testing.assert_close(alone.logits, reference(texts[0], where[0]), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), WORDS, ids=called)
def test_words(name: str, site: injection.Site) -> None:
    bb = tiny.backbone(name)
    words = rows.ids(7, 4)
    values = initialization.from_ids(bb, site, words).to(bb.device)
    assert values.shape == (4, injection.prompt_width(bb, site))
    check(name, site, values, lambda row, place: rows.read_words(bb, site, words, row, place))


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.ALL), ids=called)
def test_by_hand(name: str, site: injection.Site) -> None:
    bb = tiny.backbone(name)
    values = rows.random(3, 5, injection.prompt_width(bb, site))
    check(name, site, values, lambda row, place: rows.by_hand(bb, site, values, row, place))


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.MASKED), ids=called)
def test_first_in_encoders(name: str, site: injection.Site) -> None:
    bb = tiny.backbone(name)
    site = injection.Site(site.name, site.mode, "first")
    values = rows.random(3, 5, injection.prompt_width(bb, site))
    check(name, site, values, lambda row, _: rows.by_hand(bb, site, values, row, 0), "first")


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.ALL, ("input", "layers")), ids=called)
def test_place_of_each_row(name: str, site: injection.Site) -> None:
    """The prompt may stand in the middle of a row or behind it, at another place in each row."""
    bb = tiny.backbone(name)
    texts = rows.texts(name)
    where = [2, 9, 0, 3]
    values = rows.random(3, 5, injection.prompt_width(bb, site))
    for side, extra in PADDINGS:
        batch = rows.batch(name, texts, side, extra)
        batch = Batch(
            batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels, prompt_offsets=torch.tensor(where)
        )
        output = injection.score(bb, batch, rows.single(values, len(texts)), site)
        assert output.path.startswith("concatenation")
        for i, row in enumerate(texts):
            torch.testing.assert_close(rows.of_row(output, i), rows.by_hand(bb, site, values, row, where[i]), **CLOSE)


def test_place_outside_the_text() -> None:
    batch = rows.batch("llama", rows.texts("llama", (3, 4)))
    batch = Batch(batch.input_ids, batch.attention_mask, batch.task_ids, prompt_offsets=torch.tensor([4, 0]))
    with pytest.raises(BackboneError, match=r"places \[4, 0\] do not all lie within texts of \[3, 4\] tokens"):
        injection.score(tiny.backbone("llama"), batch, rows.single(torch.zeros(2, 32), 2), INPUT)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_last_scores_the_next_token(name: str) -> None:
    """`Output.last` stands at the end of the run, also where that is the prompt."""
    bb = tiny.backbone(name)
    texts = rows.texts(name)
    values = rows.random(3, 4, injection.prompt_width(bb, INPUT))
    for where in ([0, 0, 0, 0], [2, 9, 1, 3]):
        batch = rows.batch(name, texts, "left")
        batch = Batch(
            batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels, prompt_offsets=torch.tensor(where)
        )
        output = injection.score(bb, batch, rows.single(values, 4), INPUT)
        for row, place, last in zip(texts, where, output.last_state, strict=True):
            text = bb.embedding(row)
            full = torch.cat([text[:place], values, text[place:]])[None]
            torch.testing.assert_close(last, bb.trunk(inputs_embeds=full).last_hidden_state[0, -1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.CAUSAL)
@pytest.mark.parametrize("site", [INPUT, KV], ids=called)
def test_given_positions(name: str, site: injection.Site) -> None:
    """A caller's text positions count on behind the prompt, shared or not."""
    bb = tiny.backbone(name)
    row = rows.texts(name, (6,))[0]
    batch = rows.batch(name, [row], "left", 2)
    batch = replace(batch, position_ids=torch.tensor([[0, 0, 3, 4, 5, 6, 7, 8]]))
    values = rows.random(3, 4, injection.prompt_width(bb, site))
    if "position_ids" not in bb.trunk_arguments:
        with pytest.raises(BackboneError, match="counts positions itself"):
            injection.score(bb, batch, rows.single(values), site)
        return
    ids = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10, 11, 12])[None]
    if site == KV:
        cache = rows.hand_made_cache(bb, values)
        expected = bb.model(input_ids=row[None], **cache_argument(bb.model, cache), position_ids=ids[:, 4:]).logits[
            0, :-1
        ]
    else:
        full = torch.cat([values, bb.embedding(row)])[None]
        expected = bb.model(inputs_embeds=full, position_ids=ids).logits[0, 3:-1]
    found = [injection.score(bb, batch, rows.single(values), site, path=path) for path in rows.paths(name, site)]
    for output in found:
        torch.testing.assert_close(output.logits, expected, **CLOSE)
        torch.testing.assert_close(output.last_state, found[0].last_state, **CLOSE)


@torch.no_grad()
def test_token_types() -> None:
    """Token types of a pair stay with their tokens; the prompt has type 0."""
    bb = tiny.backbone("bert")
    row, types = rows.texts("bert", (6,))[0], torch.tensor([0, 0, 0, 1, 1, 1])
    values = rows.random(3, 2, 32)
    text, mask = rows.pad([row], "left", 2)
    padded = torch.nn.functional.pad(types[None], (2, 0))
    batch = Batch(text, mask, torch.zeros(1), text.masked_fill(mask == 0, -100), token_type_ids=padded)
    full = torch.cat([bb.embedding(row[:1]), values, bb.embedding(row[1:])])[None]
    seen = bb.model(inputs_embeds=full, token_type_ids=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])).logits[0]
    output = injection.score(bb, batch, rows.single(values), INPUT)
    torch.testing.assert_close(output.logits, seen[[0, 3, 4, 5, 6, 7]], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ALL)
def test_no_prompt(name: str) -> None:
    """Without a prompt the aligned scores are the stock model's own."""
    bb = tiny.backbone(name)
    texts = rows.texts(name)
    for side, extra in PADDINGS:
        output = injection.score(bb, rows.batch(name, texts, side, extra), None, INPUT)
        for i, row in enumerate(texts):
            expected = rows.by_hand(bb, INPUT, torch.zeros(0, bb.embedding_size), row)
            torch.testing.assert_close(rows.of_row(output, i), expected, **CLOSE)


def test_wrong_sites_say_what_is_possible() -> None:
    for name, site, match in (
        ("bert", KV, "possible: input, layers; 'layers' puts a prompt at every layer of a model without a cache"),
        ("albert", ADD, "has no stack of 3 separate layers .* use site 'input'"),
        ("opt_projected", REPLACE, "embeds in 24 dimensions and works in 32: .* use site 'input'"),
        ("llama", injection.Site("decoder"), "site 'decoder' is not possible for causal models"),
        ("llama", injection.Site(mode="multiply"), "mode 'multiply' is unknown; possible: replace, add"),
        (
            "llama",
            injection.Site(placement="last"),
            "placement 'last' is unknown; possible: auto, first, after_start, suffix, ",
        ),
        (
            "llama",
            injection.Site("kv", placement="after_start"),
            "placement 'after_start' is not possible at site 'kv'",
        ),
    ):
        with pytest.raises(BackboneError, match=match):
            injection.prompt_width(tiny.backbone(name), site)
