"""Golden: a row in a mixed batch equals the row alone, whatever its neighbors, padding side and padding."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rows
import tiny
from rows import INPUT, KV, called
from softprompts import injection
from softprompts.errors import BackboneError
from softprompts.types import Batch, Prompt, mix_prompts

pytestmark = pytest.mark.golden
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
WHO = [1, 0, 2, 0]  # the distinct prompt of each row
LENGTHS = (2, 9, 5)  # a sliding window of 6 is shorter than one prompt alone and than every prompt with its text


def prompts(name: str, site: injection.Site) -> list[torch.Tensor]:
    """Three prompts of different lengths; one length where a decoder that counts positions itself wants it."""
    lengths = (4, 4, 4) if (name, site) == ("bart", KV) else LENGTHS
    width = injection.prompt_width(tiny.backbone(name), site)
    return [rows.random(i, length, width) for i, length in enumerate(lengths)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.ALL), ids=called)
def test_rows(name: str, site: injection.Site) -> None:
    bb = tiny.backbone(name)
    texts, values = rows.texts(name), prompts(name, site)
    alone = [
        injection.score(bb, rows.batch(name, [text]), rows.single(values[who]), site).logits
        for text, who in zip(texts, WHO, strict=True)
    ]
    mixed = rows.several(values, WHO)
    layouts = [("right", 0), ("right", 4), ("left", 0), ("left", 5)]
    for (side, extra), path in itertools.product(layouts, (None, *rows.paths(name, site))):
        output = injection.score(bb, rows.batch(name, texts, side, extra), mixed, site, path=path)
        for i, expected in enumerate(alone):
            torch.testing.assert_close(rows.of_row(output, i), expected, **CLOSE)
    # Some rows of a batch, and the same rows under another order.
    index = torch.tensor([3, 1])
    output = injection.score(bb, rows.batch(name, texts, "left").rows(index), mixed.rows(index), site)
    for i, row in enumerate(index):
        torch.testing.assert_close(rows.of_row(output, i), alone[row], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "site"), rows.cases(tiny.MAIN), ids=called)
def test_mixed_prompts_of_tasks(name: str, site: injection.Site) -> None:
    """`mix` lays prompts of several tasks and lengths together as the test does by hand."""
    bb = tiny.backbone(name)
    values = prompts(name, site)
    mixed = mix_prompts(
        [rows.several(values[:1], [0, 0]), rows.several(values[1:], [1, 0])],
        [torch.tensor([1, 3]), torch.tensor([2, 0])],
    )
    expected = rows.several(values, WHO)
    for field in ("values", "mask"):
        torch.testing.assert_close(
            getattr(mixed, field)[mixed.prompt_index].float(), getattr(expected, field)[WHO].float()
        )
    batch = rows.batch(name, rows.texts(name), "left")
    ours = injection.score(bb, batch, mixed, site)
    torch.testing.assert_close(ours.logits, injection.score(bb, batch, expected, site).logits, **CLOSE)


def test_mix_refuses() -> None:
    one, other = rows.single(torch.zeros(2, 8)), rows.single(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"prompts of widths \[8, 9\] cannot share a batch"):
        mix_prompts([one, other], [torch.tensor([0]), torch.tensor([1])])
    with pytest.raises(ValueError, match=r"rows \[0, 2\] must name each of the 2 batch rows exactly once"):
        mix_prompts([one, one], [torch.tensor([0]), torch.tensor([2])])


def test_bart_kv_refuses_mixed_lengths() -> None:
    bb = tiny.backbone("bart")
    width = injection.prompt_width(bb, KV)
    mixed = rows.several([rows.random(0, 2, width), rows.random(1, 5, width)], [0, 1])
    batch = rows.batch("bart", rows.texts("bart", (4, 6)))
    with pytest.raises(BackboneError, match=r"prompts of \[2, 5\] tokens cannot share a batch at site 'kv' of Bart"):
        injection.score(bb, batch, mixed, KV)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_unused_longer_neighbor(name: str) -> None:
    """A longer prompt that no row uses leaves the rows as they are."""
    bb = tiny.backbone(name)
    width = injection.prompt_width(bb, KV)
    mixed = rows.several([rows.random(0, 2, width), rows.random(1, 5, width)], [0, 0])
    text = rows.texts(name, (4, 6))
    ours = injection.score(bb, rows.batch(name, text), mixed, KV)
    alone = injection.score(bb, rows.batch(name, text), rows.single(rows.random(0, 2, width), 2), KV)
    torch.testing.assert_close(ours.logits, alone.logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bart", "bert", "roberta"])
def test_room(name: str) -> None:
    """Rows that just fit are read whatever the padding; a row too long is refused with the figures."""
    bb = tiny.backbone(name)
    room = bb.max_positions
    texts = rows.texts(name, (room - 3, 10))
    values = [rows.random(0, 3, bb.embedding_size), rows.random(1, 40, bb.embedding_size)]
    for path in rows.paths(name, INPUT):
        output = injection.score(bb, rows.batch(name, texts), rows.several(values, [0, 1]), INPUT, path=path)
        for i, text in enumerate(texts):
            alone = injection.score(bb, rows.batch(name, [text]), rows.single(values[i]), INPUT)
            torch.testing.assert_close(rows.of_row(output, i), alone.logits, atol=2e-5, rtol=1e-5)
    with pytest.raises(BackboneError, match=rf"prompt and text need {room + 1} positions, {name} takes {room}"):
        injection.score(bb, rows.batch(name, texts), rows.single(rows.random(0, 4, bb.embedding_size), 2), INPUT)


@torch.no_grad()
def test_room_of_the_decoder() -> None:
    """A prompt in the decoder takes room there, not in the encoder."""
    bb = tiny.backbone("bart")
    prompt = rows.single(rows.random(0, 3, 32))
    batch = rows.batch("bart", rows.texts("bart", (bb.max_positions,)))
    assert injection.score(bb, batch, prompt, rows.DECODER).logits is not None
    long = replace(batch, labels=rows.ids(0, bb.max_positions - 2)[None])
    with pytest.raises(BackboneError, match="prompt and text need 65 positions, bart takes 64"):
        injection.score(bb, long, prompt, rows.DECODER)


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bart", "bert"])
def test_rows_without_labels(name: str) -> None:
    """A row with nothing to score, or no text at all, leaves its neighbors' scores and gradients finite."""
    bb = tiny.backbone(name)
    texts = rows.texts(name, (4, 6))
    batch = rows.batch(name, texts)
    labels = batch.labels.clone()
    labels[0] = -100
    values = rows.random(0, 3, bb.embedding_size).requires_grad_()
    output = injection.score(bb, replace(batch, labels=labels), rows.single(values, 2), INPUT)
    expected = injection.score(bb, batch, rows.single(values, 2), INPUT)
    assert rows.of_row(output, 0).numel() == 0
    torch.testing.assert_close(rows.of_row(output, 1), rows.of_row(expected, 1), **CLOSE)
    output.logits.sum().backward()
    assert values.grad.isfinite().all()
    if name in tiny.SEQ2SEQ:
        return
    mask = batch.attention_mask.clone()
    mask[0] = 0
    values.grad = None
    output = injection.score(bb, replace(batch, attention_mask=mask, labels=labels), rows.single(values, 2), INPUT)
    torch.testing.assert_close(rows.of_row(output, 1), rows.of_row(expected, 1), **CLOSE)
    output.logits.sum().backward()
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt"])
def test_batch_without_any_text(name: str) -> None:
    """Prompts alone score the first token, on every path the same."""
    bb, found = tiny.backbone(name), []
    empty = rows.batch(name, rows.texts(name, (2, 3)))
    empty = replace(empty, attention_mask=torch.zeros_like(empty.attention_mask), labels=None)
    for path in rows.paths(name, INPUT):
        values = [rows.random(i, n, bb.embedding_size).requires_grad_() for i, n in enumerate((3, 8))]
        last = injection.score(bb, empty, rows.several(values, [1, 0]), INPUT, path=path).last_state
        found.append((last, torch.autograd.grad((last * rows.random(9, *last.shape)).sum(), values)))
    for last, gradients in found[:-1]:
        torch.testing.assert_close(last, found[-1][0], **CLOSE)
        torch.testing.assert_close(gradients, found[-1][1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.MAIN)
def test_labels_on_padding_do_not_count(name: str) -> None:
    """Whoever copies input_ids into the labels, padding included, trains on the text all the same."""
    if name in tiny.SEQ2SEQ:
        return
    bb, batch = tiny.backbone(name), rows.batch(name, rows.texts(name), "left", 2)
    values = rows.single(rows.random(0, 3, bb.embedding_size), 4)
    for path in rows.paths(name, INPUT):
        ours = injection.score(bb, replace(batch, labels=batch.input_ids), values, INPUT, path=path)
        assert ours.labels.equal(injection.score(bb, batch, values, INPUT, path=path).labels)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_layout(data: st.DataObject) -> None:
    """One unbroken run a row; every text and prompt token exactly once and in order; on either side."""
    count = data.draw(st.integers(1, 4))
    width = data.draw(st.integers(1, 6))
    texts = [data.draw(st.integers(0 if i else 1, width)) for i in range(count)]
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    used = [data.draw(st.integers(0, len(lengths) - 1)) for _ in range(count)]
    place = [data.draw(st.integers(0, text)) for text in texts]
    left = data.draw(st.booleans())
    mask = torch.arange(width)[None] < torch.tensor(texts)[:, None]
    prompt: Prompt | None = None
    if data.draw(st.booleans()):
        prompt = rows.several([torch.zeros(n, 1) for n in lengths], used)
    where = injection.layout_rows(mask, torch.tensor(place), prompt, left)
    slots = 0 if prompt is None else max(lengths)
    for i, text in enumerate(texts):
        tokens = [] if prompt is None else list(range(slots - lengths[used[i]], slots))
        order = [slots + t for t in range(text)]
        expected = order[: place[i]] + tokens + order[place[i] :]
        inside = where.attention_mask[i].nonzero()[:, 0]
        assert where.gather_index[i][where.attention_mask[i]].tolist() == expected
        begin = where.attention_mask.shape[1] - len(expected) if left else 0
        assert inside.tolist() == list(range(begin, begin + len(expected)))
        assert where.position_ids[i][where.attention_mask[i]].tolist() == list(range(len(expected)))
        assert where.text_positions[i, :text].tolist() == [begin + expected.index(slots + t) for t in range(text)]
        assert [t for t in where.prompt_slots[i].tolist() if t >= 0] == tokens
        assert where.gather_index[i].min() >= 0
        assert where.gather_index[i].max() < slots + width
        assert where.text_positions[i].max() < where.attention_mask.shape[1]


def test_assemble() -> None:
    """The assembled rows hold the very vectors, and gradients reach them."""
    values = torch.tensor([[[1.0], [2.0]], [[0.0], [3.0]]], requires_grad=True)
    prompt = Prompt(values, torch.tensor([[1, 1], [0, 1]]), torch.tensor([1, 0]))
    text = torch.tensor([[[10.0], [11.0], [12.0]], [[20.0], [0.0], [0.0]]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    where = injection.layout_rows(mask, torch.tensor([1, 0]), prompt)
    full = injection.assemble_embeddings(text, prompt, where)[..., 0]
    assert full[0].tolist() == [10, 3, 11, 12]
    assert full[1, :3].tolist() == [1, 2, 20]
    (full * where.attention_mask).sum().backward()
    assert values.grad[..., 0].tolist() == [[1, 1], [0, 1]]


def test_batch_rows_and_device() -> None:
    batch = Batch(torch.arange(6).view(3, 2), torch.ones(3, 2), torch.arange(3))
    assert batch.rows(torch.tensor([2, 0])).input_ids.tolist() == [[4, 5], [0, 1]]
    assert batch.to(torch.device("cpu")).labels is None
