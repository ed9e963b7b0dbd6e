"""Golden: a prompt in several segments, anywhere in the text, gives what the stock model gives for words there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rows
import test_golden_contract as contract
import tiny
from rows import ADD, INPUT, KV, REPLACE, called
from softprompts import injection
from softprompts.backbone import Backbone
from softprompts.errors import BackboneError
from softprompts.injection import generation
from softprompts.model import initialization
from softprompts.types import Batch

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = (2, 3)
PLACES = ((1, 3), (0, 9), (1, 1), (4, 7))  # of texts of 5, 9, 1 and 7 tokens
PADDINGS = (("right", 0), ("left", 3))


def order(place: Sequence[int], sizes: Sequence[int], count: int) -> list[int]:
    """A full row as indices of [prompt | text]: text tokens up to each place, then that segment."""
    found, text, slot = [], 0, 0
    length = sum(sizes)
    for stands, size in zip(place, sizes, strict=True):
        found += [*range(length + text, length + stands), *range(slot, slot + size)]
        text, slot = stands, slot + size
    return [*found, *range(length + text, length + count)]


def scoring(bb: Backbone, full: Sequence[int], length: int) -> list[int]:
    """Positions of a full row that score its text tokens, those that something scores."""
    back = int(bb.family.scores_next_token)
    return [at - back for at, token in enumerate(full) if token >= length and at >= back]


def stock(bb: Backbone, row: Tensor, **full: Tensor) -> Tensor:
    """The stock model's logits for one full row, with the row's targets in encoder-decoder models."""
    if bb.family.name != "seq2seq":
        return bb.model(**full).logits[0]
    return bb.model(**full, decoder_input_ids=rows.shifted(bb, rows.targets([row])[0])[None]).logits[0]


def read_words(bb: Backbone, words: Tensor, row: Tensor, place: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The stock model's scores of `row`'s labels when it reads `words` as ids among them."""
    full = order(place, sizes, len(row))
    logits = stock(bb, row, input_ids=torch.cat([words, row])[full][None])
    return logits if bb.family.name == "seq2seq" else logits[scoring(bb, full, len(words))]


def by_hand(
    bb: Backbone,
    site: injection.Site,
    values: Tensor,
    row: Tensor,
    place: Sequence[int],
    sizes: Sequence[int],
    added: Tensor | float = 0.0,
) -> Tensor:
    """The same with the prompt `values [P, D]` put in by hand, at every layer where it is deep; `added` to the text."""
    full = order(place, sizes, len(row))
    own = [at for at, token in enumerate(full) if token < len(values)]
    parts = values.chunk(len(bb.layers) if site.name == "layers" else 1, -1)
    both = torch.cat([parts[0], bb.model.get_input_embeddings()(row) + added])[full][None]
    handles = []
    for layer, part in list(zip(bb.layers, parts, strict=False))[1:] if len(parts) > 1 else []:

        def enter(_: Any, args: Any, kwargs: Any, part: Tensor = part) -> Any:
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            states[:, own] = states[:, own] + part if site.mode == "add" else part.expand_as(states[:, own])
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        logits = stock(bb, row, inputs_embeds=both)
    finally:
        for handle in handles:
            handle.remove()
    return logits if bb.family.name == "seq2seq" else logits[scoring(bb, full, len(values))]


def slotted(batch: Batch, places: Sequence[Sequence[int]] = PLACES, sizes: Sequence[int] = SIZES) -> Batch:
    """The batch with the places of its rows' segments."""
    return replace(batch, prompt_offsets=torch.tensor(places), segment_lengths=torch.tensor([sizes] * len(places)))


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ALL)
def test_words_in_segments(name: str) -> None:
    """Every family reads word embeddings in two places of each row as the stock model reads those words there."""
    bb, texts, words = tiny.backbone(name), rows.texts(name), rows.ids(7, sum(SIZES))
    prompt = rows.single(initialization.from_ids(bb, INPUT, words), len(texts))
    expected = [read_words(bb, words, row, place, SIZES) for row, place in zip(texts, PLACES, strict=True)]
    for side, extra in PADDINGS:
        output = injection.score(bb, slotted(rows.batch(name, texts, side, extra)), prompt, INPUT)
        assert output.path.startswith("concatenation")
        for i, scores in enumerate(expected):
            torch.testing.assert_close(rows.of_row(output, i), scores, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.MAIN, ("layers",)), ids=called)
def test_deep_prompts_in_segments(name: str, site: injection.Site) -> None:
    bb, texts = tiny.backbone(name), rows.texts(name)
    values = rows.random(3, sum(SIZES), injection.prompt_width(bb, site))
    parted = replace(site, placement="template", segments=SIZES)  # the site says the sizes, the batch the places
    batch = replace(rows.batch(name, texts, "left", 1), prompt_offsets=torch.tensor(PLACES))
    output = injection.score(bb, batch, rows.single(values, len(texts)), parted)
    for i, (row, place) in enumerate(zip(texts, PLACES, strict=True)):
        torch.testing.assert_close(rows.of_row(output, i), by_hand(bb, site, values, row, place, SIZES), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bert", "t5"])
def test_rows_of_other_prompts_and_segments(name: str) -> None:
    """Prompts of other lengths, in one to three segments, share a batch; each row and the gradient are as alone."""
    bb, texts = tiny.backbone(name), rows.texts(name)
    values = [rows.random(i, n, bb.embedding_size).requires_grad_() for i, n in enumerate((2, 6, 5))]
    used = [1, 0, 2, 1]
    sizes = ((1, 2, 3), (2,), (4, 1), (1, 2, 3))
    places = ((0, 2, 5), (4,), (0, 1), (7, 7, 7))
    expected = [
        by_hand(bb, INPUT, values[u], *row) for u, row in zip(used, zip(texts, places, sizes, strict=True), strict=True)
    ]
    weights = [rows.random(90 + i, *one.shape) for i, one in enumerate(expected)]
    wanted = torch.autograd.grad(sum((x * w).sum() for x, w in zip(expected, weights, strict=True)), values)
    padded = [[*place, *[place[-1]] * (3 - len(place))] for place in places]
    parts = torch.tensor([[*size, *[0] * (3 - len(size))] for size in sizes])
    for side, extra in PADDINGS:
        batch = replace(
            rows.batch(name, texts, side, extra), prompt_offsets=torch.tensor(padded), segment_lengths=parts
        )
        output = injection.score(bb, batch, rows.several(values, used), INPUT)
        found = [rows.of_row(output, i) for i in range(4)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        gradients = torch.autograd.grad(sum((x * w).sum() for x, w in zip(found, weights, strict=True)), values)
        for one, other in zip(gradients, wanted, strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("name", "site", "method"), contract.everywhere("llama", "bert", "t5"), ids=called)
def test_every_method_stands_in_segments(name: str, site: injection.Site, method: str) -> None:
    """Each row of a padded batch as its prompt put in by hand; one that is shorter for its text ends in the first."""
    if site.name not in ("input", "layers"):
        return
    parted = replace(site, placement="template", segments=SIZES)
    made = contract.tuned(name, method, parted)
    for i, parameter in enumerate(made.prompts.parameters()):
        parameter.add_(rows.random(40 + i, *parameter.shape) / 4)
    places = ((0, 2), (1, 2), (2, 2), (0, 1))
    batch = replace(contract.batch_of(name, [2, 0, 1, 2]), prompt_offsets=torch.tensor(places))
    prompt = made.make_prompts(batch)
    every = batch.input_ids.masked_fill(
        batch.attention_mask == 0, -100
    )  # all of the text is scored, whatever made the prompt
    seen = batch if made.backbone.family.name == "seq2seq" else replace(batch, labels=every)
    output = injection.score(made.backbone, seen, prompt, parted)
    for i, place in enumerate(places):
        row, own = batch.input_ids[i][batch.attention_mask[i].bool()], prompt.prompt_index[i]
        values, added = prompt.values[own][prompt.mask[own]], torch.zeros(len(row), made.backbone.embedding_size)
        if prompt.embedding_delta is not None:
            reach = min(int(prompt.embedding_delta.reach[i]), prompt.embedding_delta.values.shape[1])
            added[:reach] = prompt.embedding_delta.values[own, :reach]
            assert added.any()
        first = min(SIZES[0], len(values))
        expected = by_hand(made.backbone, site, values, row, place, (first, len(values) - first), added)
        torch.testing.assert_close(rows.of_row(output, i), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gptj", "bloom"])
def test_slots_before_the_text_are_shared(name: str) -> None:
    """Where nothing stands before any segment, prompts are computed once, as at place `first`."""
    bb, texts = tiny.backbone(name), rows.texts(name)
    values = rows.random(0, 5, bb.embedding_size).requires_grad_()
    prompt, batch = rows.single(values, len(texts)), rows.batch(name, texts, "left", 1)
    plain = injection.score(bb, batch, prompt, INPUT)
    for path in (None, *rows.paths(name, INPUT)):
        found = injection.score(bb, slotted(batch, [(0, 0)] * len(texts)), prompt, INPUT, path=path)
        assert found.path.startswith(path or plain.path)
        for i in range(len(texts)):
            torch.testing.assert_close(rows.of_row(found, i), rows.of_row(plain, i), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bloom", "t5", "bart"])
def test_generation_goes_on_from_segments(name: str) -> None:
    """Greedy decoding behind words in segments is the stock model's behind the same ids, a row at a time."""
    bb, texts, words = tiny.backbone(name), rows.texts("t5"), rows.ids(7, sum(SIZES))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids, mask = rows.pad(texts, "left", 1, value=3)
    batch = slotted(Batch(ids, mask, torch.zeros(len(texts), dtype=torch.long)))
    prompt = rows.single(initialization.from_ids(bb, INPUT, words), len(texts))
    found = generation.generate(bb, batch, prompt, INPUT, **options)
    for i, (row, place) in enumerate(zip(texts, PLACES, strict=True)):
        full = torch.cat([words, row])[order(place, SIZES, len(row))][None]
        alone = bb.model.generate(full, attention_mask=torch.ones_like(full), **options)
        assert found[i, -5:].tolist() == alone[0, -5:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "gptj", "bloom"])
def test_continuations_behind_segments(name: str) -> None:
    """Candidates are scored behind the whole row: the place is the text's, whatever is tried behind it."""
    bb, texts, words = tiny.backbone(name), rows.texts(name), rows.ids(7, sum(SIZES))
    candidates = [[7], [9], [7, 9], [20, 22, 30]]
    prompt = rows.single(initialization.from_ids(bb, INPUT, words), len(texts))
    suffix = injection.Site(placement="suffix")
    for side, extra in PADDINGS:
        batch = rows.batch(name, texts, side, extra)
        for one, site, places in (
            (slotted(batch), INPUT, PLACES),
            (batch, suffix, [(len(row), len(row)) for row in texts]),
        ):
            found = injection.score_continuations(bb, one, prompt, site, candidates)
            for i, (row, place) in enumerate(zip(texts, places, strict=True)):
                for c, candidate in enumerate(candidates):
                    whole = torch.cat([torch.cat([words, row])[order(place, SIZES, len(row))], torch.tensor(candidate)])
                    logits = bb.model(input_ids=whole[None]).logits[0, -len(candidate) - 1 : -1].log_softmax(-1)
                    own = logits.double().gather(1, torch.tensor(candidate)[:, None]).sum()
                    torch.testing.assert_close(found[i, c], own, atol=2e-5, rtol=1e-5)
    empty = rows.batch(name, [rows.ids(0, 0)])
    for site in (suffix, injection.Site(placement="after_start")):  # no text: behind it and before it are the same
        found = injection.score_continuations(bb, empty, prompt.rows(torch.tensor([0])), site, candidates)
        front = injection.score_continuations(bb, empty, prompt.rows(torch.tensor([0])), INPUT, candidates)
        torch.testing.assert_close(found, front, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", ["first", "after_start"])
@pytest.mark.parametrize("name", tiny.ALL)
def test_at_the_front_and_behind_the_first_token(name: str, place: str) -> None:
    bb, texts, words = tiny.backbone(name), rows.texts(name), rows.ids(7, 4)
    prompt = rows.single(initialization.from_ids(bb, INPUT, words), len(texts))
    stands = int(place == "after_start")
    expected = [read_words(bb, words, row, (stands,), (4,)) for row in texts]
    for side, extra in PADDINGS:
        output = injection.score(bb, rows.batch(name, texts, side, extra), prompt, injection.Site(placement=place))
        for i, scores in enumerate(expected):
            torch.testing.assert_close(rows.of_row(output, i), scores, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ALL)
def test_suffix(name: str) -> None:
    """Behind the text: before the first label, before the last special token, or at the end of the encoder's input."""
    bb, texts, words = tiny.backbone(name), rows.texts(name), rows.ids(7, 4)
    site, prompt = (
        injection.Site(placement="suffix"),
        rows.single(initialization.from_ids(bb, INPUT, words), len(texts)),
    )
    known = (2, 9, 0, 6)  # text tokens before the first label
    for side, extra in PADDINGS:
        batch = rows.batch(name, texts, side, extra)
        if bb.family.scores_next_token:
            begins = (batch.attention_mask.cumsum(1) - 1 >= torch.tensor(known)[:, None]) & batch.attention_mask.bool()
            batch = replace(batch, labels=batch.labels.where(begins, -100))
        output = injection.score(bb, batch, prompt, site)
        for i, row in enumerate(texts):
            place = known[i] if bb.family.scores_next_token else len(row) - (bb.family.name == "masked")
            expected = read_words(bb, words, row, (place,), (4,))
            if bb.family.scores_next_token:  # the first label is scored by what stands before it, text or prompt
                expected = expected[len(expected) - (len(row) - place) :]
            torch.testing.assert_close(rows.of_row(output, i), expected, **CLOSE)


@torch.no_grad()
def test_types_and_positions_go_on_where_the_prompt_stands() -> None:
    """A prompt in the second text of a pair has that text's type; given positions go on behind the text before it."""
    bb, row = tiny.backbone("bert"), rows.texts("bert", (6,))[0]
    types, values = torch.tensor([0, 0, 0, 1, 1, 1]), rows.random(3, 3, 32)
    batch = replace(rows.batch("bert", [row], "left", 2), token_type_ids=torch.nn.functional.pad(types[None], (2, 0)))
    output = injection.score(bb, slotted(batch, [(2, 5)], (1, 2)), rows.single(values), INPUT)
    full = order((2, 5), (1, 2), 6)
    both = torch.cat([values, bb.embedding(row)])[full][None]
    seen = bb.model(inputs_embeds=both, token_type_ids=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])).logits[0]
    torch.testing.assert_close(output.logits, seen[[at for at, token in enumerate(full) if token >= 3]], **CLOSE)
    bb, row = tiny.backbone("llama"), rows.texts("llama", (6,))[0]
    own = torch.tensor([[0, 0, 0, 1, 2, 7, 8, 9]])
    batch = replace(rows.batch("llama", [row], "left", 2), position_ids=own)
    output = injection.score(bb, slotted(batch, [(0, 3)], (1, 2)), rows.single(values), INPUT)
    full = order((0, 3), (1, 2), 6)
    both = torch.cat([values, bb.embedding(row)])[full][None]
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 10, 11, 12]])
    seen = bb.model(inputs_embeds=both, position_ids=ids).logits[0]
    torch.testing.assert_close(output.logits, seen[scoring(bb, full, 3)], **CLOSE)


@torch.no_grad()
def test_the_prompt_is_left_out_where_there_is_none() -> None:
    """Rows with slots are the stock model's own without a prompt."""
    bb, texts = tiny.backbone("llama"), rows.texts("llama")
    batch = rows.batch("llama", texts)
    output = injection.score(bb, slotted(batch), None, injection.Site(placement="template"))
    torch.testing.assert_close(output.logits, injection.score(bb, batch, None, INPUT).logits)
    found = injection.score_continuations(bb, slotted(batch), None, INPUT, [[7], [8, 9]])
    torch.testing.assert_close(found, injection.score_continuations(bb, batch, None, INPUT, [[7], [8, 9]]))


def test_what_is_refused() -> None:
    bb, batch = tiny.backbone("llama"), rows.batch("llama", rows.texts("llama", (5, 9)))
    prompt = rows.single(rows.random(0, 5, 32), 2)
    two = torch.tensor([[2, 3], [1, 4]])
    for one, site, message in (
        (
            replace(batch, prompt_offsets=two),
            INPUT,
            "2 places are given, and nothing says how many prompt tokens each has",
        ),
        (slotted(batch, [(3, 2), (0, 0)]), INPUT, r"places \[\[3, 2\], \[0, 0\]\] must not decrease"),
        (slotted(batch, [(3, 6), (0, 0)]), INPUT, r"do not all lie within texts of \[5, 9\] tokens"),
        (
            slotted(batch, two.tolist(), (2, 2)),
            INPUT,
            r"segments of \[2, 2\] prompt tokens do not sum to the prompt's 5",
        ),
        (slotted(batch, two.tolist(), (6, -1)), INPUT, r"segments of \[6, -1\] prompt tokens do not sum"),
        (
            replace(batch, prompt_offsets=two[:, 0]),
            injection.Site(segments=SIZES),
            "2 segments of the prompt, but 1 places",
        ),
        (
            batch,
            injection.Site(placement="template"),
            "the template has slots for the prompt, and the batch does not say",
        ),
        (
            batch,
            injection.Site("kv", placement="suffix"),
            "placement 'suffix' is not possible at site 'kv', where nothing can come",
        ),
        (batch, injection.Site("kv", placement="template"), "placement 'template' is not possible at site 'kv'"),
    ):
        with pytest.raises(BackboneError, match=message):
            injection.score(bb, one, prompt, site)
    deep = rows.single(rows.random(0, 5, injection.prompt_width(bb, KV)), 2)
    with pytest.raises(BackboneError, match="a prompt at site 'kv' comes before everything, but the rows put text"):
        injection.score(bb, slotted(batch, two.tolist()), deep, KV)
    with pytest.raises(BackboneError, match="a prompt at site 'kv' comes before everything"):
        generation.generate(bb, slotted(batch, two.tolist()), deep, KV)
    with pytest.raises(BackboneError, match="placement 'suffix' is not possible at site 'decoder'"):
        injection.prompt_width(tiny.backbone("t5"), injection.Site("decoder", placement="suffix"))
    assert injection.prompt_width(bb, replace(ADD, placement="suffix")) == injection.prompt_width(bb, REPLACE)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_layout_of_segments(data: st.DataObject) -> None:
    """Every text and prompt token exactly once, in its place, in one unbroken run on either side."""
    count, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    texts = [data.draw(st.integers(0 if i else 1, width)) for i in range(count)]
    most = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.lists(st.integers(0, 3), min_size=most, max_size=most).filter(any)) for _ in range(count)]
    places = [sorted(data.draw(st.lists(st.integers(0, t), min_size=most, max_size=most))) for t in texts]
    left = data.draw(st.booleans())
    mask = torch.arange(width)[None] < torch.tensor(texts)[:, None]
    prompt = rows.several([torch.zeros(sum(size), 1) for size in sizes], range(count))
    where = injection.layout_rows(mask, torch.tensor(places), prompt, left, torch.tensor(sizes))
    slots = max(map(sum, sizes))
    for i, (text, size, place) in enumerate(zip(texts, sizes, places, strict=True)):
        spare = slots - sum(size)  # a short prompt is at the right edge of its slot
        expected = [token + spare for token in order(place, size, text)]
        begin = where.attention_mask.shape[1] - len(expected) if left else 0
        assert where.attention_mask[i].nonzero()[:, 0].tolist() == list(range(begin, begin + len(expected)))
        assert where.gather_index[i][where.attention_mask[i]].tolist() == expected
        assert where.position_ids[i][where.attention_mask[i]].tolist() == list(range(len(expected)))
        assert where.text_positions[i, :text].tolist() == [begin + expected.index(slots + t) for t in range(text)]
        assert [t for t in where.prompt_slots[i].tolist() if t >= 0] == list(range(spare, slots))
