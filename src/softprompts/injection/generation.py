"""Decoding with a prompt, on top of transformers' own generate: the model is called as it is, nothing is patched.

Causal models get the text's `input_ids` (which come back, and which processors see) together with either embeddings of
full rows `[pad|prompt|text]`, or, at site kv, a cache of everything but the last token. Encoder-decoder models get the
states of their encoder, and a decoder cache that begins with the prompt where it belongs to the decoder.
"""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softprompts.backbone import MASKED, SEQ2SEQ, Backbone
from softprompts.backbone.cache import (
    CACHE_OPTIONS,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    cache_argument,
    generate_argument,
)
from softprompts.errors import BackboneError
from softprompts.injection.encoder_decoder import start_id
from softprompts.injection.forward import TrunkOutput, run_trunk
from softprompts.injection.layout import align_texts, assemble_embeddings, check_room, layout_rows, trim_padding
from softprompts.injection.placement import place_prompts
from softprompts.injection.sites import Site, check_site, fill_cache, inject_at_layers, split_by_layer
from softprompts.types import Batch, Prompt

DEFAULT_NEW_TOKENS = 20
"""How many tokens are generated where nobody sets a length, as in transformers."""

# They would reach the model past the prompt, or cut the first step into pieces that the prompt is not laid out for.
REFUSED_OPTIONS = (
    "assistant_model",
    "custom_generate",
    "encoder_outputs",
    "position_ids",
    "token_type_ids",
    *CACHE_OPTIONS,
)
REFUSED_SETTINGS = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit")


def generate(backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site, **options: Any) -> Any:
    """Continue the rows of `batch` with `prompt` at `site`, as transformers' generate does.

    Lengths count text, never the prompt, and processors such as repetition_penalty see text only. Rows may be padded on
    either side; a row's continuation never depends on its neighbors.

    Args:
        backbone: A causal or encoder-decoder language model.
        batch: The texts; inputs_embeds [B, T, H] take the place of input_ids, which are then [B, 0].
        prompt: The prompts of the rows; None: the stock model's generate and nothing else.
        site: Where they enter.
        options: Those of transformers' generate.

    Returns:
        What the stock model returns: input_ids [B, T] and then new tokens (encoder-decoder models: decoder ids), or a
        ModelOutput with `return_dict_in_generate`. Where embeddings replace the ids, new tokens alone.

    Raises:
        BackboneError: The model does not generate, an option would bypass the prompt, prompt and text do not fit the
            model's positions, or there is neither.
    """
    if backbone.head != "lm" or backbone.family is MASKED:
        raise BackboneError(
            f"{type(backbone.model).__name__} does not generate text; rank label words (kind label), or train a "
            f"classification head (model.head: sequence, token or span)"
        )
    if prompt is None:
        if backbone.family is not SEQ2SEQ and batch.inputs_embeds is None and not bool(batch.attention_mask.any()):
            raise BackboneError("a text of no tokens cannot be continued without a prompt; give the template words")
        return _call_generate(backbone, _stock_arguments(batch, backbone), options)
    check_site(backbone, site)
    settings = _Settings(backbone, options)
    settings.refuse(site)
    no_text = batch.attention_mask.sum(1) == 0
    if bool(no_text.any()) and site.name != "input":
        raise BackboneError(f"a row without text cannot be continued at site '{site.name}'; use site 'input'")
    if backbone.family is not SEQ2SEQ and bool((no_text & (prompt.lengths[prompt.prompt_index] == 0)).any()):
        raise BackboneError("a row has no text, and its prompt is computed from text; give it words")
    batch = place_prompts(backbone, batch, site, prompt)
    with torch.no_grad():
        if backbone.family is SEQ2SEQ:
            return _generate_encoder_decoder(backbone, batch, prompt, site, settings)
        return _generate_causal(backbone, batch, prompt, site, settings)


class _Settings:
    """The options of one call, and the generation configuration that holds for it; both are copies."""

    def __init__(self, backbone: Backbone, options: Mapping[str, Any]) -> None:
        self.backbone = backbone
        self.options = dict(options)
        self.config = copy.deepcopy(self.options.get("generation_config"))
        if self.config is not None:
            self.options["generation_config"] = self.config

    def get(self, name: str) -> Any:
        """The value that transformers would use: the keyword's, the given configuration's, the model's."""
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
    def sequences_per_row(self) -> int:
        """How many sequences transformers runs for each row."""
        return max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1)

    def refuse(self, site: Site) -> None:
        """Raise BackboneError for options that would bypass the prompt."""
        refused = [name for name in REFUSED_OPTIONS if self.options.get(name) is not None]
        refused += [name for name in REFUSED_SETTINGS if self.get(name)]
        if refused:
            raise BackboneError(f"{', '.join(refused)} cannot be combined with a prompt; leave it out")
        cache_kind = self.get("cache_implementation")
        if not site.in_text and cache_kind not in (None, "dynamic", "static"):
            raise BackboneError(
                f"cache_implementation '{cache_kind}' cannot hold a prompt at site '{site.name}'; possible: dynamic, "
                f"static"
            )

    def count_new_tokens(self, text_length: int, room: int | None) -> int:
        """Replace lengths that count text by numbers of new tokens, and return the greatest.

        Args:
            text_length: Tokens of the text, padding included, as transformers counts them.
            room: Positions that the model has left; None: it has no limit.
        """
        if self.get("max_new_tokens") is None:
            limit = self.get("max_length")
            new_tokens = min(DEFAULT_NEW_TOKENS, room or DEFAULT_NEW_TOKENS) if limit is None else limit - text_length
            if new_tokens <= 0:
                raise BackboneError(
                    f"max_length {limit} leaves no room behind a text of {text_length} tokens; raise it or set "
                    f"max_new_tokens"
                )
            self.set("max_length", None)
            self.set("max_new_tokens", new_tokens)
        min_length = self.get("min_length") or 0
        if self.get("min_new_tokens") is None and min_length > 0:
            self.set("min_length", None)
            self.set("min_new_tokens", max(min_length - text_length, 0))
        # Behind the last position, learned positions crash and rotary ones write nonsense.
        if room is not None and room < int(self.get("max_new_tokens")):
            if room <= 0:
                raise BackboneError("prompt and text fill all positions of the model; shorten the text to generate")
            self.set("max_new_tokens", room)
        return int(self.get("max_new_tokens"))

    def static_cache_length(self, filled: int, new_tokens: int) -> int | None:
        """Positions of the static cache that the call asks for; None: a cache that grows.

        The option is taken away, as transformers refuses it beside a cache that is handed over.

        Args:
            filled: Positions that the cache holds already.
            new_tokens: Positions that generation will add.
        """
        cache_kind = self.get("cache_implementation")
        self.set("cache_implementation", None)
        model_kind = self.get("cache_implementation")
        if model_kind is not None:
            raise BackboneError(
                f"the model's own generation_config asks for cache_implementation '{model_kind}', and transformers "
                f"then takes no cache that holds a prompt; set it to None there and pass it to generate instead"
            )
        return max(filled + new_tokens, self.get("max_cache_len") or 0) if cache_kind == "static" else None


def _call_generate(backbone: Backbone, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    model: Any = backbone.model
    return model.generate(**arguments, **options)


def _stock_arguments(batch: Batch, backbone: Backbone) -> dict[str, Tensor]:
    """The arguments of the stock model's generate."""
    arguments = {"attention_mask": batch.attention_mask.long()}
    if batch.inputs_embeds is None:
        arguments["input_ids"] = batch.input_ids
    else:
        arguments["inputs_embeds"] = batch.inputs_embeds
    if backbone.family is SEQ2SEQ and batch.decoder_input_ids is not None:
        arguments["decoder_input_ids"] = batch.decoder_input_ids
        if batch.decoder_attention_mask is not None:
            arguments["decoder_attention_mask"] = batch.decoder_attention_mask.long()
    return arguments


def _generate_causal(backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, settings: _Settings) -> Any:
    _, text_mask, text_embeddings = align_texts(backbone, batch, prompt)
    check_room(backbone, text_mask, prompt)
    longest = int((text_mask.sum(1) + prompt.lengths[prompt.prompt_index]).max())
    room = None if backbone.max_positions is None else backbone.max_positions - longest
    new_tokens = settings.count_new_tokens(text_mask.shape[1], room)
    if site.in_cache:
        arguments = _cached_arguments(
            backbone, prompt, settings, text_mask=text_mask, text_embeddings=text_embeddings, new_tokens=new_tokens
        )
        return _call_generate(backbone, {"input_ids": batch.input_ids, **arguments}, settings.options)
    assert batch.prompt_offsets is not None
    layout = layout_rows(text_mask, batch.prompt_offsets, prompt, pad_left=True, segment_lengths=batch.segment_lengths)
    prompt_embeddings: Tensor | None = None
    inject_prompt: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if site.in_layers:
        prompt_embeddings = split_by_layer(prompt.values, backbone)[0]
        inject_prompt = inject_at_layers(backbone, prompt, layout.prompt_slots, site.mode)
    arguments = {
        "input_ids": batch.input_ids,
        "inputs_embeds": assemble_embeddings(text_embeddings, prompt, layout, prompt_embeddings),
        "attention_mask": layout.attention_mask.long(),
    }
    with inject_prompt:
        return _call_generate(backbone, arguments, settings.options)


def _cached_arguments(
    backbone: Backbone,
    prompt: Prompt,
    settings: _Settings,
    *,
    text_mask: Tensor,
    text_embeddings: Tensor,
    new_tokens: int,
) -> dict[str, Any]:
    """Arguments of generate with everything but each row's last token in a cache, laid out `[pad|prompt|text]`.

    The rows run as `[prompt|text|pad]` and then move to the right edge, so that nothing is between prompt and text and
    all rows decode together. Of `inputs_embeds` the model reads the last token only, as the cache holds the others.

    Args:
        backbone: A causal model.
        prompt: A prompt at site kv.
        settings: Those of the call.
        text_mask: [B, T], true for text, which is at the left edge.
        text_embeddings: [B, T, H].
        new_tokens: How many tokens generation adds at most.
    """
    device = text_mask.device
    full_cache = DynamicCache()  # keeps everything: windows are cut off after the rows have moved
    fill_cache(full_cache, backbone, prompt)
    full_cache.batch_select_indices(prompt.prompt_index)
    prompt_lengths = prompt.lengths[prompt.prompt_index]
    text_lengths = text_mask.sum(1)
    run_lengths = prompt_lengths + text_lengths
    arguments = {}
    if "position_ids" in backbone.trunk_arguments:
        position_ids = torch.arange(text_mask.shape[1], device=device) + prompt_lengths[:, None]
        arguments["position_ids"] = position_ids.where(text_mask, 0)
    backbone.trunk(
        inputs_embeds=text_embeddings,
        attention_mask=torch.cat([prompt.mask[prompt.prompt_index].bool(), text_mask], 1).long(),
        **cache_argument(backbone.trunk, full_cache),
        **arguments,
    )
    size = int(run_lengths.max())
    columns = torch.arange(size, device=device)
    moved_from = ((prompt.values.shape[1] + text_lengths - size)[:, None] + columns[:-1]).clamp(min=0)
    static_length = settings.static_cache_length(size, new_tokens)
    if static_length is None:
        cache: Cache = backbone.new_cache()
    else:
        cache = StaticCache(config=backbone.config, max_cache_len=static_length)
    for index, layer in enumerate(full_cache.layers):
        _append_layer(cache, index, layer, settings.sequences_per_row, positions=moved_from)
    last_columns = (text_lengths - 1)[:, None, None].expand(-1, -1, text_embeddings.shape[2])
    last_embeddings = text_embeddings.gather(1, last_columns)
    return {
        "inputs_embeds": torch.nn.functional.pad(last_embeddings, (0, 0, size - 1, 0)),
        "attention_mask": (columns >= size - run_lengths[:, None]).long(),
        **generate_argument(cache),
    }


def _append_layer(cache: Cache, index: int, layer: Any, copies: int, positions: Tensor | None = None) -> None:
    """Append the keys and values of `layer` to the empty layer `index` of `cache`.

    Args:
        cache: The cache to extend.
        index: The layer's number.
        layer: Keys and values [B, heads, S', head_dim] of another cache's layer.
        copies: How many times each row is repeated.
        positions: [B, S], the positions to take; None: all.
    """
    cache.update(
        _select_positions(layer.keys, positions).repeat_interleave(copies, 0),
        _select_positions(layer.values, positions).repeat_interleave(copies, 0),
        index,
    )


def _select_positions(states: Tensor, positions: Tensor | None) -> Tensor:
    """Keys or values [B, heads, S', d] at `positions` [B, S]: [B, heads, S, d]."""
    if positions is None:
        return states
    return states.gather(2, positions[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def _generate_encoder_decoder(backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, settings: _Settings) -> Any:
    in_decoder = not site.in_text
    lengths = prompt.lengths[prompt.prompt_index]
    if in_decoder and backbone.max_positions is not None and bool((lengths != lengths[0]).any()):
        return _generate_by_prompt_length(backbone, batch, prompt, site, settings)
    encoder_batch = replace(batch, labels=None, decoder_input_ids=None, decoder_attention_mask=None)
    # The encoder does not see a prompt of the decoder's, but it may read another text with it.
    encoder_prompt = None if in_decoder and prompt.embedding_delta is None else prompt
    trunk = run_trunk(backbone, encoder_batch, encoder_prompt, site)
    assert trunk.encoder is not None
    assert trunk.encoder_mask is not None
    arguments: dict[str, Any] = _stock_arguments(batch, backbone)
    arguments.pop("inputs_embeds", None)
    arguments["attention_mask"] = trunk.encoder_mask.long()
    arguments["encoder_outputs"] = trunk.encoder.output
    if in_decoder:
        arguments |= _decoder_arguments(backbone, batch, prompt, site, trunk=trunk, settings=settings)
    return _call_generate(backbone, arguments, settings.options)


def _decoder_arguments(
    backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, *, trunk: TrunkOutput, settings: _Settings
) -> dict[str, Any]:
    """Arguments of generate that let the decoder begin behind the prompt.

    Args:
        backbone: An encoder-decoder model.
        batch: The texts.
        prompt: A prompt at site decoder or kv.
        site: Where it enters.
        trunk: The output of the encoder for the texts.
        settings: Those of the call.
    """
    # The longest slot may belong to a row of another group; the decoder counts positions from the cache's beginning.
    prompt = trim_padding(prompt)
    prompt_mask = prompt.mask[prompt.prompt_index].long()
    decoder_mask = batch.decoder_attention_mask
    if batch.decoder_input_ids is not None and decoder_mask is not None and not bool(decoder_mask.bool().all()):
        raise BackboneError(
            f"decoder inputs of unequal lengths would leave padding behind a prompt at site '{site.name}'; "
            f"generate them apart"
        )
    decoder_ids = _begun_decoder_ids(backbone, batch, settings, rows=len(prompt_mask))
    decoder_length = decoder_ids.shape[1]
    new_tokens = settings.get("max_new_tokens")
    if new_tokens is None:
        decoder_positions = settings.get("max_length") or DEFAULT_NEW_TOKENS + decoder_length
    else:
        decoder_positions = new_tokens + decoder_length
    cache = _decoder_cache(backbone, prompt, site, trunk)
    static_length = settings.static_cache_length(prompt_mask.shape[1], decoder_positions)
    if static_length is None:
        cache.batch_repeat_interleave(settings.sequences_per_row)
    else:
        assert trunk.encoder_mask is not None
        cache = _static_cache(
            backbone,
            cache,
            decoder_length=static_length,
            encoder_length=trunk.encoder_mask.shape[1],
            copies=settings.sequences_per_row,
        )
    return {
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": torch.cat([prompt_mask, torch.ones_like(decoder_ids)], 1),
        **generate_argument(cache),
    }


def _begun_decoder_ids(backbone: Backbone, batch: Batch, settings: _Settings, rows: int) -> Tensor:
    """The decoder's first ids [B, S]: the start token, and what the batch gives."""
    start = settings.get("decoder_start_token_id")
    start = start_id(backbone) if start is None else start
    start_ids = torch.as_tensor(start, device=batch.attention_mask.device).reshape(-1, 1).expand(rows, 1)
    decoder_ids = batch.decoder_input_ids
    if decoder_ids is None:
        return start_ids
    if bool((decoder_ids[:, 0] != start_ids[:, 0]).all()):
        return torch.cat([start_ids, decoder_ids], 1)
    return decoder_ids


def _decoder_cache(backbone: Backbone, prompt: Prompt, site: Site, trunk: TrunkOutput) -> EncoderDecoderCache:
    """A cache with the keys and values of all rows' prompts in the decoder."""
    self_attention_cache = backbone.new_cache()
    if site.in_cache:
        fill_cache(self_attention_cache, backbone, prompt)
        self_attention_cache.batch_select_indices(prompt.prompt_index)
        return EncoderDecoderCache(self_attention_cache, backbone.new_cache())
    assert trunk.encoder is not None
    assert trunk.encoder_mask is not None
    cache = EncoderDecoderCache(self_attention_cache, backbone.new_cache())
    backbone.decoder(
        inputs_embeds=prompt.values.to(backbone.dtype)[prompt.prompt_index],
        attention_mask=prompt.mask[prompt.prompt_index].long(),
        encoder_hidden_states=trunk.encoder.hidden_states,
        encoder_attention_mask=trunk.encoder_mask.long(),
        **cache_argument(backbone.decoder, cache),
    )
    return cache


def _static_cache(
    backbone: Backbone, cache: EncoderDecoderCache, *, decoder_length: int, encoder_length: int, copies: int
) -> EncoderDecoderCache:
    """The same cache of fixed size, with room for the decoder's and the encoder's positions, rows repeated."""
    return EncoderDecoderCache(
        _fixed_size(backbone, cache.self_attention_cache, decoder_length, copies),
        _fixed_size(backbone, cache.cross_attention_cache, encoder_length, copies),
    )


def _fixed_size(backbone: Backbone, cache: Any, length: int, copies: int) -> StaticCache:
    static_cache = StaticCache(config=backbone.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if cache.get_seq_length(index) > 0:
            _append_layer(static_cache, index, layer, copies)
    return static_cache


def _generate_by_prompt_length(
    backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, settings: _Settings
) -> Tensor:
    """Rows grouped by prompt length, for decoders that count positions from the cache's beginning."""
    lengths = prompt.lengths[prompt.prompt_index]
    if settings.get("return_dict_in_generate"):
        raise BackboneError(
            f"prompts of {sorted(set(lengths.tolist()))} tokens are generated in groups for "
            f"{type(backbone.model).__name__}, whose decoder counts positions itself; batch them by length to use "
            f"return_dict_in_generate"
        )
    sequences_per_row = settings.get("num_return_sequences") or 1
    sequences_of: dict[int, Tensor] = {}
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        sequences = generate(backbone, batch.rows(rows), prompt.rows(rows), site, **settings.options)
        for row, row_sequences in zip(rows.tolist(), sequences.split(sequences_per_row), strict=True):
            sequences_of[row] = row_sequences
    longest = max(sequences.shape[1] for sequences in sequences_of.values())
    pad_token_id = settings.get("pad_token_id")
    if pad_token_id is None:
        pad_token_id = backbone.model.config.pad_token_id or 0
    padded = []
    for row in sorted(sequences_of):
        sequences = sequences_of[row]
        padding = (0, longest - sequences.shape[1])
        padded.append(torch.nn.functional.pad(sequences, padding, value=pad_token_id))
    return torch.cat(padded)
