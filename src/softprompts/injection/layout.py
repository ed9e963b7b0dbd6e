"""Full rows `[prompt|text|pad]` or `[pad|prompt|text]`: one unbroken run each, by index arithmetic alone.

The prompt may stand anywhere in the text, in one piece or in several segments.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompts.types import Prompt


@dataclass(frozen=True)
class Layout:
    """Full rows as unbroken runs: `source [B, S]` indexes `[prompt | text]`, mask [B, S], position [B, T] of the text.

    slot [B, S] is the prompt token at a position, -1 where there is none; ids [B, S] counts positions from the run's
    beginning; before [B, P] is how many text tokens stand before each prompt token, and `passed [B, T]` how many prompt
    tokens stand before each text token.
    """

    gather_index: Tensor
    attention_mask: Tensor
    text_positions: Tensor
    prompt_slots: Tensor
    position_ids: Tensor
    text_before_prompt: Tensor
    prompt_before_text: Tensor


def layout_rows(
    mask: Tensor, place: Tensor, prompt: Prompt | None, left: bool = False, segments: Tensor | None = None
) -> Layout:
    """Lay `[prompt | text]` out as one unbroken run a row, padded on the right, or on the `left` to generate.

    mask [B, T] of packed text; place [B] text tokens that stand before the prompt, or [B, S] before each of its
    segments, never falling; segments [B, S] prompt tokens of each, which sum to the row's prompt (None: the first
    place has all).
    """
    rows, columns = mask.shape
    there = mask.new_zeros(rows, 0, dtype=torch.bool) if prompt is None else prompt.mask[prompt.prompt_index].bool()
    slots = there.shape[1]
    rank = there.long().cumsum(1) - 1
    before = _before(place.reshape(rows, -1), segments, rank)
    total = mask.sum(1) + there.sum(1)
    size = int(total.max())
    start = (size - total)[:, None] if left else torch.zeros_like(total)[:, None]
    step = torch.arange(size, device=mask.device)[None] - start
    valid = (step >= 0) & (step < total[:, None])
    column = torch.arange(columns, device=mask.device).expand(rows, -1).contiguous()
    # Places never fall, and what pads a short prompt stands before all of it, so both are sorted.
    ahead = torch.searchsorted(before.masked_fill(~there, -1), column, right=True)
    passed = ahead - (~there).sum(1, keepdim=True)
    position = column + passed + start
    both = torch.cat([before + rank + start, position], 1).where(torch.cat([there, mask.bool()], 1), size)
    index = torch.arange(slots + columns, device=mask.device).expand(rows, -1)
    # Padding takes a text token, which has no gradient; the last column takes what is no token.
    spare = torch.full((rows, size + 1), max(slots + columns - 1, 0), device=mask.device)
    source = spare.scatter(1, both, index)[:, :size]
    slot = source.where(valid & (source < slots), -1)
    return Layout(source, valid, position.clamp(max=size - 1), slot, step.clamp(min=0), before, passed)


def _before(place: Tensor, segments: Tensor | None, rank: Tensor) -> Tensor:
    """Text tokens before each prompt token [B, P], which is the `rank [B, P]`-th of its row's prompt."""
    if segments is None:
        return place[:, :1].expand_as(rank).contiguous()
    segment = torch.searchsorted(segments.cumsum(1), rank, right=True).clamp(max=place.shape[1] - 1)
    return place.gather(1, segment)


def assemble_embeddings(text: Tensor, prompt: Prompt | None, where: Layout, first: Tensor | None = None) -> Tensor:
    """Embeddings [B, S, features] of full rows: `first [U, P, features]` (default the prompt's values) and text."""
    if prompt is None:
        both = text
    else:
        values = prompt.values if first is None else first
        both = torch.cat([values.to(text.dtype)[prompt.prompt_index], text], 1)
    return both.gather(1, where.gather_index[..., None].expand(-1, -1, both.shape[2]))


def add_delta(text: Tensor, mask: Tensor, prompt: Prompt | None) -> Tensor:
    """Embeddings `text [B, T, H]` of packed texts, mask [B, T], with what `prompt` adds to the first tokens of each.

    Padding and what lies beyond the reach stay as they are to the bit.
    """
    if prompt is None or prompt.embedding_delta is None:
        return text
    size = text.shape[1]
    values = torch.nn.functional.pad(
        prompt.embedding_delta.values, (0, 0, 0, size - prompt.embedding_delta.values.shape[1])
    )
    here = mask.bool() & (torch.arange(size, device=mask.device) < prompt.embedding_delta.reach[:, None])
    return torch.where(here[..., None], text + values[prompt.prompt_index], text).to(text.dtype)


def trim_padding(prompt: Prompt) -> Prompt:
    """The same prompt without slots that no row of the batch fills."""
    spare = prompt.values.shape[1] - int(prompt.lengths[prompt.prompt_index].max())
    return replace(prompt, values=prompt.values[:, spare:], mask=prompt.mask[:, spare:])
