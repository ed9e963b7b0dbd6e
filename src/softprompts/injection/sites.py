"""The sites: how wide a prompt is there, which families have them, and how deep prompts and caches are filled."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.errors import BackboneError
from softprompts.types import Prompt, PromptSpec


@dataclass(frozen=True)
class Site:
    """Where a prompt enters: name (input, decoder, layers, kv), mode (layers: replace, add), place in the row.

    place: auto, first, after_start, suffix, or template: in slots of the text, with `segments` prompt tokens each
    (none: in one slot, or as the batch says).
    """

    name: str = "input"
    mode: str = "replace"
    place: str = "auto"
    segments: tuple[int, ...] = ()


PLACES = ("auto", "first", "after_start", "suffix", "template")


def prompt_width(backbone: Backbone, site: Site) -> int:
    """The prompt width D of `site` on this backbone.

    Raises BackboneError for a site that the family does not have, naming those it has.
    """
    check_site(backbone, site)
    return sum(_parts(backbone, site)) if site.name in ("layers", "kv") else backbone.embedding_size


def _parts(backbone: Backbone, site: Site) -> tuple[int, ...]:
    """The widths of each layer's part of a deep prompt; none at sites without layers."""
    if site.name == "layers":
        return (_layer_width(backbone),) * len(backbone.layers)
    return tuple(2 * heads * size for heads, size in backbone.kv_shapes) if site.name == "kv" else ()


def prompt_spec(
    backbone: Backbone, site: Site, tasks: tuple[str, ...], length: int, encoders: Mapping[str, int] | None = None
) -> PromptSpec:
    """What a method must fill at `site`; `encoders`: widths of what encoders beside the backbone make of whole texts.

    Raises BackboneError as `width` does, and when `length` leaves no room for text.
    """
    if backbone.max_positions is not None and length >= backbone.max_positions:
        raise BackboneError(
            f"a prompt of {length} tokens leaves no room for text: {backbone.name or 'the model'} takes "
            f"{backbone.max_positions} positions; choose a shorter prompt"
        )
    wide = prompt_width(backbone, site)
    family = backbone.family
    pool = "last" if family.scores_next_token else "first" if family.default_place == "after_start" else "mean"
    readers = {"backbone": backbone.output_size, **(encoders or {})}
    return PromptSpec(
        tasks, length, wide, backbone.embedding_size, backbone.vocab_size, _parts(backbone, site), readers, pool
    )


def check_site(backbone: Backbone, site: Site) -> None:
    """Raise BackboneError unless the backbone has this site, mode and place."""
    family = backbone.family
    if site.name not in family.sites:
        hint = "; 'layers' puts a prompt at every layer of a model without a cache" if site.name == "kv" else ""
        raise BackboneError(
            f"site '{site.name}' is not possible for {family.name} models; possible: {', '.join(family.sites)}{hint}"
        )
    if site.name == "kv" and family.scores_next_token and backbone.no_cache_reason:
        raise BackboneError(f"site 'kv' needs a key-value cache, but {backbone.no_cache_reason}; use site 'input'")
    if site.name in ("kv", "decoder") and family is SEQ2SEQ and backbone.head != "lm":
        raise BackboneError(f"site '{site.name}' needs a language model head; use site 'input' or 'layers'")
    if site.mode not in ("replace", "add"):
        raise BackboneError(f"mode '{site.mode}' is unknown; possible: replace, add")
    if site.place not in PLACES:
        raise BackboneError(f"place '{site.place}' is unknown; possible: {', '.join(PLACES)}")
    if site.name in ("kv", "decoder") and site.place not in ("auto", "first"):
        advice = "take <prompt> out of the template, or use site 'input'" if site.place == "template" else "use 'first'"
        raise BackboneError(
            f"place '{site.place}' is not possible at site '{site.name}', where nothing can stand before the prompt; "
            f"{advice}"
        )
    if site.name == "layers" and len(backbone.layers) and backbone.embedding_size != _layer_width(backbone):
        raise BackboneError(
            f"{type(backbone.model).__name__} embeds in {backbone.embedding_size} dimensions and works in "
            f"{_layer_width(backbone)}: site 'layers' has no place for its first part; use site 'input'"
        )


def resolve_place(backbone: Backbone, site: Site) -> str:
    """The site's place, where that is `auto` what it means for this backbone: `first` or `after_start`."""
    if site.place != "auto":
        return site.place
    return backbone.family.default_place if site.name in ("input", "layers") else "first"


def split_by_layer(values: Tensor, backbone: Backbone) -> Tensor:
    """A deep prompt [U, P, L*H] as [L, U, P, H]."""
    return values.unflatten(-1, (len(backbone.layers), -1)).permute(2, 0, 1, 3)


@contextlib.contextmanager
def inject_at_layers(backbone: Backbone, prompt: Prompt, slots: Tensor, mode: str) -> Iterator[None]:
    """Inside, each layer's input on the prompt's positions is overwritten by, or gets added, its part of the prompt.

    slots [B, S] is the prompt token at each position of the sequences that will be run, -1 elsewhere. Layer 0 is left
    to the embeddings. Runs of another length (decoding steps) pass untouched; rows repeated for beams are repeated
    here too.
    """
    parts = split_by_layer(prompt.values, backbone)[:, prompt.prompt_index]  # [L, B, P, H]
    here = slots >= 0
    index = slots.clamp(min=0)[..., None].expand(-1, -1, parts.shape[-1])

    def hook(layer: int) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            if states.shape[1] != slots.shape[1]:
                return None
            times = states.shape[0] // slots.shape[0]
            value = parts[layer].gather(1, index).to(states.dtype).repeat_interleave(times, 0)
            inside = here.repeat_interleave(times, 0)[..., None]
            states = torch.where(inside, value if mode == "replace" else states + value, states)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return enter

    handles = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(backbone.layers) if i > 0
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def split_keys_values(values: Tensor, backbone: Backbone) -> Iterator[tuple[Tensor, Tensor]]:
    """A kv prompt [U, P, D] as each layer's keys and values [U, heads, P, d], in the model's number format."""
    before = 0
    for heads, size in backbone.kv_shapes:
        part = values[..., before : before + 2 * heads * size].to(backbone.dtype)
        keys, own = part.unflatten(-1, (2, heads, size)).permute(2, 0, 3, 1, 4)
        yield keys, own
        before += 2 * heads * size


def fill_cache(cache: Cache, backbone: Backbone, prompt: Prompt) -> None:
    """Put a kv prompt's keys and values [U, P, D] into an empty `cache`, layer by layer."""
    for index, (keys, values) in enumerate(split_keys_values(prompt.values, backbone)):
        cache.update(keys, values, index)


def _layer_width(backbone: Backbone) -> int:
    return int(getattr(backbone.config, "d_model", None) or backbone.hidden_size)
