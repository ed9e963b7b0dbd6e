"""Full rows `[prompt|text|pad]` or `[pad|prompt|text]`: one unbroken run each, by index arithmetic alone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompts.prompt import Prompt


@dataclass(frozen=True)
class Layout:
    """Full rows as unbroken runs: `source [B, S]` indexes `[prompt | text]`, mask [B, S], position [B, T] of the text.

    slot [B, S] is the prompt token at a position, -1 where there is none; ids [B, S] counts positions from the run's
    beginning.
    """

    source: Tensor
    mask: Tensor
    position: Tensor
    slot: Tensor
    ids: Tensor


def layout(mask: Tensor, place: Tensor, prompt: Prompt | None, left: bool = False) -> Layout:
    """Lay `[prompt | text]` out as one unbroken run a row, padded on the right, or on the `left` to generate.

    mask [B, T] of packed text; place [B] text tokens that stand before the prompt.
    """
    texts = mask.sum(1)
    slots = 0 if prompt is None else prompt.values.shape[1]
    lengths = torch.zeros_like(texts) if prompt is None else prompt.lengths[prompt.row]
    total = texts + lengths
    size = int(total.max())
    start = (size - total)[:, None] if left else torch.zeros_like(total)[:, None]
    step = torch.arange(size, device=mask.device)[None] - start
    p, q = lengths[:, None], place[:, None]
    valid = (step >= 0) & (step < total[:, None])
    in_prompt = valid & (step >= q) & (step < q + p)
    slot_index = torch.where(in_prompt, slots - p + step - q, -1)
    text_index = torch.where(step < q, step, step - p).clamp(0, mask.shape[1] - 1)
    source = torch.where(in_prompt, slot_index, slots + text_index)
    column = torch.arange(mask.shape[1], device=mask.device)[None]
    position = (column + torch.where(column >= q, p, 0) + start).clamp(max=size - 1)
    return Layout(source, valid, position, slot_index, step.clamp(min=0))


def assemble(text: Tensor, prompt: Prompt | None, where: Layout, first: Tensor | None = None) -> Tensor:
    """Embeddings [B, S, features] of full rows: `first [U, P, features]` (default the prompt's values) and text."""
    if prompt is None:
        both = text
    else:
        values = prompt.values if first is None else first
        both = torch.cat([values.to(text.dtype)[prompt.row], text], 1)
    return both.gather(1, where.source[..., None].expand(-1, -1, both.shape[2]))


def with_added(text: Tensor, mask: Tensor, prompt: Prompt | None) -> Tensor:
    """Embeddings `text [B, T, H]` of packed texts, mask [B, T], with what `prompt` adds to the first tokens of each.

    Padding and what lies beyond the reach stay as they are to the bit.
    """
    if prompt is None or prompt.added is None:
        return text
    size = text.shape[1]
    values = torch.nn.functional.pad(prompt.added.values, (0, 0, 0, size - prompt.added.values.shape[1]))
    here = mask.bool() & (torch.arange(size, device=mask.device) < prompt.added.reach[:, None])
    return torch.where(here[..., None], text + values[prompt.row], text).to(text.dtype)


def tight(prompt: Prompt) -> Prompt:
    """The same prompt without slots that no row of the batch fills."""
    spare = prompt.values.shape[1] - int(prompt.lengths[prompt.row].max())
    return replace(prompt, values=prompt.values[:, spare:], mask=prompt.mask[:, spare:])
