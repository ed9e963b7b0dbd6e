"""How many text tokens precede the prompt in each row: as the batch says, or else as the site does."""

from dataclasses import replace

import torch
from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.errors import BackboneError
from softprompts.injection.sites import Site, resolve_placement
from softprompts.types import IGNORE, Batch, Prompt, mask_before_labels


def prompt_offsets(backbone: Backbone, placement: str, text_lengths: Tensor, unlabeled_lengths: Tensor) -> Tensor:
    """How many text tokens precede a prompt with this placement: [B].

    Args:
        backbone: The frozen model.
        placement: first: none; after_start: the first token; suffix: in causal models all before the first label, in
            encoders that put a special token at either end all but the last, in others all.
        text_lengths: [B], tokens in each text.
        unlabeled_lengths: [B], tokens before the first label, where the model scores its own text; else `text_lengths`.

    Raises:
        BackboneError: The placement is `template`: only the encoder of the text knows where its slots are.
    """
    if placement == "first":
        return torch.zeros_like(text_lengths)
    if placement == "after_start":
        return text_lengths.clamp(max=1)
    if placement == "suffix":
        return (unlabeled_lengths - int(backbone.family.default_placement == "after_start")).clamp(min=0)
    raise BackboneError(
        "the template has slots for the prompt, and the batch does not say where they are; encode rows with the "
        "task's ExampleTokenizer, or give Batch.prompt_offsets (SoftPromptModel: prompt_places), text tokens before "
        "each slot"
    )


def place_prompts(backbone: Backbone, batch: Batch, site: Site, prompt: Prompt | None) -> Batch:
    """The same batch with `prompt_offsets [B, G]` and, where the prompt has G > 1 segments, `segment_lengths [B, G]`.

    Raises:
        BackboneError: Offsets lie outside the text or fall, text precedes a prompt whose site allows none, or the
            segments do not sum to the prompt.
    """
    if prompt is None:
        return _at_the_front(batch)
    if not site.in_text:
        if batch.prompt_offsets is not None and bool((batch.prompt_offsets > 0).any()):
            raise BackboneError(
                f"a prompt at site '{site.name}' comes before everything, but the rows put text before it (slots in "
                f"the template, chat_placement: user, Batch.prompt_offsets); leave that out, or use site 'input' or "
                f"'layers'"
            )
        return _at_the_front(batch)
    text_mask = batch.attention_mask.bool()
    text_lengths = text_mask.sum(1)
    if batch.prompt_offsets is None:
        unlabeled_lengths = _unlabeled_lengths(backbone, batch, text_mask)
        placement = resolve_placement(backbone, site)
        offsets = prompt_offsets(backbone, placement, text_lengths, unlabeled_lengths)[:, None]
    else:
        offsets = batch.prompt_offsets.reshape(len(text_lengths), -1)
    if bool(((offsets < 0) | (offsets > text_lengths[:, None])).any()):
        raise BackboneError(
            f"places {offsets.squeeze(1).tolist()} do not all lie within texts of {text_lengths.tolist()} tokens"
        )
    if offsets.shape[1] > 1 and bool((offsets.diff(dim=1) < 0).any()):
        raise BackboneError(f"places {offsets.tolist()} must not decrease: a prompt's segments come in order")
    segment_lengths = batch.segment_lengths
    if segment_lengths is None and site.segments:
        segment_lengths = torch.tensor(site.segments, device=offsets.device).expand(len(offsets), -1)
    _check_segments(offsets, segment_lengths, prompt)
    return replace(batch, prompt_offsets=offsets, segment_lengths=segment_lengths)


def _at_the_front(batch: Batch) -> Batch:
    offsets = torch.zeros_like(batch.attention_mask[:, :1], dtype=torch.long)
    return replace(batch, prompt_offsets=offsets, segment_lengths=None)


def _unlabeled_lengths(backbone: Backbone, batch: Batch, text_mask: Tensor) -> Tensor:
    """Text tokens before the first label [B]; all text tokens where the model does not score its own text."""
    labels = batch.labels if backbone.head == "lm" and backbone.family.scores_next_token else None
    if labels is not None:
        labels = labels.masked_fill(~text_mask, IGNORE)
    return mask_before_labels(text_mask.long(), labels).sum(1)


def _check_segments(offsets: Tensor, segment_lengths: Tensor | None, prompt: Prompt) -> None:
    """Raise BackboneError unless each offset has a segment, and the segments of a row sum to its prompt."""
    if segment_lengths is None:
        if offsets.shape[1] > 1:
            raise BackboneError(
                f"{offsets.shape[1]} places are given, and nothing says how many prompt tokens each has; give "
                f"Batch.segment_lengths, or the site's segments"
            )
        return
    if segment_lengths.shape != offsets.shape:
        raise BackboneError(
            f"{segment_lengths.shape[1]} segments of the prompt, but {offsets.shape[1]} places; give one place for each"
        )
    prompt_lengths = prompt.lengths[prompt.prompt_index]
    slots = prompt.values.shape[1]
    total = segment_lengths.sum(1)
    # A prompt that is shorter for a short text fills the segments in their order, as far as it reaches.
    is_short = (prompt_lengths < slots) & (total > prompt_lengths) & (total <= slots)
    is_wrong = (segment_lengths < 0).any(1) | (total != prompt_lengths) & ~is_short
    if bool(is_wrong.any()):
        row = int(is_wrong.nonzero()[0, 0])
        raise BackboneError(
            f"segments of {segment_lengths[row].tolist()} prompt tokens do not sum to the prompt's "
            f"{int(prompt_lengths[row])}"
        )
