"""Full rows `[prompt|text|pad]` or `[pad|prompt|text]`: one unbroken run each, by index arithmetic alone.

The prompt may be anywhere in the text, in one piece or in several segments.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.errors import BackboneError
from softprompts.types import Batch, Prompt


@dataclass(frozen=True)
class Layout:
    """Where the prompt and the text of each row are in full rows of S positions.

    Attributes:
        gather_index: [B, S], the index into `[prompt | text]` of what is at each position.
        attention_mask: [B, S], true for prompt and text, false for padding.
        text_positions: [B, T], the position of each text token.
        prompt_slots: [B, S], the prompt token at each position, -1 where there is none.
        position_ids: [B, S], positions counted from the beginning of the run.
        text_before_prompt: [B, P], how many text tokens precede each prompt token.
        prompt_before_text: [B, T], how many prompt tokens precede each text token.
    """

    gather_index: Tensor
    attention_mask: Tensor
    text_positions: Tensor
    prompt_slots: Tensor
    position_ids: Tensor
    text_before_prompt: Tensor
    prompt_before_text: Tensor


def layout_rows(
    text_mask: Tensor,
    prompt_offsets: Tensor,
    prompt: Prompt | None,
    pad_left: bool = False,
    segment_lengths: Tensor | None = None,
) -> Layout:
    """Lay prompt and text out as one unbroken run a row.

    Args:
        text_mask: [B, T], true for text, which is at the left edge.
        prompt_offsets: [B], how many text tokens precede the prompt, or [B, G] before each of its G segments, never
            falling.
        prompt: The prompts of the rows; None: rows of text alone.
        pad_left: Whether padding precedes the run, as `generate` wants it.
        segment_lengths: [B, G], prompt tokens in each segment, which sum to the row's prompt; None: one segment.
    """
    rows, columns = text_mask.shape
    device = text_mask.device
    if prompt is None:
        prompt_mask = text_mask.new_zeros(rows, 0, dtype=torch.bool)
    else:
        prompt_mask = prompt.mask[prompt.prompt_index].bool()
    slots = prompt_mask.shape[1]
    # Short prompts are padded on the left of their slots, so the rank counts from a row's first prompt token.
    rank = prompt_mask.long().cumsum(1) - 1
    text_before_prompt = _text_before_prompt(prompt_offsets.reshape(rows, -1), segment_lengths, rank)
    run_lengths = text_mask.sum(1) + prompt_mask.sum(1)
    size = int(run_lengths.max())
    start = (size - run_lengths)[:, None] if pad_left else torch.zeros_like(run_lengths)[:, None]
    step = torch.arange(size, device=device)[None] - start
    inside = (step >= 0) & (step < run_lengths[:, None])
    column = torch.arange(columns, device=device).expand(rows, -1).contiguous()
    # Offsets never fall, and padding of a short prompt precedes all of it, so both are sorted.
    slots_before_text = torch.searchsorted(text_before_prompt.masked_fill(~prompt_mask, -1), column, right=True)
    prompt_before_text = slots_before_text - (~prompt_mask).sum(1, keepdim=True)
    text_positions = column + prompt_before_text + start
    prompt_positions = text_before_prompt + rank + start
    is_token = torch.cat([prompt_mask, text_mask.bool()], 1)
    positions = torch.cat([prompt_positions, text_positions], 1).where(is_token, size)
    index = torch.arange(slots + columns, device=device).expand(rows, -1)
    # Padding takes a text token, which has no gradient; the last column takes what is no token.
    padding = torch.full((rows, size + 1), max(slots + columns - 1, 0), device=device)
    gather_index = padding.scatter(1, positions, index)[:, :size]
    return Layout(
        gather_index=gather_index,
        attention_mask=inside,
        text_positions=text_positions.clamp(max=size - 1),
        prompt_slots=gather_index.where(inside & (gather_index < slots), -1),
        position_ids=step.clamp(min=0),
        text_before_prompt=text_before_prompt,
        prompt_before_text=prompt_before_text,
    )


def _text_before_prompt(prompt_offsets: Tensor, segment_lengths: Tensor | None, rank: Tensor) -> Tensor:
    """Text tokens before each prompt token [B, P], which is the `rank [B, P]`-th of its row's prompt."""
    if segment_lengths is None:
        return prompt_offsets[:, :1].expand_as(rank).contiguous()
    segment = torch.searchsorted(segment_lengths.cumsum(1), rank, right=True)
    return prompt_offsets.gather(1, segment.clamp(max=prompt_offsets.shape[1] - 1))


def align_texts(backbone: Backbone, batch: Batch, prompt: Prompt | None) -> tuple[Tensor, Tensor, Tensor]:
    """The texts of `batch` moved to the left edge, with what `prompt` adds to their embeddings.

    Returns:
        The original column of each token [B, T], the mask [B, T] of the moved texts, and their embeddings [B, T, H].
    """
    token_order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
    text_mask = batch.attention_mask.gather(1, token_order).bool()
    embeddings = backbone.embed(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds
    embeddings = embeddings.gather(1, token_order[..., None].expand_as(embeddings))
    return token_order, text_mask, add_delta(embeddings, text_mask, prompt)


def assemble_embeddings(
    text_embeddings: Tensor, prompt: Prompt | None, layout: Layout, prompt_embeddings: Tensor | None = None
) -> Tensor:
    """Embeddings [B, S, H] of full rows.

    Args:
        text_embeddings: [B, T, H] at the left edge.
        prompt: The prompts of the rows; None: rows of text alone.
        layout: Where prompt and text are in the full rows.
        prompt_embeddings: [U, P, H] of the distinct prompts; None: the prompt's values.
    """
    if prompt is None:
        pieces = text_embeddings
    else:
        values = prompt.values if prompt_embeddings is None else prompt_embeddings
        pieces = torch.cat([values.to(text_embeddings.dtype)[prompt.prompt_index], text_embeddings], 1)
    return pieces.gather(1, layout.gather_index[..., None].expand(-1, -1, pieces.shape[2]))


def add_delta(embeddings: Tensor, text_mask: Tensor, prompt: Prompt | None) -> Tensor:
    """The embeddings of the texts with what `prompt` adds to the first tokens of each.

    Padding, and text beyond the reach of the delta, keep every bit.

    Args:
        embeddings: [B, T, H] of texts at the left edge.
        text_mask: [B, T], true for text.
        prompt: The prompts of the rows, with or without an `embedding_delta`.
    """
    if prompt is None or prompt.embedding_delta is None:
        return embeddings
    delta = prompt.embedding_delta
    columns = embeddings.shape[1]
    values = torch.nn.functional.pad(delta.values, (0, 0, 0, columns - delta.values.shape[1]))
    in_reach = text_mask.bool() & (torch.arange(columns, device=text_mask.device) < delta.reach[:, None])
    changed = embeddings + values[prompt.prompt_index]
    return torch.where(in_reach[..., None], changed, embeddings).to(embeddings.dtype)


def trim_padding(prompt: Prompt) -> Prompt:
    """The same prompt without the slots that every row of the batch leaves empty."""
    empty_slots = prompt.values.shape[1] - int(prompt.lengths[prompt.prompt_index].max())
    return replace(prompt, values=prompt.values[:, empty_slots:], mask=prompt.mask[:, empty_slots:])


def check_room(backbone: Backbone, mask: Tensor, prompt: Prompt | None) -> None:
    """Raise BackboneError when prompt and text (mask [B, T]) need more positions than the model has."""
    if backbone.max_positions is None:
        return
    slots = 0 if prompt is None else prompt.values.shape[1]
    if mask.shape[1] + slots <= backbone.max_positions:
        return
    lengths = mask.sum(1)
    if prompt is not None:
        lengths = lengths + prompt.lengths[prompt.prompt_index]
    longest = int(lengths.max())
    if longest > backbone.max_positions:
        raise BackboneError(
            f"prompt and text need {longest} positions, {backbone.name or 'the model'} takes "
            f"{backbone.max_positions}; shorten the text (max_length) or the prompt"
        )
