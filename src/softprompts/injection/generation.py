"""Decoding with a prompt, on top of transformers' own generate: the model is called as it is, nothing is patched.

Causal models get the text's `input_ids` (what comes back and what processors see) together with either the packed
embeddings `[pad|prompt|text]`, or, at site kv, a cache of everything but the last token. Encoder-decoder models get the
states of their encoder, and a decoder cache that begins with the prompt where it belongs to the decoder.
"""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from softprompts import injection
from softprompts.backbone import MASKED, SEQ2SEQ, Backbone
from softprompts.errors import BackboneError
from softprompts.injection import Site
from softprompts.injection.encoder_decoder import check_room, start_id
from softprompts.types import Batch, Prompt

DEFAULT_NEW_TOKENS = 20
"""How much is generated where nobody says so, as in transformers."""

# They would reach the model past the prompt, or cut the first step into pieces that the prompt is not laid out for.
REFUSED = ("assistant_model", "custom_generate", "encoder_outputs", "past_key_values", "position_ids", "token_type_ids")
REFUSED_SETTINGS = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit")


def generate(backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site, **options: Any) -> Any:
    """Continue the rows of `batch` with `prompt` at `site`; `options` are those of transformers' generate.

    Comes back what the stock model gives: batch.ids [B, T] as they are and then new tokens (encoder-decoder models:
    decoder ids), or a ModelOutput with `return_dict_in_generate`. Lengths count text, never the prompt, and processors
    such as repetition_penalty see text only. Rows may be padded on either side; a row's continuation never depends on
    its neighbors. Without a prompt (None) it is the stock model's generate and nothing else.
    batch.embeds [B, T, H] takes the place of ids, which are then [B, 0]: only new tokens come back.
    Raises BackboneError for models that do not generate, for options that would bypass the prompt, when prompt and text
    do not fit the model's positions, and when there is neither.
    """
    if backbone.head != "lm" or backbone.family is MASKED:
        raise BackboneError(
            f"{type(backbone.model).__name__} does not generate text; rank label words (kind label), or train a "
            f"classification head (model.head: sequence, token or span)"
        )
    if prompt is None:
        if backbone.family is not SEQ2SEQ and batch.inputs_embeds is None and not bool(batch.attention_mask.any()):
            raise BackboneError("without a prompt a text of no tokens cannot be continued; give the template words")
        return _call(backbone, _stock(batch, backbone), options)
    injection.check_site(backbone, site)
    settings = _Settings(backbone, options)
    settings.refuse(site)
    empty = batch.attention_mask.sum(1) == 0
    if bool(empty.any()) and site.name != "input":
        raise BackboneError(f"a row without text cannot be continued at site '{site.name}'; use site 'input'")
    if backbone.family is not SEQ2SEQ and bool((empty & (prompt.lengths[prompt.prompt_index] == 0)).any()):
        raise BackboneError("a row has neither text nor, as its prompt is made from the text, a prompt; give it words")
    batch = injection.place_prompts(backbone, batch, site, prompt)
    with torch.no_grad():
        if backbone.family is SEQ2SEQ:
            return _encoder_decoder(backbone, batch, prompt, site, settings)
        return _causal(backbone, batch, prompt, site, settings)


class _Settings:
    """The options of one call, with a copy of its generation_config; what is not given is the model's own."""

    def __init__(self, backbone: Backbone, options: Mapping[str, Any]) -> None:
        self.backbone = backbone
        self.options = dict(options)
        self.config = copy.deepcopy(self.options.get("generation_config"))
        if self.config is not None:
            self.options["generation_config"] = self.config

    def get(self, name: str) -> Any:
        """What transformers would use for `name`: the keyword, the given configuration's, the model's."""
        for value in (self.options.get(name), getattr(self.config, name, None)):
            if value is not None:
                return value
        return getattr(self.backbone.model.generation_config, name, None)

    def set(self, name: str, value: Any) -> None:
        """Put `value` where the call will find it, or take the name away with None."""
        self.options.pop(name, None)
        if self.config is not None:
            setattr(self.config, name, value)
        elif value is not None:
            self.options[name] = value

    @property
    def copies(self) -> int:
        """How many sequences transformers runs for each row."""
        return max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1)

    def refuse(self, site: Site) -> None:
        """Raise BackboneError for options that would bypass the prompt."""
        bad = [name for name in REFUSED if self.options.get(name) is not None]
        bad += [name for name in REFUSED_SETTINGS if self.get(name)]
        if bad:
            raise BackboneError(f"{', '.join(bad)} cannot be combined with a prompt; leave it out")
        kind = self.get("cache_implementation")
        if site.name in ("kv", "decoder") and kind not in (None, "dynamic", "static"):
            raise BackboneError(
                f"cache_implementation '{kind}' cannot hold a prompt at site '{site.name}'; possible: dynamic, static"
            )

    def count_text(self, text: int, room: int | None) -> int:
        """Say lengths in new tokens, of `text` given ones and `room` positions left; returns how many at most."""
        if self.get("max_new_tokens") is None:
            limit = self.get("max_length")
            new = min(DEFAULT_NEW_TOKENS, room or DEFAULT_NEW_TOKENS) if limit is None else limit - text
            if new <= 0:
                raise BackboneError(
                    f"max_length {limit} leaves no room behind a text of {text} tokens; raise it or set max_new_tokens"
                )
            self.set("max_length", None)
            self.set("max_new_tokens", new)
        least = self.get("min_length") or 0
        if self.get("min_new_tokens") is None and least > 0:
            self.set("min_length", None)
            self.set("min_new_tokens", max(least - text, 0))
        # Behind the last position there is nothing: learned positions crash there, rotary ones write nonsense.
        if room is not None and room < int(self.get("max_new_tokens")):
            if room <= 0:
                raise BackboneError("prompt and text fill all positions of the model; shorten the text to generate")
            self.set("max_new_tokens", room)
        return int(self.get("max_new_tokens"))

    def static_length(self, filled: int, new: int) -> int | None:
        """Positions of a static cache that holds `filled` already, None for one that grows; it will be handed over."""
        kind = self.get("cache_implementation")
        self.set("cache_implementation", None)
        if (own := self.get("cache_implementation")) is not None:
            raise BackboneError(
                f"the model's own generation_config asks for cache_implementation '{own}', and transformers then takes "
                f"no cache that holds a prompt; set it to None there and hand it to generate instead"
            )
        return max(filled + new, self.get("max_cache_len") or 0) if kind == "static" else None


def _call(backbone: Backbone, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    model: Any = backbone.model
    return model.generate(**arguments, **options)


def _stock(batch: Batch, backbone: Backbone) -> dict[str, Tensor]:
    """The arguments of the stock model's generate."""
    found = {"input_ids": batch.input_ids} if batch.inputs_embeds is None else {"inputs_embeds": batch.inputs_embeds}
    found["attention_mask"] = batch.attention_mask.long()
    if backbone.family is SEQ2SEQ and batch.decoder_input_ids is not None:
        found["decoder_input_ids"] = batch.decoder_input_ids
        if batch.decoder_attention_mask is not None:
            found["decoder_attention_mask"] = batch.decoder_attention_mask.long()
    return found


def _pack(backbone: Backbone, batch: Batch, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The mask [B, T] and embeddings [B, T, features] of the texts, moved to the left edge, as the prompt has them."""
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    text = backbone.embed(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds
    mask = batch.attention_mask.gather(1, order).bool()
    return mask, injection.add_delta(text.gather(1, order[..., None].expand_as(text)), mask, prompt)


def _causal(backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, settings: _Settings) -> Any:
    mask, text = _pack(backbone, batch, prompt)
    check_room(backbone, mask, prompt)
    longest = int((mask.sum(1) + prompt.lengths[prompt.prompt_index]).max())
    room = None if backbone.max_positions is None else backbone.max_positions - longest
    new = settings.count_text(mask.shape[1], room)
    if site.name == "kv":
        arguments = _cached(backbone, mask, text, prompt, settings, new)
        return _call(backbone, {"input_ids": batch.input_ids, **arguments}, settings.options)
    assert batch.prompt_offsets is not None
    where = injection.layout_rows(mask, batch.prompt_offsets, prompt, left=True, segments=batch.segment_lengths)
    first: Tensor | None = None
    deep: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if site.name == "layers":
        first = injection.split_by_layer(prompt.values, backbone)[0]
        deep = injection.inject_at_layers(backbone, prompt, where.prompt_slots, site.mode)
    embeds = injection.assemble_embeddings(text, prompt, where, first)
    with deep:
        arguments = {
            "input_ids": batch.input_ids,
            "inputs_embeds": embeds,
            "attention_mask": where.attention_mask.long(),
        }
        return _call(backbone, arguments, settings.options)


def _cached(
    backbone: Backbone, mask: Tensor, text: Tensor, prompt: Prompt, settings: _Settings, new: int
) -> dict[str, Any]:
    """Arguments of generate with everything but each row's last token in a cache, laid out `[pad|prompt|text]`.

    The rows are read as `[prompt|text|pad]` and then moved to the right edge, so that nothing stands between prompt and
    text and all rows decode together. Only the last of `inputs_embeds` is read, as the cache holds the others.
    """
    long = DynamicCache()  # keeps everything: windows are cut off after the rows have moved
    injection.fill_cache(long, backbone, prompt)
    long.batch_select_indices(prompt.prompt_index)
    lengths, texts = prompt.lengths[prompt.prompt_index], mask.sum(1)
    ids = torch.arange(mask.shape[1], device=mask.device) + lengths[:, None]
    positions = {"position_ids": ids.where(mask, 0)} if "position_ids" in backbone.trunk_arguments else {}
    backbone.trunk(
        inputs_embeds=text,
        attention_mask=torch.cat([prompt.mask[prompt.prompt_index].bool(), mask], 1).long(),
        past_key_values=long,
        use_cache=True,
        **positions,
    )
    size = int((lengths + texts).max())
    step = torch.arange(size, device=mask.device)
    source = (prompt.values.shape[1] + texts - size)[:, None] + step[:-1]
    limit = settings.static_length(size, new)
    cache = backbone.new_cache() if limit is None else StaticCache(config=backbone.config, max_cache_len=limit)
    for index, layer in enumerate(long.layers):
        _append(cache, index, layer, source.clamp(min=0), settings.copies)
    last = text.gather(1, (texts - 1)[:, None, None].expand(-1, -1, text.shape[2]))
    return {
        "inputs_embeds": torch.nn.functional.pad(last, (0, 0, size - 1, 0)),
        "attention_mask": (step >= size - (lengths + texts)[:, None]).long(),
        "past_key_values": cache,
    }


def _append(cache: Cache, index: int, layer: Any, source: Tensor | None, copies: int) -> None:
    """Append the keys and values of `layer`, at positions `source [B, S]`, to an empty layer of `cache`."""
    pair = []
    for x in (layer.keys, layer.values):
        moved = x if source is None else x.gather(2, source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        pair.append(moved.repeat_interleave(copies, 0))
    cache.update(*pair, index)


def _encoder_decoder(backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, settings: _Settings) -> Any:
    in_decoder = site.name in ("decoder", "kv")
    lengths = prompt.lengths[prompt.prompt_index]
    if in_decoder and backbone.max_positions is not None and bool((lengths != lengths[0]).any()):
        return _by_length(backbone, batch, prompt, site, settings)
    plain = replace(batch, labels=None, decoder_input_ids=None, decoder_attention_mask=None)
    # The encoder does not see a prompt of the decoder's, but it may read another text with it.
    encoded = injection.run_trunk(
        backbone, plain, None if in_decoder and prompt.embedding_delta is None else prompt, site
    ).encoded
    assert encoded is not None
    arguments: dict[str, Any] = _stock(batch, backbone)
    arguments.pop("inputs_embeds", None)
    arguments["attention_mask"] = encoded[1].long()
    if in_decoder:
        arguments |= _decoder_arguments(backbone, batch, prompt, site, encoded, settings)
    return _call(backbone, {"encoder_outputs": encoded[0], **arguments}, settings.options)


def _decoder_arguments(
    backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, encoded: tuple[Any, Tensor], settings: _Settings
) -> dict[str, Any]:
    """Arguments of generate that let the decoder begin behind the prompt."""
    # The longest slot may belong to a row of another group; the decoder counts positions from the cache's beginning.
    spare = prompt.values.shape[1] - int(prompt.lengths[prompt.prompt_index].max())
    prompt = replace(prompt, values=prompt.values[:, spare:], mask=prompt.mask[:, spare:])
    before = prompt.mask[prompt.prompt_index].long()
    ids = batch.decoder_input_ids
    if (
        ids is not None
        and batch.decoder_attention_mask is not None
        and not bool(batch.decoder_attention_mask.bool().all())
    ):
        raise BackboneError(
            f"decoder inputs of unequal lengths would leave padding behind a prompt at site '{site.name}'; "
            f"generate them apart"
        )
    start = settings.get("decoder_start_token_id")
    start = start_id(backbone) if start is None else start
    first = torch.as_tensor(start, device=before.device).reshape(-1, 1).expand(len(before), 1)
    if ids is None:
        ids = first
    elif bool((ids[:, 0] != first[:, 0]).all()):
        ids = torch.cat([first, ids], 1)
    cache = _decoder_cache(backbone, prompt, site, encoded)
    new = settings.get("max_new_tokens")
    new = (settings.get("max_length") or DEFAULT_NEW_TOKENS + ids.shape[1]) if new is None else new + ids.shape[1]
    limit = settings.static_length(before.shape[1], new)
    if limit is not None:
        cache = _static(backbone, cache, limit, encoded[1].shape[1], settings.copies)
    else:
        cache.batch_repeat_interleave(settings.copies)
    return {
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.cat([before, torch.ones_like(ids)], 1),
        "past_key_values": cache,
    }


def _decoder_cache(backbone: Backbone, prompt: Prompt, site: Site, encoded: tuple[Any, Tensor]) -> EncoderDecoderCache:
    """A cache with what the decoder keeps of the prompts of all rows."""
    own = backbone.new_cache()
    if site.name == "kv":
        injection.fill_cache(own, backbone, prompt)
        own.batch_select_indices(prompt.prompt_index)
        return EncoderDecoderCache(own, backbone.new_cache())
    cache = EncoderDecoderCache(own, backbone.new_cache())
    backbone.decoder(
        inputs_embeds=prompt.values.to(backbone.dtype)[prompt.prompt_index],
        attention_mask=prompt.mask[prompt.prompt_index].long(),
        encoder_hidden_states=encoded[0].last_hidden_state,
        encoder_attention_mask=encoded[1].long(),
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def _static(backbone: Backbone, cache: EncoderDecoderCache, limit: int, encoded: int, copies: int) -> Any:
    """The same cache with room for `limit` decoder positions, of fixed size."""
    pair = []
    for part, size in ((cache.self_attention_cache, limit), (cache.cross_attention_cache, encoded)):
        fixed = StaticCache(config=backbone.config, max_cache_len=size)
        for index, layer in enumerate(part.layers):
            if part.get_seq_length(index) > 0:
                _append(fixed, index, layer, None, copies)
        pair.append(fixed)
    return EncoderDecoderCache(*pair)


def _by_length(backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, settings: _Settings) -> Tensor:
    """Rows grouped by prompt length, for decoders that count positions from the cache's beginning."""
    if settings.get("return_dict_in_generate"):
        raise BackboneError(
            f"prompts of {sorted(set(prompt.lengths[prompt.prompt_index].tolist()))} tokens are generated in groups "
            f"for {type(backbone.model).__name__}, whose decoder counts positions itself; batch them by length to use "
            f"return_dict_in_generate"
        )
    lengths, found = prompt.lengths[prompt.prompt_index], {}
    each = settings.get("num_return_sequences") or 1
    for length in lengths.unique().tolist():
        index = (lengths == length).nonzero()[:, 0]
        part = generate(backbone, batch.rows(index), prompt.rows(index), site, **settings.options)
        for row, sequences in zip(index.tolist(), part.split(each), strict=True):
            found[row] = sequences
    size = max(part.shape[1] for part in found.values())
    padding = settings.get("pad_token_id")
    padding = backbone.model.config.pad_token_id if padding is None else padding
    rows = [found[row] for row in sorted(found)]
    return torch.cat([torch.nn.functional.pad(x, (0, size - x.shape[1]), value=padding or 0) for x in rows])
