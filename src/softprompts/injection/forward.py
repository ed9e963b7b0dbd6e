"""Run the frozen trunk over a batch with its prompts: packed, shared through the cache, or concatenated."""

import contextlib
import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.backbone.cache import Cache, cache_argument, output_cache
from softprompts.errors import BackboneError
from softprompts.injection.encoder_decoder import decode, decoder_input
from softprompts.injection.hidden_states import CapturedStates, capture, check_layers
from softprompts.injection.layout import Layout, align_texts, assemble_embeddings, check_room, layout_rows
from softprompts.injection.packed import (
    PackedOutput,
    Prefix,
    check_branch_room,
    packed_prefix,
    run_packed,
    why_not_packed,
)
from softprompts.injection.placement import place_prompts
from softprompts.injection.sites import (
    Site,
    check_site,
    fill_cache,
    inject_at_layers,
    resolve_placement,
    split_by_layer,
)
from softprompts.types import Batch, Prompt

PATHS = ("packed", "shared", "concatenation")
"""How prompts can be computed: once, with all rows in one pass; once, through the cache; in every row."""

NeededTokens = Callable[[Tensor, Tensor], Tensor]
"""From the original column of each text token and the text mask, both [B, T] at the left edge, to the tokens [B, T]
whose last hidden states are needed."""


@dataclass(frozen=True)
class TrunkOutput:
    """The trunk's states for a batch, in a layout where nothing but `text_positions` shows the prompt.

    Of an encoder-decoder model it describes the decoder, and `encoder` the encoder.

    Attributes:
        hidden_states: [B, S, H], the last hidden states of the full rows.
        text_positions: [B, T], the position of each text token in them.
        token_order: [B, T], the original column of each text token, all at the left edge.
        text_mask: [B, T], true for text.
        end_positions: [B], the last position of each row's run, be it text or prompt.
        output: The trunk's own output.
        cache: The cache behind the text, on path `shared`; an encoder-decoder model's own.
        path: `packed`, `shared`, or `concatenation: ` and the reason.
        layer_states: Layer number -> its states, laid out as `hidden_states`.
        encoder: The same of the encoder.
        encoder_mask: [B, S'], true where the encoder's rows have prompt or text.
    """

    hidden_states: Tensor
    text_positions: Tensor
    token_order: Tensor
    text_mask: Tensor
    end_positions: Tensor
    output: Any
    cache: Any = None
    path: str = ""
    layer_states: dict[int, Tensor] = field(default_factory=dict)
    encoder: "TrunkOutput | None" = None
    encoder_mask: Tensor | None = None


@dataclass(frozen=True)
class _TrunkCall:
    """A call of `run_trunk` whose texts are at the left edge.

    Attributes:
        backbone: The frozen model.
        batch: attention_mask [B, T], inputs_embeds [B, T, H], token_type_ids and position_ids at the left edge, with
            the places of the prompts; everything else as the caller gave it.
        token_order: [B, T], the original column of each text token.
        prompt: The prompts of the rows.
        site: Where they enter.
        captured: Where hooks put the states of the layers that were asked for.
    """

    backbone: Backbone
    batch: Batch
    token_order: Tensor
    prompt: Prompt | None
    site: Site
    captured: CapturedStates

    @property
    def text_mask(self) -> Tensor:
        """[B, T], true for text."""
        return self.batch.attention_mask

    @property
    def text_embeddings(self) -> Tensor:
        """[B, T, H]."""
        assert self.batch.inputs_embeds is not None
        return self.batch.inputs_embeds

    def layer_states(self, side: str = "text") -> dict[int, Tensor]:
        """Layer number -> its captured states, of the encoder (or only stack), or of the decoder: `target`."""
        return {layer: states for (own_side, layer), states in self.captured.items() if own_side == side}


def run_trunk(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    *,
    path: str | None = None,
    prefix: Prefix | None = None,
    needed_tokens: NeededTokens | None = None,
    branches: Tensor | None = None,
    layers: Collection[int] = (),
) -> TrunkOutput:
    """Run the trunk on `batch` with `prompt` at `site`.

    Args:
        backbone: The frozen model.
        batch: The texts, padded on either side.
        prompt: The prompts of the rows; None: the stock model alone.
        site: Where they enter.
        path: One of PATHS; None: the best that is possible.
        prefix: The distinct prompts, computed before.
        needed_tokens: The text tokens whose last states are needed; None: all. Only path `packed` saves the others.
        branches: [B, T] on path `packed`: 0 for text, c for the c-th continuation, whose tokens follow all text.
        layers: Numbers of the layers whose states are asked for; 1 is the first.

    Raises:
        BackboneError: Prompt and text do not fit the model's positions, or the site or path is not possible.
    """
    check_layers(backbone, layers)
    with backbone.with_kernels(), capture(backbone, layers) as captured:
        check_site(backbone, site)
        token_order, text_mask, text_embeddings = align_texts(backbone, batch, prompt)
        placed = place_prompts(backbone, batch, site, prompt)
        encoder_prompt = prompt if backbone.family is not SEQ2SEQ or site.in_text else None
        if branches is None:
            check_room(backbone, text_mask, encoder_prompt)
        else:
            branches = branches.gather(1, token_order)
            check_branch_room(backbone, text_mask, branches, encoder_prompt)
        _check_position_ids(backbone, batch)
        aligned = replace(placed, attention_mask=text_mask, inputs_embeds=text_embeddings)
        if batch.token_type_ids is not None:
            aligned = replace(aligned, token_type_ids=batch.token_type_ids.gather(1, token_order))
        if batch.position_ids is not None:
            aligned = replace(aligned, position_ids=batch.position_ids.gather(1, token_order))
        call = _TrunkCall(backbone, aligned, token_order, prompt, site, captured)
        if backbone.family is SEQ2SEQ:
            _check_path(path)
            if path in ("packed", "shared"):
                raise BackboneError(
                    f"path '{path}' is not possible: an encoder's prompt sees the text; leave the path out"
                )
            return _run_encoder_decoder(call)
        path, reason = choose_path(backbone, aligned, prompt, site, path=path, prefix=prefix)
        if path == "concatenation":
            return _run_concatenated(call, reason)
        if path == "shared":
            return _run_shared(call, prefix)
        tokens = None if needed_tokens is None else needed_tokens(token_order, text_mask)
        assert prompt is not None
        packed = run_packed(
            backbone,
            aligned,
            prompt,
            site,
            prefix=prefix if prefix is not None and prefix.path == "packed" else None,
            needed_tokens=tokens,
            branches=branches,
        )
        return _packed_output(call, packed, branches)


def prefill(backbone: Backbone, prompt: Prompt, site: Site) -> tuple[Cache, Tensor | None]:
    """The cache of the U distinct prompts of a causal model, and the state [U, H] that scores the first text token.

    At site kv the cache is the prompt itself, and no state scores the first token (None).
    """
    cache = backbone.new_cache()
    if site.in_cache:
        fill_cache(cache, backbone, prompt)
        return cache, None
    values = prompt.values
    mask = prompt.mask.bool()
    inject_prompt: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if site.in_layers:
        slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask).where(mask, -1)
        each_once = replace(prompt, prompt_index=torch.arange(len(values), device=values.device))
        inject_prompt = inject_at_layers(backbone, each_once, slots, site.mode)
        values = split_by_layer(values, backbone)[0]
    with inject_prompt:
        output = backbone.trunk(
            inputs_embeds=values.to(backbone.dtype),
            attention_mask=mask.long(),
            **cache_argument(backbone.trunk, cache),
            **_position_argument(backbone, (mask.cumsum(1) - 1).clamp(min=0)),
        )
    return cache, output.last_hidden_state[:, -1]


def can_compute_prefix(backbone: Backbone, site: Site) -> bool:
    """Whether prompts can be computed before any text: they precede it, and the model has a cache."""
    precedes_text = backbone.family.scores_next_token and resolve_placement(backbone, site) == "first"
    return precedes_text and (site.in_cache or backbone.no_cache_reason is None)


def compute_prefix(backbone: Backbone, prompt: Prompt, site: Site) -> Prefix | None:
    """The distinct prompts computed once, for any number of batches; None where that is not possible."""
    check_site(backbone, site)
    if not can_compute_prefix(backbone, site):
        return None
    if backbone.kernels.path == "packed" and why_not_packed(backbone) is None:
        return packed_prefix(backbone, prompt, site)
    with backbone.with_kernels():
        cache, last_state = prefill(backbone, prompt, site)
    return Prefix((), prompt.mask.bool(), last_state, cache)


def choose_path(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    *,
    path: str | None = None,
    prefix: Prefix | None = None,
) -> tuple[str, str]:
    """How the prompts of `batch` are computed, `packed`, `shared` or `concatenation`, and the reason for the last.

    Args:
        backbone: A model that is no encoder-decoder.
        batch: With the places of the prompts.
        prompt: The prompts of the rows.
        site: Where they enter.
        path: The path that the caller asks for.
        prefix: The prompts, computed before, which are used where the caller asks for no path.

    Raises:
        BackboneError: The path that the caller asks for is not possible.
    """
    _check_path(path)
    reason = _why_concatenated(backbone, batch, prompt, site)
    if path is None and prefix is not None and reason is None:
        path = prefix.path
    if reason is not None or path == "concatenation":
        if path in ("packed", "shared"):
            raise BackboneError(f"path '{path}' is not possible: {reason}; leave the path out")
        if site.in_cache and reason is None:
            raise BackboneError("path 'concatenation' is not possible: keys and values are not tokens; leave it out")
        return "concatenation", reason or "asked for"
    if path == "packed" or (path is None and backbone.kernels.path == "packed"):
        unpackable = why_not_packed(backbone)
        if unpackable is None:
            return "packed", ""
        if path == "packed":
            raise BackboneError(f"path 'packed' is not possible: {unpackable}; leave the path out")
    every_row_apart = prompt is not None and len(prompt.values) >= len(prompt.prompt_index)
    if path is None and not site.in_cache and every_row_apart:
        return "concatenation", "every row has its own prompt"
    return "shared", ""


def _check_path(path: str | None) -> None:
    if path not in (None, *PATHS):
        raise BackboneError(f"path '{path}' is unknown; possible: {', '.join(PATHS)}")


def _why_concatenated(backbone: Backbone, batch: Batch, prompt: Prompt | None, site: Site) -> str | None:
    """None where the prompt's keys and values can be computed once and shared; else the reason why not."""
    if prompt is None:
        return "no prompt"
    if site.in_cache:
        return None
    if backbone.no_cache_reason:
        return backbone.no_cache_reason
    assert batch.prompt_offsets is not None
    if bool((batch.prompt_offsets > 0).any()):
        return "text comes before the prompt"
    return "a row has a prompt of no tokens" if bool((prompt.lengths[prompt.prompt_index] == 0).any()) else None


def _position_argument(backbone: Backbone, position_ids: Tensor) -> dict[str, Tensor]:
    return {"position_ids": position_ids} if "position_ids" in backbone.trunk_arguments else {}


def _check_position_ids(backbone: Backbone, batch: Batch) -> None:
    takes_positions = backbone.family.scores_next_token and "position_ids" in backbone.trunk_arguments
    if batch.position_ids is not None and not takes_positions:
        raise BackboneError(
            f"{type(backbone.model).__name__} counts positions itself, so positions cannot be given; leave them out"
        )


def _packed_output(call: _TrunkCall, packed: PackedOutput, branches: Tensor | None) -> TrunkOutput:
    """The output for rows that ran in one sequence without padding, behind the distinct prompts."""
    layer_states = {layer: packed.unpack_texts(states) for layer, states in call.layer_states().items()}
    text_output = _text_output(call, packed.text_states, packed.prompt_states, layer_states)
    text_output = replace(text_output, output=packed.output, path="packed")
    if branches is None:
        return text_output
    own_text = call.text_mask & (branches == 0)
    return replace(text_output, end_positions=_end_positions(own_text, packed.prompt_states))


def _run_shared(call: _TrunkCall, prefix: Prefix | None) -> TrunkOutput:
    """The texts of all rows behind a cache of the distinct prompts."""
    backbone = call.backbone
    prompt = call.prompt
    assert prompt is not None
    if prefix is None or prefix.cache is None:
        cache, last_state = prefill(backbone, prompt, call.site)
    else:
        cache = _extendable_copy(prefix.cache)
        last_state = prefix.last_state
    cache.batch_select_indices(prompt.prompt_index)
    prompt_mask = prompt.mask[prompt.prompt_index]
    if call.batch.position_ids is None:
        position_ids = torch.arange(call.text_mask.shape[1], device=call.text_mask.device)[None]
    else:
        position_ids = call.batch.position_ids
    # Padding may reach past the last position that the model has.
    position_ids = (position_ids + prompt.lengths[prompt.prompt_index][:, None]).where(call.text_mask, 0)
    output = backbone.trunk(
        inputs_embeds=call.text_embeddings,
        attention_mask=torch.cat([prompt_mask.bool(), call.text_mask], 1).long(),
        **cache_argument(backbone.trunk, cache),
        **_position_argument(backbone, position_ids),
    )
    text_output = _text_output(call, output.last_hidden_state, last_state, call.layer_states())
    return replace(text_output, output=output, cache=cache, path="shared")


def _extendable_copy(cache: Any) -> Any:
    """The same cache, to be extended: its layers put new tensors in place of the old ones and change none."""
    extendable = copy.copy(cache)
    extendable.layers = [copy.copy(layer) for layer in cache.layers]
    return extendable


def _text_output(
    call: _TrunkCall, text_states: Tensor, prompt_states: Tensor | None, layer_states: dict[int, Tensor]
) -> TrunkOutput:
    """The output for texts that ran behind prompts computed once.

    Args:
        call: The call.
        text_states: [B, T, H].
        prompt_states: [U, H], the state that scores the first text token of the rows; None: there is none.
        layer_states: Layer number -> states [B, T, H].
    """
    columns = torch.arange(call.text_mask.shape[1], device=call.text_mask.device)
    hidden_states = text_states
    text_positions = columns.expand_as(call.text_mask)
    if prompt_states is not None:
        assert call.prompt is not None
        hidden_states = torch.cat([prompt_states[call.prompt.prompt_index][:, None], text_states], 1)
        text_positions = text_positions + 1
        # Nobody looks at the prompt's position in inner layers.
        layer_states = {n: torch.nn.functional.pad(states, (0, 0, 1, 0)) for n, states in layer_states.items()}
    return TrunkOutput(
        hidden_states=hidden_states,
        text_positions=text_positions,
        token_order=call.token_order,
        text_mask=call.text_mask,
        end_positions=_end_positions(call.text_mask, prompt_states),
        output=None,
        layer_states=layer_states,
    )


def _end_positions(text_mask: Tensor, prompt_states: Tensor | None) -> Tensor:
    """The last position [B] of each text, behind the position of the prompt's state where there is one."""
    return (text_mask.sum(1) - 1 + int(prompt_states is not None)).clamp(min=0)


def _run_concatenated(call: _TrunkCall, reason: str) -> TrunkOutput:
    """Every row with its prompt among its text."""
    layout, output = _run_full_rows(call, call.prompt)
    return TrunkOutput(
        hidden_states=output.last_hidden_state,
        text_positions=layout.text_positions,
        token_order=call.token_order,
        text_mask=call.text_mask,
        end_positions=(layout.attention_mask.sum(1) - 1).clamp(min=0),
        output=output,
        path=f"concatenation: {reason}",
        layer_states=call.layer_states(),
    )


def _run_full_rows(call: _TrunkCall, prompt: Prompt | None) -> tuple[Layout, Any]:
    """Full rows and the encoder's (or only trunk's) output for them, deep prompts included."""
    backbone = call.backbone
    batch = call.batch
    assert batch.prompt_offsets is not None
    layout = layout_rows(call.text_mask, batch.prompt_offsets, prompt, segment_lengths=batch.segment_lengths)
    prompt_embeddings = None
    inject_prompt: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if prompt is not None and call.site.in_layers:
        prompt_embeddings = split_by_layer(prompt.values, backbone)[0]
        inject_prompt = inject_at_layers(backbone, prompt, layout.prompt_slots, call.site.mode)
    with inject_prompt:
        output = backbone.encoder(
            inputs_embeds=assemble_embeddings(call.text_embeddings, prompt, layout, prompt_embeddings),
            attention_mask=layout.attention_mask.long(),
            **_full_row_arguments(backbone, batch, layout),
        )
    return layout, output


def _full_row_arguments(backbone: Backbone, batch: Batch, layout: Layout) -> dict[str, Any]:
    """What the trunk gets besides embeddings and mask; an encoder-decoder model's encoder gets nothing."""
    arguments: dict[str, Any] = {}
    if backbone.family is SEQ2SEQ:
        return arguments
    names = backbone.trunk_arguments
    if backbone.family.scores_next_token:
        if "use_cache" in names:
            arguments["use_cache"] = False
        if "position_ids" in names:
            arguments["position_ids"] = _full_row_positions(batch, layout)
    elif batch.token_type_ids is not None and "token_type_ids" in names:
        arguments["token_type_ids"] = _full_row_token_types(batch.token_type_ids, layout)
    return arguments


def _full_row_token_types(token_type_ids: Tensor, layout: Layout) -> Tensor:
    """Types [B, S] of full rows: a prompt token has that of the text token before it, and 0 before the text."""
    prompt_types = torch.nn.functional.pad(token_type_ids, (1, 0)).gather(1, layout.text_before_prompt)
    return torch.cat([prompt_types, token_type_ids], 1).gather(1, layout.gather_index)


def _full_row_positions(batch: Batch, layout: Layout) -> Tensor:
    """Positions [B, S] of full rows: counted from the run's beginning, or the caller's with the prompt between."""
    if batch.position_ids is None:
        return layout.position_ids
    # A prompt token follows the text token before it, and all prompt tokens so far have taken a position.
    before_prompt = torch.nn.functional.pad(batch.position_ids, (1, 0), value=-1).gather(1, layout.text_before_prompt)
    prompt_tokens_so_far = (layout.prompt_slots >= 0).long().cumsum(1)
    positions = torch.cat([before_prompt, batch.position_ids], 1).gather(1, layout.gather_index)
    return (positions + prompt_tokens_so_far).where(layout.attention_mask, 0)


def _run_encoder_decoder(call: _TrunkCall) -> TrunkOutput:
    """The encoder over full rows, then the decoder; the prompt enters one of them."""
    backbone = call.backbone
    in_encoder = call.site.in_text
    layout, encoder_output = _run_full_rows(call, call.prompt if in_encoder else None)
    encoder = TrunkOutput(
        hidden_states=encoder_output.last_hidden_state,
        text_positions=layout.text_positions,
        token_order=call.token_order,
        text_mask=call.text_mask,
        end_positions=layout.attention_mask.sum(1) - 1,
        output=encoder_output,
        layer_states=call.layer_states("text"),
    )
    tokens = decoder_input(backbone, call.batch, call.token_order, call.text_mask)
    decoded = decode(
        backbone,
        tokens,
        encoder_states=encoder.hidden_states,
        encoder_mask=layout.attention_mask,
        prompt=None if in_encoder else call.prompt,
        site=call.site,
    )
    return TrunkOutput(
        hidden_states=decoded.output.last_hidden_state,
        text_positions=decoded.text_positions,
        token_order=tokens.token_order,
        text_mask=tokens.mask,
        end_positions=decoded.end_positions,
        output=decoded.output,
        cache=output_cache(decoded.output),
        path="concatenation: an encoder's prompt sees the text",
        layer_states=call.layer_states("target"),
        encoder=encoder,
        encoder_mask=layout.attention_mask,
    )
