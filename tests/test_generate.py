"""Decoding with a prompt equals the stock model continuing the words, and a row equals the row alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import rows
import tiny
from rows import ADD, DECODER, INPUT, KV, REPLACE, called
from softprompts import injection
from softprompts.backbone import Backbone
from softprompts.errors import BackboneError
from softprompts.injection.generation import generate
from softprompts.model import initialization
from softprompts.types import Batch, Prompt

FILL = 3
NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
MAIN = ("gpt2", "llama", "mistral", "gemma3", "bloom")
CASES = rows.cases(tiny.GENERATING)
MAIN_CASES = rows.cases((*MAIN, *tiny.SEQ2SEQ))


def batch(name: str, texts: list[Tensor], side: str = "left", extra: int = 0) -> Batch:
    ids, mask = rows.pad(texts, side, extra, value=FILL)
    return Batch(ids, mask, torch.zeros(len(texts), dtype=torch.long))


def new(bb: Backbone, sequences: Tensor, width: int) -> Tensor:
    """What was generated: behind the given ids, or, in encoder-decoder models, behind the start token."""
    return sequences[:, 1:] if bb.family.name == "seq2seq" else sequences[:, width:]


def stock_words(bb: Backbone, site: injection.Site, words: Tensor, text: Tensor, **options: Any) -> Tensor:
    """New tokens of the stock model that reads `words` and `text` as ids at the site, one row, no padding."""
    model: Any = bb.model
    if bb.family.name != "seq2seq":
        full = torch.cat([words, text])[None]
        return model.generate(full, attention_mask=torch.ones_like(full), **options)[:, full.shape[1] :]
    if site.name == "decoder":
        start = torch.tensor([bb.model.config.decoder_start_token_id])
        # The stock model puts its start token in front of ids that do not begin with it.
        before = torch.cat([words, start])[None]
        found = model.generate(text[None], decoder_input_ids=before, **options)
        return found[:, found.shape[1] - options["max_new_tokens"] :]
    full = torch.cat([words, text])[None]
    return model.generate(full, **options)[:, 1:]


def step_by_step(bb: Backbone, prompt: Prompt, site: injection.Site, text: Tensor, count: int) -> list[int]:
    """Greedy decoding of one row by `inject.forward` over everything so far, without any cache of its own."""
    found: list[int] = []
    for _ in range(count):
        target = torch.tensor([[*found, 1]])
        if bb.family.name == "seq2seq":
            whole = Batch(text[None], torch.ones_like(text[None]), torch.zeros(1, dtype=torch.long), target)
        else:
            ids = torch.cat([text[None], target], 1)
            whole = Batch(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long), ids)
        with torch.no_grad():
            logits = injection.score(bb, whole, prompt, site).logits
        assert logits is not None
        found.append(int(logits[-1].argmax()))
    return found


@pytest.mark.golden
@pytest.mark.parametrize(("name", "site"), CASES, ids=called)
def test_words_continue_as_the_stock_model_continues_them(name: str, site: injection.Site) -> None:
    bb = tiny.backbone(name)
    if bb.family.name == "seq2seq" and site in (REPLACE, KV):
        pytest.skip("what an encoder makes of words depends on the text; see the test by steps")
    words = rows.ids(50, 4)
    if site.name == "decoder":  # so that the stock model adds no start token of its own
        words = torch.cat([torch.tensor([bb.model.config.decoder_start_token_id]), words])
    texts = rows.texts(name, (5, 9, 1, 7)) if bb.family.name == "causal" else rows.texts("t5", (5, 9, 1, 7))
    prompt = rows.single(initialization.from_ids(bb, site, words), len(texts))
    expected = torch.cat([stock_words(bb, site, words, text, **NEW) for text in texts])
    for side, extra in (("left", 0), ("right", 2)):
        given = batch(name, texts, side, extra)
        found = generate(bb, given, prompt, site, **NEW)
        if bb.family.name == "causal":
            assert torch.equal(found[:, : given.input_ids.shape[1]], given.input_ids)
        assert torch.equal(new(bb, found, given.input_ids.shape[1]), expected), side


@pytest.mark.golden
@pytest.mark.parametrize(("name", "site"), CASES, ids=called)
def test_rows_with_prompts_of_their_own_equal_the_row_alone(name: str, site: injection.Site) -> None:
    bb = tiny.backbone(name)
    width = injection.prompt_width(bb, site)
    prompts = [rows.random(i, length, width) for i, length in enumerate((3, 6, 1))]
    texts, row = rows.texts("t5", (4, 8, 2, 5)), [1, 0, 2, 0]
    given = batch(name, texts, "right", 1)
    found = new(bb, generate(bb, given, rows.several(prompts, row), site, **NEW), given.input_ids.shape[1])
    for i, text in enumerate(texts):
        alone = rows.single(prompts[row[i]])
        single = generate(bb, batch(name, [text]), alone, site, **NEW)
        assert torch.equal(found[i : i + 1], new(bb, single, len(text)))
        if i < 2:
            assert found[i].tolist() == step_by_step(bb, alone, site, text, NEW["max_new_tokens"])


@pytest.mark.golden
@pytest.mark.parametrize(("name", "site"), MAIN_CASES, ids=called)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_peers_caches_beams_and_static_caches_equal_the_row_alone(
    name: str, site: injection.Site, options: dict[str, Any]
) -> None:
    bb = tiny.backbone(name)
    prompt = rows.single(rows.random(4, 3, injection.prompt_width(bb, site)), 3)
    texts, settings = rows.texts("t5", (5, 8, 2)), {**NEW, **options}
    found = generate(bb, batch(name, texts), prompt, site, **settings)
    each = options.get("num_return_sequences", 1)
    plain = {**settings, "cache_implementation": None}
    for i, text in enumerate(texts):
        alone = generate(bb, batch(name, [text]), prompt.rows(torch.tensor([i])), site, **plain)
        assert torch.equal(new(bb, found, 8)[i * each : (i + 1) * each], new(bb, alone, len(text)))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "t5", "bart"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.8, "top_k": 12},
        {"do_sample": True, "num_return_sequences": 4},
        {"cache_implementation": "static"},
        {"min_new_tokens": 3, "eos_token_id": list(range(4, 60))},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_way_of_decoding_equals_the_stock_model_on_words(name: str, options: dict[str, Any]) -> None:
    bb, words, text = tiny.backbone(name), rows.ids(51, 4), rows.ids(52, 6)
    sites = (INPUT, REPLACE, KV) if name in tiny.CAUSAL else (INPUT,)
    for site in sites:
        prompt = rows.single(initialization.from_ids(bb, site, words))
        torch.manual_seed(7)
        expected = stock_words(bb, site, words, text, **{**NEW, **options})
        torch.manual_seed(7)
        found = generate(bb, batch(name, [text]), prompt, site, **{**NEW, **options})
        assert torch.equal(new(bb, found, len(text)), expected)


@pytest.mark.parametrize("site", [INPUT, REPLACE, KV], ids=called)
def test_sampling_a_batch_uses_the_seed_as_the_stock_model_does(site: injection.Site) -> None:
    bb, words = tiny.backbone("llama"), rows.ids(53, 4)
    texts = [rows.ids(60 + i, length) for i, length in enumerate((3, 7, 5))]
    ids, mask = rows.pad([torch.cat([words, text]) for text in texts], "left", value=FILL)
    model: Any = bb.model
    torch.manual_seed(3)
    expected = model.generate(ids, attention_mask=mask, **{**NEW, "do_sample": True})[:, ids.shape[1] :]
    prompt = rows.single(initialization.from_ids(bb, site, words), 3)
    torch.manual_seed(3)
    found = generate(bb, batch("llama", texts, "right"), prompt, site, **{**NEW, "do_sample": True})
    assert torch.equal(found[:, 7:], expected)


@pytest.mark.parametrize("site", [INPUT, KV], ids=called)
def test_scores_come_in_the_stock_output(site: injection.Site) -> None:
    bb, words, text = tiny.backbone("llama"), rows.ids(51, 4), rows.ids(52, 6)
    options = {**NEW, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    model: Any = bb.model
    full = torch.cat([words, text])[None]
    expected = model.generate(full, attention_mask=torch.ones_like(full), **options)
    found = generate(bb, batch("llama", [text]), rows.single(initialization.from_ids(bb, site, words)), site, **options)
    assert type(found) is type(expected)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.sequences[:, 6:], expected.sequences[:, 10:])


@pytest.mark.parametrize("site", [INPUT, KV], ids=called)
def test_processors_see_the_text_and_only_the_text(site: injection.Site) -> None:
    bb, words, text = tiny.backbone("gpt2"), rows.ids(51, 4), rows.ids(52, 6)
    prompt = rows.single(initialization.from_ids(bb, site, words))
    found = generate(bb, batch("gpt2", [text]), prompt, site, **NEW, repetition_penalty=1.9)
    penalty = RepetitionPenaltyLogitsProcessor(1.9)
    ids = text[None]
    for _ in range(NEW["max_new_tokens"]):
        with torch.no_grad():
            scores = bb.model(torch.cat([words[None], ids], 1)).logits[:, -1]
        ids = torch.cat([ids, penalty(ids, scores).argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("site", [INPUT, REPLACE, KV], ids=called)
@pytest.mark.parametrize("given", ["keywords", "configuration", "model"])
def test_lengths_count_the_text_and_not_the_prompt(site: injection.Site, given: str) -> None:
    bb = tiny.backbone("llama")
    model: Any = bb.model
    prompt = rows.single(rows.random(1, 5, injection.prompt_width(bb, site)))
    one = batch("llama", [rows.ids(3, 6)])
    ends = [i for i in range(96) if i != 5]  # every other token ends a text, where the least length allows it
    lengths = {"max_length": 12, "min_length": 9, "eos_token_id": ends, "pad_token_id": 0, "do_sample": False}
    own = copy.deepcopy(model.generation_config)
    try:
        if given == "configuration":
            config = GenerationConfig(**lengths)
            before = config.to_dict()
            found = generate(bb, one, prompt, site, generation_config=config)
            assert config.to_dict() == before
        elif given == "model":
            model.generation_config = GenerationConfig(**lengths)
            found = generate(bb, one, prompt, site)
            assert model.generation_config.to_dict() == GenerationConfig(**lengths).to_dict()
        else:
            found = generate(bb, one, prompt, site, **lengths)
        assert found.shape[1] == 10
        assert found[0, 6:9].tolist() == [5, 5, 5]
        assert generate(bb, one, prompt, site, **{**lengths, "eos_token_id": None, "min_length": 0}).shape[1] == 12
    finally:
        model.generation_config = own
    assert generate(bb, one, prompt, site, **{**NEW, "max_new_tokens": None}).shape[1] == 26


def test_the_default_length_stops_where_positions_end() -> None:
    bb = tiny.backbone("gpt2")
    one = batch("gpt2", [rows.ids(3, 50)])
    prompt = rows.single(rows.random(1, 6, 32))
    assert generate(bb, one, prompt, INPUT, **{**NEW, "max_new_tokens": None}).shape[1] == 58
    with pytest.raises(BackboneError, match="max_length 40 leaves no room behind a text of 50 tokens"):
        generate(bb, one, prompt, INPUT, max_length=40)
    with pytest.raises(BackboneError, match="need 70 positions"):
        generate(bb, one, rows.single(rows.random(1, 20, 32)), INPUT, **NEW)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_without_a_prompt_it_is_the_stock_model(name: str) -> None:
    bb = tiny.backbone(name)
    model: Any = bb.model
    given = batch(name, [rows.ids(1, 4), rows.ids(2, 6)])
    expected = model.generate(given.input_ids, attention_mask=given.attention_mask, **NEW)
    assert torch.equal(generate(bb, given, None, INPUT, **NEW), expected)


@pytest.mark.parametrize("site", [INPUT, REPLACE, KV], ids=called)
def test_embeddings_take_the_place_of_ids(site: injection.Site) -> None:
    bb = tiny.backbone("llama")
    prompt = rows.single(rows.random(1, 5, injection.prompt_width(bb, site)), 2)
    given = batch("llama", [rows.ids(1, 4), rows.ids(2, 6)])
    expected = generate(bb, given, prompt, site, **NEW)[:, 6:]
    bare = Batch(given.input_ids[:, :0], given.attention_mask, given.task_ids, inputs_embeds=bb.embed(given.input_ids))
    assert torch.equal(generate(bb, bare, prompt, site, **NEW), expected)


def test_a_decoder_goes_on_from_given_ids() -> None:
    for name in tiny.SEQ2SEQ:
        bb = tiny.backbone(name)
        start, ids = bb.model.config.decoder_start_token_id, rows.ids(8, 3)
        for site in rows.sites(name):
            prompt = rows.single(rows.random(1, 4, injection.prompt_width(bb, site)))
            given = batch(name, [rows.ids(1, 4)])
            found = generate(bb, given, prompt, site, **NEW)
            again = Batch(given.input_ids, given.attention_mask, given.task_ids, decoder_input_ids=found[:, :4])
            assert torch.equal(generate(bb, again, prompt, site, **{**NEW, "max_new_tokens": 3}), found)
            bare = Batch(given.input_ids, given.attention_mask, given.task_ids, decoder_input_ids=ids[None])
            assert generate(bb, bare, prompt, site, **NEW)[0, :4].tolist() == [start, *ids.tolist()]


def test_prompts_of_unequal_length_in_a_decoder_that_counts_itself() -> None:
    bb = tiny.backbone("bart")
    prompt = rows.several([rows.random(1, 2, 32), rows.random(2, 5, 32)], [0, 1, 0])
    given = batch("bart", rows.texts("bart", (4, 6, 5)))
    found = generate(bb, given, prompt, DECODER, **NEW, num_beams=2, num_return_sequences=2)
    for i in range(3):
        index = torch.tensor([i])
        alone = generate(bb, given.rows(index), prompt.rows(index), DECODER, **NEW, num_beams=2, num_return_sequences=2)
        assert torch.equal(found[2 * i : 2 * i + 2], alone)
    with pytest.raises(BackboneError, match="batch them by length"):
        generate(bb, given, prompt, DECODER, **NEW, return_dict_in_generate=True)


def test_what_would_bypass_the_prompt_is_refused() -> None:
    bb = tiny.backbone("llama")
    one, prompt = batch("llama", [rows.ids(1, 4)]), rows.single(rows.random(1, 3, 32))
    for options in ({"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2}, {"position_ids": one.input_ids}):
        with pytest.raises(BackboneError, match=f"{next(iter(options))} cannot be combined with a prompt"):
            generate(bb, one, prompt, INPUT, **options)
    deep = rows.single(rows.random(1, 3, injection.prompt_width(bb, KV)))
    with pytest.raises(BackboneError, match="possible: dynamic, static"):
        generate(bb, one, deep, KV, cache_implementation="offloaded")
    with pytest.raises(BackboneError, match="does not generate text"):
        generate(tiny.backbone("bert"), one, prompt, INPUT)
    with pytest.raises(BackboneError, match="does not generate text"):
        generate(tiny.backbone("llama", "sequence"), one, prompt, INPUT)


@pytest.mark.parametrize("site", [INPUT, ADD, KV], ids=called)
def test_the_model_is_left_as_it_was(site: injection.Site) -> None:
    bb = tiny.backbone("llama")
    model: Any = bb.model
    modules, config = list(model.modules()), model.config.to_dict()
    own, attributes = model.generation_config.to_dict(), set(vars(model))
    prompt = rows.single(rows.random(1, 3, injection.prompt_width(bb, site)))
    generate(bb, batch("llama", [rows.ids(1, 4)]), prompt, site, **NEW)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert (model.config.to_dict(), model.generation_config.to_dict(), set(vars(model))) == (config, own, attributes)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_continues_from_nothing() -> None:
    """No prompt and no token; with a prompt at the input there is something to read."""
    bb = tiny.backbone("llama")
    batch = Batch(
        torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    )
    with pytest.raises(BackboneError, match="a text of no tokens cannot be continued without a prompt; give the templ"):
        generate(bb, batch, None, INPUT, max_new_tokens=2)
    prompt = rows.single(rows.random(1, 3, bb.embedding_size))
    assert generate(bb, batch, prompt, INPUT, max_new_tokens=2, do_sample=False).shape[0] == 1
