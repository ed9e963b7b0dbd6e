"""Run the frozen trunk over a batch with its prompts: the prefix shared through the cache, or concatenated."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from softprompts.backbone import SEQ2SEQ, Backbone, BackboneError
from softprompts.inject.layout import Layout, assemble, layout
from softprompts.inject.seq2seq import check_room, decode, decoder_ids
from softprompts.inject.sites import Site, at_layers, by_layer, check_site, fill, resolve_place
from softprompts.prompt import Batch, Prompt


@dataclass(frozen=True)
class Reading:
    """What the trunk made of a batch, in a layout where nothing but `position` knows about the prompt.

    hidden [B, S, H] the states of the full sequences; position [B, T] where each packed text token stands in them;
    order [B, T] the original column of each packed token; mask [B, T] packed text mask; end [B] the last position of
    each row's run, be it text or prompt; output: the trunk's own output; encoded: the encoder's states and mask; cache;
    path; text: in encoder-decoder models, whose decoder the rest describes, the same of the encoder.
    """

    hidden: Tensor
    position: Tensor
    order: Tensor
    mask: Tensor
    end: Tensor
    output: Any
    encoded: tuple[Any, Tensor] | None = None
    cache: Any = None
    path: str = ""
    text: "Reading | None" = None


def read(backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site, *, share: bool | None = None) -> Reading:
    """Run the trunk on `batch` with `prompt` at `site`; see Reading. Arguments as for `forward`."""
    check_site(backbone, site)
    order = batch.mask.argsort(dim=1, descending=True, stable=True)
    mask = batch.mask.gather(1, order).bool()
    text = backbone.embed(batch.ids) if batch.embeds is None else batch.embeds
    text = text.gather(1, order[..., None].expand_as(text))
    place = _place(backbone, batch, site, mask)
    encoder_side = None if backbone.family is SEQ2SEQ and site.name in ("decoder", "kv") else prompt
    check_room(backbone, mask, encoder_side)
    _check_positions(backbone, batch)
    packed = replace(batch, mask=mask, embeds=text, place=place)
    if batch.types is not None:
        packed = replace(packed, types=batch.types.gather(1, order))
    if batch.positions is not None:
        packed = replace(packed, positions=batch.positions.gather(1, order))
    if backbone.family is SEQ2SEQ:
        return _read_seq2seq(backbone, batch, packed, order, prompt, site)
    reason = _why_not_shared(backbone, packed, prompt, site, share)
    if reason is None:
        assert prompt is not None
        return _read_shared(backbone, packed, order, prompt, site)
    return _read_concatenated(backbone, packed, order, prompt, site, reason)


def prefill(backbone: Backbone, prompt: Prompt, site: Site) -> tuple[Cache, Tensor | None]:
    """The cache of the U distinct prompts of a causal model, and the state [U, H] that scores the first text token.

    At site kv the cache is the prompt itself, and no state scores the first token (None).
    """
    cache = backbone.new_cache()
    if site.name == "kv":
        fill(cache, backbone, prompt)
        return cache, None
    values, deep = prompt.values, contextlib.nullcontext()
    mask = prompt.mask.bool()
    if site.name == "layers":
        slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).where(mask, -1)
        distinct = replace(prompt, row=torch.arange(len(values), device=values.device))
        values, deep = by_layer(values, backbone)[0], at_layers(backbone, distinct, slots, site.mode)  # type: ignore[assignment]
    with deep:
        output = backbone.trunk(
            inputs_embeds=values.to(backbone.dtype),
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
            **_positions(backbone, (mask.cumsum(1) - 1).clamp(min=0)),
        )
    return cache, output.last_hidden_state[:, -1]


def _positions(backbone: Backbone, ids: Tensor) -> dict[str, Tensor]:
    return {"position_ids": ids} if "position_ids" in backbone.trunk_arguments else {}


def _place(backbone: Backbone, batch: Batch, site: Site, mask: Tensor) -> Tensor:
    if batch.place is not None and site.name in ("input", "layers"):
        if bool(((batch.place < 0) | (batch.place > mask.sum(1))).any()):
            raise BackboneError(
                f"places {batch.place.tolist()} do not all lie within texts of {mask.sum(1).tolist()} tokens"
            )
        return batch.place
    after = resolve_place(backbone, site) == "after_start"
    return torch.full((len(mask),), int(after), device=mask.device).minimum(mask.sum(1))


def _check_positions(backbone: Backbone, batch: Batch) -> None:
    if batch.positions is not None and not (backbone.family.shifted and "position_ids" in backbone.trunk_arguments):
        raise BackboneError(
            f"{type(backbone.model).__name__} counts positions itself, so positions cannot be given; leave them out"
        )


def _why_not_shared(
    backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site, share: bool | None
) -> str | None:
    """None where the prompt's keys and values are computed once and shared; else the reason for the concatenation."""
    if prompt is None:
        return "no prompt"
    if site.name == "kv":
        return None
    if backbone.no_cache_because:
        return backbone.no_cache_because
    assert batch.place is not None
    if bool((batch.place > 0).any()):
        return "text stands before the prompt"
    if share is False:
        return "sharing was switched off"
    if share is None and len(prompt.values) >= len(prompt.row):
        return "every row has a prompt of its own"
    return None


def _read_shared(backbone: Backbone, batch: Batch, order: Tensor, prompt: Prompt, site: Site) -> Reading:
    assert batch.embeds is not None
    cache, last = prefill(backbone, prompt, site)
    cache.batch_select_indices(prompt.row)
    before = prompt.mask[prompt.row]
    column = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    own = column[None] if batch.positions is None else batch.positions
    # Padding may reach past the last position the model has.
    ids = (own + prompt.lengths[prompt.row][:, None]).where(batch.mask, 0)
    output = backbone.trunk(
        inputs_embeds=batch.embeds,
        attention_mask=torch.cat([before.bool(), batch.mask], 1).long(),
        past_key_values=cache,
        use_cache=True,
        **_positions(backbone, ids),
    )
    states, position = output.last_hidden_state, column.expand_as(batch.mask)
    if last is not None:
        states, position = torch.cat([last[prompt.row][:, None], states], 1), position + 1
    return Reading(
        states,
        position,
        order,
        batch.mask,
        (batch.mask.sum(1) - 1 + int(last is not None)).clamp(min=0),
        output,
        cache=cache,
        path="shared",
    )


def _read_concatenated(
    backbone: Backbone, batch: Batch, order: Tensor, prompt: Prompt | None, site: Site, reason: str
) -> Reading:
    assert batch.embeds is not None
    assert batch.place is not None
    where = layout(batch.mask, batch.place, prompt)
    output = _run_encoder(backbone, batch, prompt, site, where)
    return Reading(
        output.last_hidden_state,
        where.position,
        order,
        batch.mask,
        (where.mask.sum(1) - 1).clamp(min=0),
        output,
        path=f"concatenation: {reason}",
    )


def _run_encoder(backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site, where: Layout) -> Any:
    """The encoder's (or only trunk's) output for full rows, deep prompts included."""
    assert batch.embeds is not None
    deep = prompt is not None and site.name == "layers"
    front = prompt if prompt is not None and site.name in ("input", "layers") else None
    first = None
    if deep and prompt is not None:
        first = by_layer(prompt.values, backbone)[0]
    arguments: dict[str, Tensor] = {}
    if backbone.family is not SEQ2SEQ:
        names = backbone.trunk_arguments
        if backbone.family.shifted and "position_ids" in names:
            arguments["position_ids"] = _given_positions(batch, where)
        if batch.types is not None and "token_type_ids" in names and not backbone.family.shifted:
            arguments["token_type_ids"] = _token_types(batch.types, front, where)
    context = at_layers(backbone, prompt, where.slot, site.mode) if deep and prompt else contextlib.nullcontext()
    with context:
        return backbone.encoder(
            inputs_embeds=assemble(batch.embeds, front, where, first), attention_mask=where.mask.long(), **arguments
        )


def _token_types(types: Tensor, front: Prompt | None, where: Layout) -> Tensor:
    slots = 0 if front is None else front.values.shape[1]
    both = torch.nn.functional.pad(types, (slots, 0))
    return both.gather(1, where.source)


def _given_positions(batch: Batch, where: Layout) -> Tensor:
    """Positions of full rows: counted from the run's beginning, or the caller's own behind the prompt."""
    if batch.positions is None:
        return where.ids
    columns = torch.arange(batch.mask.shape[1], device=where.ids.device).expand_as(where.position)
    own = batch.positions + where.position - columns
    size = where.ids.shape[1]
    spare = torch.nn.functional.pad(where.ids, (0, 1))  # the last column takes what padding writes
    return spare.scatter(1, where.position.where(batch.mask, size), own)[:, :size]


def _read_seq2seq(
    backbone: Backbone, batch: Batch, packed: Batch, order: Tensor, prompt: Prompt | None, site: Site
) -> Reading:
    assert packed.place is not None
    encoder_side = prompt if site.name in ("input", "layers") else None
    where = layout(packed.mask, packed.place, encoder_side)
    encoded = _run_encoder(backbone, packed, encoder_side, site, where)
    states = encoded.last_hidden_state
    ids, mask, target_order = decoder_ids(backbone, batch, packed, order)
    decoder_side = prompt if site.name not in ("input", "layers") else None
    output, position, end = decode(backbone, ids, mask, states, where.mask, decoder_side, site)
    text = Reading(states, where.position, order, packed.mask, where.mask.sum(1) - 1, encoded)
    return Reading(
        output.last_hidden_state,
        position,
        target_order,
        mask,
        end,
        output,
        (encoded, where.mask),
        cache=output.past_key_values,
        path="concatenation: an encoder's prompt sees the text",
        text=text,
    )
