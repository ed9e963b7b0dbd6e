"""Run the frozen trunk over a batch with its prompts: packed, shared through the cache, or concatenated."""

import contextlib
import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.errors import BackboneError
from softprompts.injection.encoder_decoder import check_room, decode, decoder_ids
from softprompts.injection.hidden_states import CapturedStates, capture, check_layers
from softprompts.injection.layout import Layout, add_delta, assemble_embeddings, layout_rows
from softprompts.injection.packed import Prefix, check_depth, packed_prefix, run_packed, why_not_packed
from softprompts.injection.placement import place_prompts
from softprompts.injection.sites import Site, check_site, fill_cache, inject_at_layers, resolve_place, split_by_layer
from softprompts.types import Batch, Prompt

PATHS = ("packed", "shared", "concatenation")
"""How prompts can be computed: once, with all rows in one pass; once, through the cache; in every row."""


@dataclass(frozen=True)
class TrunkOutput:
    """What the trunk made of a batch, in a layout where nothing but `position` knows about the prompt.

    hidden [B, S, H] the states of the full sequences; position [B, T] where each packed text token stands in them;
    order [B, T] the original column of each packed token; mask [B, T] packed text mask; end [B] the last position of
    each row's run, be it text or prompt; output: the trunk's own output; encoded: the encoder's states and mask; cache;
    path; text: in encoder-decoder models, whose decoder the rest describes, the same of the encoder; inner: the states
    of the layers that were asked for, laid out as `hidden`.
    """

    hidden_states: Tensor
    text_positions: Tensor
    token_order: Tensor
    text_mask: Tensor
    end_positions: Tensor
    output: Any
    encoded: tuple[Any, Tensor] | None = None
    cache: Any = None
    path: str = ""
    encoder: "TrunkOutput | None" = None
    layer_states: dict[int, Tensor] = field(default_factory=dict)


def run_trunk(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    *,
    path: str | None = None,
    prefix: Prefix | None = None,
    wanted: Callable[[Tensor, Tensor], Tensor] | None = None,
    branch: Tensor | None = None,
    layers: Collection[int] = (),
) -> TrunkOutput:
    """Run the trunk on `batch` with `prompt` at `site`; see Reading. Arguments as for `forward`.

    wanted: which packed text tokens' last states are needed, given their order and mask [B, T]; None: all;
    branch [B, T]: on path "packed", 0 for text and c for the c-th continuation, whose tokens stand behind all text.
    """
    check_layers(backbone, layers)
    with backbone.with_kernels(), capture(backbone, layers) as caught:
        return _read(backbone, batch, prompt, site, path, prefix, wanted, branch, caught)


def _read(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    path: str | None,
    prefix: Prefix | None,
    wanted: Callable[[Tensor, Tensor], Tensor] | None,
    branch: Tensor | None,
    caught: CapturedStates,
) -> TrunkOutput:
    check_site(backbone, site)
    order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    mask = batch.attention_mask.gather(1, order).bool()
    text = backbone.embed(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds
    text = add_delta(text.gather(1, order[..., None].expand_as(text)), mask, prompt)
    stands = place_prompts(backbone, batch, site, prompt)
    encoder_side = None if backbone.family is SEQ2SEQ and site.name in ("decoder", "kv") else prompt
    if branch is None:
        check_room(backbone, mask, encoder_side)
    else:
        branch = branch.gather(1, order)
        check_depth(backbone, mask, branch, encoder_side)
    _check_positions(backbone, batch)
    packed = replace(stands, attention_mask=mask, inputs_embeds=text)
    if batch.token_type_ids is not None:
        packed = replace(packed, token_type_ids=batch.token_type_ids.gather(1, order))
    if batch.position_ids is not None:
        packed = replace(packed, position_ids=batch.position_ids.gather(1, order))
    if backbone.family is SEQ2SEQ:
        _check_path(path)
        if path in ("packed", "shared"):
            raise BackboneError(f"path '{path}' is not possible: an encoder's prompt sees the text; leave the path out")
        return _read_seq2seq(backbone, batch, packed, order, prompt, site, caught)
    path, reason = choose_path(backbone, packed, prompt, site, path, prefix)
    if path == "concatenation":
        return _read_concatenated(backbone, packed, order, prompt, site, reason, caught)
    assert prompt is not None
    if path == "packed":
        chosen = None if wanted is None else wanted(order, mask)
        return _read_packed(backbone, packed, order, prompt, site, prefix, chosen, branch, caught)
    return _read_shared(backbone, packed, order, prompt, site, prefix, caught)


def prefill(backbone: Backbone, prompt: Prompt, site: Site) -> tuple[Cache, Tensor | None]:
    """The cache of the U distinct prompts of a causal model, and the state [U, H] that scores the first text token.

    At site kv the cache is the prompt itself, and no state scores the first token (None).
    """
    cache = backbone.new_cache()
    if site.name == "kv":
        fill_cache(cache, backbone, prompt)
        return cache, None
    values, deep = prompt.values, contextlib.nullcontext()
    mask = prompt.mask.bool()
    if site.name == "layers":
        slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).where(mask, -1)
        distinct = replace(prompt, prompt_index=torch.arange(len(values), device=values.device))
        values, deep = split_by_layer(values, backbone)[0], inject_at_layers(backbone, distinct, slots, site.mode)  # type: ignore[assignment]
    with deep:
        output = backbone.trunk(
            inputs_embeds=values.to(backbone.dtype),
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
            **_positions(backbone, (mask.cumsum(1) - 1).clamp(min=0)),
        )
    return cache, output.last_hidden_state[:, -1]


def can_compute_prefix(backbone: Backbone, site: Site) -> bool:
    """Whether prompts can be read before any text: they stand before it, and the model has a cache."""
    first = backbone.family.scores_next_token and resolve_place(backbone, site) == "first"
    return first and (site.name == "kv" or backbone.no_cache_reason is None)


def compute_prefix(backbone: Backbone, prompt: Prompt, site: Site) -> Prefix | None:
    """The distinct prompts read once, to be given to any number of batches; None where that cannot be done."""
    check_site(backbone, site)
    if not can_compute_prefix(backbone, site):
        return None
    if backbone.kernels.path == "packed" and why_not_packed(backbone) is None:
        return packed_prefix(backbone, prompt, site)
    with backbone.with_kernels():
        cache, last = prefill(backbone, prompt, site)
    return Prefix((), prompt.mask.bool(), last, cache)


def _copied(cache: Any) -> Any:
    """The same cache, to be added to: its layers put new tensors in the place of their own and change none."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


def _positions(backbone: Backbone, ids: Tensor) -> dict[str, Tensor]:
    return {"position_ids": ids} if "position_ids" in backbone.trunk_arguments else {}


def _check_positions(backbone: Backbone, batch: Batch) -> None:
    if batch.position_ids is not None and not (
        backbone.family.scores_next_token and "position_ids" in backbone.trunk_arguments
    ):
        raise BackboneError(
            f"{type(backbone.model).__name__} counts positions itself, so positions cannot be given; leave them out"
        )


def choose_path(
    backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site, path: str | None, prefix: Prefix | None = None
) -> tuple[str, str]:
    """How the prompts of `batch` are computed, `packed`, `shared` or `concatenation`, and for the last one why.

    prefix: the prompts, read before, which are then used where no path is asked for.
    Raises BackboneError where `path` is asked for and not possible.
    """
    _check_path(path)
    reason = _why_concatenated(backbone, batch, prompt, site)
    if path is None and prefix is not None and reason is None:
        path = prefix.path
    if reason is not None or path == "concatenation":
        if path in ("packed", "shared"):
            raise BackboneError(f"path '{path}' is not possible: {reason}; leave the path out")
        if site.name == "kv" and reason is None:
            raise BackboneError("path 'concatenation' is not possible: keys and values are no tokens; leave it out")
        return "concatenation", reason or "asked for"
    unpackable = (
        why_not_packed(backbone) if path == "packed" or (path is None and backbone.kernels.path == "packed") else ""
    )
    if unpackable is None:
        return "packed", ""
    if path == "packed":
        raise BackboneError(f"path 'packed' is not possible: {unpackable}; leave the path out")
    if path is None and site.name != "kv" and prompt is not None and len(prompt.values) >= len(prompt.prompt_index):
        return "concatenation", "every row has a prompt of its own"
    return "shared", ""


def _check_path(path: str | None) -> None:
    if path not in (None, *PATHS):
        raise BackboneError(f"path '{path}' is unknown; possible: {', '.join(PATHS)}")


def _why_concatenated(backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site) -> str | None:
    """None where the prompt's keys and values can be computed once and shared; else the reason why not."""
    if prompt is None:
        return "no prompt"
    if site.name == "kv":
        return None
    if backbone.no_cache_reason:
        return backbone.no_cache_reason
    assert batch.prompt_offsets is not None
    if bool((batch.prompt_offsets > 0).any()):
        return "text stands before the prompt"
    return "a row has a prompt of no tokens" if bool((prompt.lengths[prompt.prompt_index] == 0).any()) else None


def _read_packed(
    backbone: Backbone,
    batch: Batch,
    order: Tensor,
    prompt: Prompt,
    site: Site,
    prefix: Prefix | None,
    wanted: Tensor | None,
    branch: Tensor | None,
    caught: CapturedStates,
) -> TrunkOutput:
    if prefix is not None and prefix.cache is not None:
        prefix = None
    found = run_packed(backbone, batch, prompt, site, prefix=prefix, wanted=wanted, branch=branch)
    states, position = (
        found.texts,
        torch.arange(batch.attention_mask.shape[1], device=batch.attention_mask.device).expand_as(batch.attention_mask),
    )
    assert states is not None
    inner = {number: found.spread(value) for (_, number), value in caught.items()}
    if found.last is not None:
        states, position = torch.cat([found.last[prompt.prompt_index][:, None], states], 1), position + 1
        inner = {number: _behind_one(value) for number, value in inner.items()}
    text = batch.attention_mask if branch is None else batch.attention_mask & (branch == 0)
    end = (text.sum(1) - 1 + int(found.last is not None)).clamp(min=0)
    return TrunkOutput(
        states, position, order, batch.attention_mask, end, found.output, path="packed", layer_states=inner
    )


def _behind_one(states: Tensor) -> Tensor:
    """States [B, T, H] behind a position that nobody looks at, where `hidden` has that of the prompt's last token."""
    return torch.nn.functional.pad(states, (0, 0, 1, 0))


def _read_shared(
    backbone: Backbone,
    batch: Batch,
    order: Tensor,
    prompt: Prompt,
    site: Site,
    prefix: Prefix | None,
    caught: CapturedStates,
) -> TrunkOutput:
    assert batch.inputs_embeds is not None
    if prefix is None or prefix.cache is None:
        cache, last = prefill(backbone, prompt, site)
    else:
        cache, last = _copied(prefix.cache), prefix.last_state
    cache.batch_select_indices(prompt.prompt_index)
    before = prompt.mask[prompt.prompt_index]
    column = torch.arange(batch.attention_mask.shape[1], device=batch.attention_mask.device)
    own = column[None] if batch.position_ids is None else batch.position_ids
    # Padding may reach past the last position the model has.
    ids = (own + prompt.lengths[prompt.prompt_index][:, None]).where(batch.attention_mask, 0)
    output = backbone.trunk(
        inputs_embeds=batch.inputs_embeds,
        attention_mask=torch.cat([before.bool(), batch.attention_mask], 1).long(),
        past_key_values=cache,
        use_cache=True,
        **_positions(backbone, ids),
    )
    states, position = output.last_hidden_state, column.expand_as(batch.attention_mask)
    inner = {number: value for (_, number), value in caught.items()}
    if last is not None:
        states, position = torch.cat([last[prompt.prompt_index][:, None], states], 1), position + 1
        inner = {number: _behind_one(value) for number, value in inner.items()}
    return TrunkOutput(
        states,
        position,
        order,
        batch.attention_mask,
        (batch.attention_mask.sum(1) - 1 + int(last is not None)).clamp(min=0),
        output,
        cache=cache,
        path="shared",
        layer_states=inner,
    )


def _read_concatenated(
    backbone: Backbone,
    batch: Batch,
    order: Tensor,
    prompt: Prompt | None,
    site: Site,
    reason: str,
    caught: CapturedStates,
) -> TrunkOutput:
    assert batch.inputs_embeds is not None
    assert batch.prompt_offsets is not None
    where = layout_rows(batch.attention_mask, batch.prompt_offsets, prompt, segments=batch.segment_lengths)
    output = _run_encoder(backbone, batch, prompt, site, where)
    return TrunkOutput(
        output.last_hidden_state,
        where.text_positions,
        order,
        batch.attention_mask,
        (where.attention_mask.sum(1) - 1).clamp(min=0),
        output,
        path=f"concatenation: {reason}",
        layer_states={number: value for (_, number), value in caught.items()},
    )


def _run_encoder(backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site, where: Layout) -> Any:
    """The encoder's (or only trunk's) output for full rows, deep prompts included."""
    assert batch.inputs_embeds is not None
    deep = prompt is not None and site.name == "layers"
    front = prompt if prompt is not None and site.name in ("input", "layers") else None
    first = None
    if deep and prompt is not None:
        first = split_by_layer(prompt.values, backbone)[0]
    arguments: dict[str, Any] = {}
    if backbone.family is not SEQ2SEQ:
        names = backbone.trunk_arguments
        if backbone.family.scores_next_token and "use_cache" in names:
            arguments["use_cache"] = False
        if backbone.family.scores_next_token and "position_ids" in names:
            arguments["position_ids"] = _given_positions(batch, where)
        if batch.token_type_ids is not None and "token_type_ids" in names and not backbone.family.scores_next_token:
            arguments["token_type_ids"] = _token_types(batch.token_type_ids, where)
    context = (
        inject_at_layers(backbone, prompt, where.prompt_slots, site.mode)
        if deep and prompt
        else contextlib.nullcontext()
    )
    with context:
        return backbone.encoder(
            inputs_embeds=assemble_embeddings(batch.inputs_embeds, front, where, first),
            attention_mask=where.attention_mask.long(),
            **arguments,
        )


def _token_types(types: Tensor, where: Layout) -> Tensor:
    """Types of full rows: a prompt token has that of the text token before it, and 0 before the text."""
    own = torch.nn.functional.pad(types, (1, 0)).gather(1, where.text_before_prompt)
    return torch.cat([own, types], 1).gather(1, where.gather_index)


def _given_positions(batch: Batch, where: Layout) -> Tensor:
    """Positions of full rows: counted from the run's beginning, or the caller's own with the prompt between."""
    if batch.position_ids is None:
        return where.position_ids
    # A prompt token goes on from the text token before it; all prompt tokens so far have taken a position.
    last = torch.nn.functional.pad(batch.position_ids, (1, 0), value=-1).gather(1, where.text_before_prompt)
    count = (where.prompt_slots >= 0).long().cumsum(1)
    own = torch.cat([last, batch.position_ids], 1).gather(1, where.gather_index) + count
    return own.where(where.attention_mask, 0)


def _read_seq2seq(
    backbone: Backbone,
    batch: Batch,
    packed: Batch,
    order: Tensor,
    prompt: Prompt | None,
    site: Site,
    caught: CapturedStates,
) -> TrunkOutput:
    assert packed.prompt_offsets is not None
    encoder_side = prompt if site.name in ("input", "layers") else None
    where = layout_rows(packed.attention_mask, packed.prompt_offsets, encoder_side, segments=packed.segment_lengths)
    encoded = _run_encoder(backbone, packed, encoder_side, site, where)
    states = encoded.last_hidden_state
    ids, mask, target_order = decoder_ids(backbone, batch, packed, order)
    decoder_side = prompt if site.name not in ("input", "layers") else None
    output, position, end = decode(backbone, ids, mask, states, where.attention_mask, decoder_side, site)
    inner = {side: {n: v for (own, n), v in caught.items() if own == side} for side in ("text", "target")}
    text = TrunkOutput(
        states,
        where.text_positions,
        order,
        packed.attention_mask,
        where.attention_mask.sum(1) - 1,
        encoded,
        layer_states=inner["text"],
    )
    return TrunkOutput(
        output.last_hidden_state,
        position,
        target_order,
        mask,
        end,
        output,
        (encoded, where.attention_mask),
        cache=output.past_key_values,
        path="concatenation: an encoder's prompt sees the text",
        encoder=text,
        layer_states=inner["target"],
    )
