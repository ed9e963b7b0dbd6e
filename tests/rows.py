"""Ragged batches for tests, and what a stock model alone says about a prompt put in front of one row by hand."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

import tiny
from softprompts import injection
from softprompts.backbone import Backbone
from softprompts.backbone.cache import DynamicCache, EncoderDecoderCache, cache_argument, output_cache
from softprompts.types import IGNORE, Batch, Output, Prompt

INPUT, DECODER, KV = injection.Site(), injection.Site("decoder"), injection.Site("kv")
REPLACE, ADD = injection.Site("layers", "replace"), injection.Site("layers", "add")
LENGTHS = (5, 9, 1, 7)
AT_LEAST_5_24 = Version(transformers.__version__) >= Version("5.24")
UNPACKED = ("bloom", "falcon", "falcon_alibi", "mpt")  # their attention is not one that can be switched
UNPACKED += () if AT_LEAST_5_24 else ("gptj",)
UNLAYERED = ("albert", "opt_projected")  # one shared layer; embeds in another width


def sites(name: str) -> tuple[injection.Site, ...]:
    """The sites that a tiny model has."""
    deep = () if name in UNLAYERED else (REPLACE, ADD)
    more = (KV,) if name in tiny.CAUSAL else (DECODER, KV) if name in tiny.SEQ2SEQ else ()
    return (INPUT, *deep, *more)


def cases(names: Sequence[str], only: Sequence[str] = ("input", "decoder", "layers", "kv")) -> list[Any]:
    """(family, site) pairs, readable in pytest's output."""
    return [(name, site) for name in names for site in sites(name) if site.name in only]


def paths(name: str, site: injection.Site) -> tuple[str, ...]:
    """The ways in which a tiny model can compute a prompt at a site."""
    if name not in tiny.CAUSAL:
        return ("concatenation",) if site != KV else ()
    packed = ("packed",) if name not in UNPACKED else ()
    return (*packed, "shared", *(("concatenation",) if site != KV else ()))


def called(value: Any) -> str | None:
    """A short test id for a site."""
    if not isinstance(value, injection.Site):
        return None
    return f"{value.name}-{value.mode}" if value.name == "layers" else value.name


def random(seed: int, *shape: int) -> Tensor:
    """Normal noise that depends on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.4


def ids(seed: int, count: int) -> Tensor:
    """Token ids that are no special tokens."""
    return torch.randint(5, tiny.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def texts(name: str, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Ragged texts, beginning with the family's start token where it has one."""
    found = [ids(seed + i, length) for i, length in enumerate(lengths)]
    first = tiny.start(name)
    return found if first is None else [torch.cat([torch.tensor([first]), row[1:]]) for row in found]


def pad(rows: Sequence[Tensor], side: str = "right", extra: int = 0, value: int = 0) -> tuple[Tensor, Tensor]:
    """One tensor and its mask, padded on `side` to the longest row and `extra` beyond."""
    size = max(map(len, rows)) + extra
    ends = [(0, size - len(row)) if side == "right" else (size - len(row), 0) for row in rows]
    fill = functools.partial(torch.nn.functional.pad)
    return (
        torch.stack([fill(row, end, value=value) for row, end in zip(rows, ends, strict=True)]),
        torch.stack([fill(torch.ones_like(row), end) for row, end in zip(rows, ends, strict=True)]),
    )


def batch(name: str, rows: Sequence[Tensor], side: str = "right", extra: int = 0) -> Batch:
    """A batch for a language model head: every text token is a label (encoder-decoder: other targets)."""
    text, mask = pad(rows, side, extra, value=3)
    labels = text.masked_fill(mask == 0, IGNORE)
    if name in tiny.SEQ2SEQ:
        labels = pad(targets(rows), "right", extra, value=IGNORE)[0]
    return Batch(text, mask, torch.zeros(len(rows), dtype=torch.long), labels)


def targets(rows: Sequence[Tensor]) -> list[Tensor]:
    """Targets of other lengths than the texts."""
    return [ids(100 + int(row.sum()), 2 + len(row) % 4) for row in rows]


def single(values: Tensor, count: int = 1) -> Prompt:
    """One prompt [P, D] for `count` rows."""
    return Prompt(values[None], torch.ones(1, len(values), dtype=torch.bool), torch.zeros(count, dtype=torch.long))


def several(prompts: Sequence[Tensor], row: Sequence[int]) -> Prompt:
    """Distinct prompts [P_i, D] of any length and which one each row uses, padded by hand on the left."""
    size = max(map(len, prompts))
    values = torch.stack([torch.cat([p.new_zeros(size - len(p), p.shape[1]), p]) for p in prompts])
    mask = torch.stack([torch.arange(size) >= size - len(p) for p in prompts])
    return Prompt(values, mask, torch.tensor(row))


def of_row(output: Output, index: int) -> Tensor:
    """The scores of one batch row, in the order of its labels."""
    assert output.logits is not None
    return output.logits[output.batch_rows == index]


def shifted(bb: Backbone, target: Tensor) -> Tensor:
    """Decoder input: the start token, then all but the last."""
    return torch.cat([torch.tensor([bb.model.config.decoder_start_token_id]), target[:-1]])


def scored(bb: Backbone, logits: Tensor, length: int, count: int, place: int, site: injection.Site) -> Tensor:
    """Of a stock model's logits for `[text[:place] | prompt | text[place:]]`, those that score text tokens."""
    shift = 1 if bb.family.scores_next_token else 0
    before = 0 if site.name == "kv" else length
    where = torch.tensor([i + (before if i >= place else 0) - shift for i in range(count)])
    return logits[where[where >= 0]]


def read_words(bb: Backbone, site: injection.Site, words: Tensor, row: Tensor, place: int = 0) -> Tensor:
    """The stock model's scores of `row`'s labels when it reads `words` as ordinary ids at the site."""
    target = targets([row])[0]
    full = torch.cat([row[:place], words, row[place:]])[None]
    if bb.family.name != "seq2seq":
        length = 0 if site.name == "kv" else len(words)
        logits = bb.model(input_ids=full).logits[0, len(words) - length :]
        return scored(bb, logits, len(words), len(row), place, site)
    into = shifted(bb, target)
    if site.name == "decoder":
        out = bb.model(input_ids=row[None], decoder_input_ids=torch.cat([words, into])[None])
        return out.logits[0, len(words) :]
    if site.name == "kv":
        first = output_cache(bb.model(input_ids=words[None], decoder_input_ids=words[None], use_cache=True))
        assert isinstance(first, EncoderDecoderCache)
        cache = EncoderDecoderCache(first.self_attention_cache, DynamicCache())
        entered = cache_argument(bb.model, cache)
        return bb.model(input_ids=row[None], decoder_input_ids=into[None], **entered).logits[0]
    return bb.model(input_ids=full, decoder_input_ids=into[None]).logits[0]


def by_hand(bb: Backbone, site: injection.Site, values: Tensor, row: Tensor, place: int = 0) -> Tensor:
    """The stock model's scores of `row`'s labels with the prompt `values [P, D]` put there by hand, for one row."""
    model, length = bb.model, len(values)
    text = model.get_input_embeddings()(row)
    target = targets([row])[0]
    more: dict[str, Tensor] = {} if bb.family.name != "seq2seq" else {"decoder_input_ids": shifted(bb, target)[None]}
    if site.name == "kv":
        own = hand_made_cache(bb, values)
        if bb.family.name == "seq2seq":
            cache = EncoderDecoderCache(own, DynamicCache())
            return model(input_ids=row[None], **cache_argument(model, cache), **more).logits[0]
        logits = model(input_ids=row[None], **cache_argument(model, own)).logits[0]
        return scored(bb, logits, length, len(row), place, site)
    if site.name == "decoder":
        into = bb.decoder.embed_tokens(shifted(bb, target))
        out = model(input_ids=row[None], decoder_inputs_embeds=torch.cat([values, into])[None])
        return out.logits[0, length:]
    parts = values.chunk(len(bb.layers) if site.name == "layers" else 1, -1)
    full = torch.cat([text[:place], parts[0], text[place:]])[None]
    handles = []
    for layer, part in list(zip(bb.layers, parts, strict=True))[1:] if site.name == "layers" else []:

        def enter(_: Any, args: Any, kwargs: Any, part: Tensor = part) -> Any:
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            new = states[:, place : place + length] + part if site.mode == "add" else part
            states = torch.cat([states[:, :place], new.expand(len(states), -1, -1), states[:, place + length :]], 1)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        logits = model(inputs_embeds=full, **more).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits if more else scored(bb, logits, length, len(row), place, site)


def hand_made_cache(bb: Backbone, values: Tensor) -> DynamicCache:
    """A cache that holds a kv prompt `[P, D]`: per layer all keys of a token head by head, then its values."""
    cache = bb.new_cache()
    at = 0
    for layer, (heads, size) in enumerate(bb.kv_shapes):
        both = values[:, at : at + 2 * heads * size].reshape(len(values), 2, heads, size)
        cache.update(both[:, 0].transpose(0, 1)[None], both[:, 1].transpose(0, 1)[None], layer)
        at += 2 * heads * size
    return cache
