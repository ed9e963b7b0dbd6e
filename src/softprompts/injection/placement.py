"""Where in each row the prompt stands: as the batch says, or else as the site does."""

from dataclasses import replace

import torch
from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.errors import BackboneError
from softprompts.injection.sites import Site, resolve_place
from softprompts.types import IGNORE, Batch, Prompt, mask_before_labels


def prompt_offsets(backbone: Backbone, place: str, texts: Tensor, free: Tensor) -> Tensor:
    """How many of `texts [B]` text tokens stand before a prompt at `place`: [B].

    free [B]: text tokens before the first label, where the model scores its own text; else as `texts`.
    first: none; after_start: the first; suffix: in causal models all before the first label, in encoders that put a
    special token at either end all but the last, in others all.
    Raises BackboneError for `template`: only who encodes the text knows where the slots in it are.
    """
    if place == "first":
        return torch.zeros_like(texts)
    if place == "after_start":
        return texts.clamp(max=1)
    if place == "suffix":
        return (free - int(backbone.family.default_place == "after_start")).clamp(min=0)
    raise BackboneError(
        "the prompt stands in slots of the template, and the batch does not say where these are; encode rows with the "
        "task's Encoder, or give Batch.place (SoftPromptModel: prompt_places), text tokens before each slot"
    )


def place_prompts(backbone: Backbone, batch: Batch, site: Site, prompt: Prompt | None) -> Batch:
    """The same batch with `place [B, S]` and, where the prompt has several segments, `segments [B, S]`.

    Raises BackboneError for places outside the text or that fall, where the site has no place behind text, and for
    segments that are not the prompt's.
    """
    front = torch.zeros_like(batch.attention_mask[:, :1], dtype=torch.long)
    if prompt is None:
        return replace(batch, prompt_offsets=front, segment_lengths=None)
    if site.name not in ("input", "layers"):
        if batch.prompt_offsets is not None and bool((batch.prompt_offsets > 0).any()):
            raise BackboneError(
                f"a prompt at site '{site.name}' stands before everything, but the rows put text before it (slots in "
                f"the template, chat_place: user, Batch.place); leave that out, or use site 'input' or 'layers'"
            )
        return replace(batch, prompt_offsets=front, segment_lengths=None)
    mask = batch.attention_mask.bool()
    texts = mask.sum(1)
    if batch.prompt_offsets is None:
        own = batch.labels if backbone.head == "lm" and backbone.family.scores_next_token else None
        free = mask_before_labels(mask.long(), None if own is None else own.masked_fill(~mask, IGNORE)).sum(1)
        place = prompt_offsets(backbone, resolve_place(backbone, site), texts, free)[:, None]
    else:
        place = batch.prompt_offsets.reshape(len(texts), -1)
    if bool(((place < 0) | (place > texts[:, None])).any()):
        raise BackboneError(
            f"places {place.squeeze(1).tolist()} do not all lie within texts of {texts.tolist()} tokens"
        )
    if place.shape[1] > 1 and bool((place.diff(dim=1) < 0).any()):
        raise BackboneError(f"places {place.tolist()} must not fall: a prompt's segments stand in their order")
    segments = batch.segment_lengths
    if segments is None and site.segments:
        segments = torch.tensor(site.segments, device=place.device).expand(len(place), -1)
    _check_segments(place, segments, prompt)
    return replace(batch, prompt_offsets=place, segment_lengths=segments)


def _check_segments(place: Tensor, segments: Tensor | None, prompt: Prompt) -> None:
    if segments is None:
        if place.shape[1] > 1:
            raise BackboneError(
                f"{place.shape[1]} places are given, and nothing says how many prompt tokens each has; give "
                f"Batch.segments, or the site's segments"
            )
        return
    if segments.shape != place.shape:
        raise BackboneError(
            f"{segments.shape[1]} segments of the prompt, but {place.shape[1]} places; give one place for each"
        )
    # A prompt that is shorter for a short text fills the segments in their order, as far as it goes.
    lengths, total = prompt.lengths[prompt.prompt_index], segments.sum(1)
    short = (lengths < prompt.values.shape[1]) & (total > lengths) & (total <= prompt.values.shape[1])
    wrong = (segments < 0).any(1) | (total != lengths) & ~short
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise BackboneError(
            f"segments of {segments[row].tolist()} prompt tokens do not sum to the prompt's {int(lengths[row])}"
        )
