"""The sites: how wide a prompt is there, which families have them, and how layers and caches receive a deep prompt."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.backbone.cache import Cache
from softprompts.errors import BackboneError
from softprompts.types import Prompt, PromptSpec

PLACEMENTS = ("auto", "first", "after_start", "suffix", "template")
"""Where in its row a prompt may be; `auto` is what is usual for the family, `template` the slots of the text."""


@dataclass(frozen=True)
class Site:
    """Where a prompt enters the frozen model. Only this class knows what the name of a site means.

    Attributes:
        name: input, decoder, layers or kv; the table in `injection/__init__.py` explains them.
        mode: At site layers, whether the prompt replaces the hidden states or is added to them: replace, add.
        placement: Where in the row the prompt is, one of PLACEMENTS; template: in the slots of the text.
        segments: Number of prompt tokens in each slot of the text; empty: one slot holds them all, or the batch says.
    """

    name: str = "input"
    mode: str = "replace"
    placement: str = "auto"
    segments: tuple[int, ...] = ()

    @property
    def at_embeddings(self) -> bool:
        """Whether a prompt token is one vector beside word embeddings: D is the embedding size (input, decoder)."""
        return self.name in ("input", "decoder")

    @property
    def at_decoder_input(self) -> bool:
        """Whether the prompt precedes the input of the decoder in an encoder-decoder model (decoder)."""
        return self.name == "decoder"

    @property
    def in_layers(self) -> bool:
        """Whether the prompt enters the hidden states before every layer (layers)."""
        return self.name == "layers"

    @property
    def in_cache(self) -> bool:
        """Whether the prompt is keys and values that every layer finds in its cache (kv)."""
        return self.name == "kv"

    @property
    def in_text(self) -> bool:
        """Whether the prompt takes positions in the row of the text, so that text may precede it (input, layers)."""
        return self.name in ("input", "layers")

    @property
    def scores_first_token(self) -> bool:
        """Whether the last prompt token has a state, which scores a first text token behind it (all but kv)."""
        return not self.in_cache


def prompt_width(backbone: Backbone, site: Site) -> int:
    """The prompt width D of `site` on this backbone.

    Raises:
        BackboneError: The family does not have the site; the message names those it has.
    """
    check_site(backbone, site)
    return backbone.embedding_size if site.at_embeddings else sum(_layer_widths(backbone, site))


def _layer_widths(backbone: Backbone, site: Site) -> tuple[int, ...]:
    """The width of each layer's part of a deep prompt; empty at sites without layers."""
    if site.in_layers:
        return (_layer_input_size(backbone),) * len(backbone.layers)
    if site.in_cache:
        return tuple(2 * heads * head_dim for heads, head_dim in backbone.kv_shapes)
    return ()


def _layer_input_size(backbone: Backbone) -> int:
    """The width of the hidden states that the layers of the stack with the prompt receive."""
    return int(getattr(backbone.config, "d_model", None) or backbone.hidden_size)


def prompt_spec(backbone: Backbone, site: Site, length: int, encoders: Mapping[str, int] | None = None) -> PromptSpec:
    """The shape that a method's prompt must have at `site`.

    Args:
        backbone: The frozen model.
        site: Where the prompt enters.
        length: Number of prompt tokens P.
        encoders: Name and vector width of each frozen encoder of whole texts, besides the backbone.

    Raises:
        BackboneError: The family does not have the site, or a prompt of this length leaves no room for text.
    """
    if backbone.max_positions is not None and length >= backbone.max_positions:
        raise BackboneError(
            f"a prompt of {length} tokens leaves no room for text: {backbone.name or 'the model'} takes "
            f"{backbone.max_positions} positions; choose a shorter prompt"
        )
    width = prompt_width(backbone, site)
    pool = "mean"
    if backbone.family.scores_next_token:
        pool = "last"
    elif backbone.family.default_placement == "after_start":
        pool = "first"
    return PromptSpec(
        length=length,
        width=width,
        embedding_size=backbone.embedding_size,
        vocab_size=backbone.vocab_size,
        layers=_layer_widths(backbone, site),
        encoders={"backbone": backbone.output_size, **(encoders or {})},
        pool=pool,
    )


def check_site(backbone: Backbone, site: Site) -> None:
    """Raise BackboneError unless the backbone has this site, mode and placement."""
    family = backbone.family
    if site.name not in family.sites:
        hint = "; 'layers' puts a prompt at every layer of a model without a cache" if site.in_cache else ""
        raise BackboneError(
            f"site '{site.name}' is not possible for {family.name} models; possible: {', '.join(family.sites)}{hint}"
        )
    if site.in_cache and family.scores_next_token and backbone.no_cache_reason:
        raise BackboneError(f"site 'kv' needs a key-value cache, but {backbone.no_cache_reason}; use site 'input'")
    if not site.in_text and family is SEQ2SEQ and backbone.head != "lm":
        raise BackboneError(f"site '{site.name}' needs a language model head; use site 'input' or 'layers'")
    if site.mode not in ("replace", "add"):
        raise BackboneError(f"mode '{site.mode}' is unknown; possible: replace, add")
    if site.placement not in PLACEMENTS:
        raise BackboneError(f"placement '{site.placement}' is unknown; possible: {', '.join(PLACEMENTS)}")
    if not site.in_text and site.placement not in ("auto", "first"):
        advice = "use 'first'"
        if site.placement == "template":
            advice = "take <prompt> out of the template, or use site 'input'"
        raise BackboneError(
            f"placement '{site.placement}' is not possible at site '{site.name}', where nothing can come before the "
            f"prompt; {advice}"
        )
    if site.in_layers and len(backbone.layers) and backbone.embedding_size != _layer_input_size(backbone):
        raise BackboneError(
            f"{type(backbone.model).__name__} embeds in {backbone.embedding_size} dimensions and works in "
            f"{_layer_input_size(backbone)}: site 'layers' has no place for its first part; use site 'input'"
        )


def resolve_placement(backbone: Backbone, site: Site) -> str:
    """The placement of `site`; where that is `auto`, the usual one of this backbone: `first` or `after_start`."""
    if site.placement != "auto":
        return site.placement
    return backbone.family.default_placement if site.in_text else "first"


def split_by_layer(values: Tensor, backbone: Backbone) -> Tensor:
    """A deep prompt of hidden states [U, P, L*H] as [L, U, P, H]."""
    return values.unflatten(-1, (len(backbone.layers), -1)).permute(2, 0, 1, 3)


@contextlib.contextmanager
def inject_at_layers(backbone: Backbone, prompt: Prompt, prompt_slots: Tensor, mode: str) -> Iterator[None]:
    """Inside, the prompt enters the input of every layer but the first, whose part the embeddings hold.

    Runs of another length (decoding steps) pass untouched. Rows that `generate` repeats for beams are repeated here.

    Args:
        backbone: The frozen model.
        prompt: The prompt of site layers; values [U, P, L*H].
        prompt_slots: [B, S], the prompt token at each position of the rows that will run, -1 where there is none.
        mode: replace: the prompt overwrites the hidden states; add: it is added to them.
    """
    layer_values = split_by_layer(prompt.values, backbone)[:, prompt.prompt_index]  # [L, B, P, H]
    is_prompt = prompt_slots >= 0
    slot_index = prompt_slots.clamp(min=0)[..., None].expand(-1, -1, layer_values.shape[-1])

    def hook_of(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if states.shape[1] != prompt_slots.shape[1]:
                return None
            beams = states.shape[0] // prompt_slots.shape[0]
            values = layer_values[layer].gather(1, slot_index).to(states.dtype).repeat_interleave(beams, 0)
            inside = is_prompt.repeat_interleave(beams, 0)[..., None]
            states = torch.where(inside, values if mode == "replace" else states + values, states)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return hook

    handles = []
    for index, layer in enumerate(backbone.layers):
        if index > 0:
            handles.append(layer.register_forward_pre_hook(hook_of(index), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def split_keys_values(values: Tensor, backbone: Backbone) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's keys and values [U, heads, P, head_dim] of a kv prompt [U, P, D], in the model's dtype."""
    start = 0
    for heads, head_dim in backbone.kv_shapes:
        end = start + 2 * heads * head_dim
        layer_part = values[..., start:end].to(backbone.dtype)
        keys, layer_values = layer_part.unflatten(-1, (2, heads, head_dim)).permute(2, 0, 3, 1, 4)
        yield keys, layer_values
        start = end


def fill_cache(cache: Cache, backbone: Backbone, prompt: Prompt) -> None:
    """Put a kv prompt's keys and values [U, P, D] into an empty `cache`, layer by layer."""
    for layer, (keys, values) in enumerate(split_keys_values(prompt.values, backbone)):
        cache.update(keys, values, layer)
