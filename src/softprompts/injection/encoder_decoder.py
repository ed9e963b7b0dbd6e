"""Encoder-decoder models: prompts in the encoder, in front of the decoder's input, or in the decoder's cache."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from softprompts.backbone import Backbone
from softprompts.errors import BackboneError
from softprompts.injection.layout import assemble_embeddings, layout_rows, trim_padding
from softprompts.injection.sites import Site, fill_cache
from softprompts.types import IGNORE, Batch, Prompt


def decoder_ids(backbone: Backbone, batch: Batch, packed: Batch, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder input [B, S], its mask and the original column of each: given, labels shifted, or the text shifted."""
    if batch.decoder_input_ids is not None:
        ids = batch.decoder_input_ids
        mask = (
            torch.ones_like(ids, dtype=torch.bool)
            if batch.decoder_attention_mask is None
            else batch.decoder_attention_mask.bool()
        )
        moved = mask.long().argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, moved), mask.gather(1, moved), moved
    if backbone.head == "lm":
        if batch.labels is None:
            start = torch.full((len(batch.input_ids), 1), start_id(backbone), device=batch.input_ids.device)
            return start, torch.ones_like(start, dtype=torch.bool), torch.zeros_like(start)
        target, mask = batch.labels, batch.labels != IGNORE
        # A label in the middle may be ignored; only what stands behind the last scored one is padding.
        mask = mask.flip(1).cumsum(1).flip(1) > 0
        columns = torch.arange(target.shape[1], device=target.device).expand_as(target)
        return shift_right(backbone, target), mask, columns
    ids = batch.input_ids.gather(1, order)
    return shift_right(backbone, ids), packed.attention_mask, order


def decode(
    backbone: Backbone,
    ids: Tensor,
    mask: Tensor,
    encoded: Tensor,
    encoded_mask: Tensor,
    prompt: Prompt | None,
    site: Site,
) -> tuple[Any, Tensor, Tensor]:
    """The decoder's output, where each of `ids [B, S]` stands in it, and each run's last position [B]."""
    check_room(backbone, mask, prompt)
    common: dict[str, Any] = {"encoder_hidden_states": encoded, "encoder_attention_mask": encoded_mask.long()}
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if backbone.kernels.gradient_checkpointing and (prompt is None or site.name != "kv"):
        common["use_cache"] = False  # nothing goes on from here, and a layer computed again would find its own keys
    if prompt is None:
        output = backbone.decoder(input_ids=ids, attention_mask=mask.long(), **common)
        return output, columns, mask.sum(1) - 1
    if site.name == "kv":
        prompt = trim_padding(prompt)
        lengths = prompt.lengths[prompt.prompt_index]
        if bool((lengths != lengths[0]).any()) and backbone.max_positions is not None:
            raise BackboneError(
                f"prompts of {sorted(set(lengths.tolist()))} tokens cannot share a batch at site 'kv' of "
                f"{type(backbone.model).__name__}, whose decoder counts positions itself; batch them by length"
            )
        own = backbone.new_cache()
        fill_cache(own, backbone, prompt)
        own.batch_select_indices(prompt.prompt_index)
        full = torch.cat([prompt.mask[prompt.prompt_index].bool(), mask], 1).long()
        cache = EncoderDecoderCache(own, backbone.new_cache())
        output = backbone.decoder(input_ids=ids, attention_mask=full, past_key_values=cache, use_cache=True, **common)
        return output, columns, mask.sum(1) - 1
    where = layout_rows(mask, torch.zeros_like(ids[:, 0]), prompt)
    embeds = assemble_embeddings(backbone.decoder.embed_tokens(ids), prompt, where)
    output = backbone.decoder(inputs_embeds=embeds, attention_mask=where.attention_mask.long(), **common)
    return output, where.text_positions, where.attention_mask.sum(1) - 1


def check_room(backbone: Backbone, mask: Tensor, prompt: Prompt | None) -> None:
    """Raise BackboneError when prompt and text (mask [B, T]) need more positions than the model has."""
    if backbone.max_positions is None:
        return
    slots = 0 if prompt is None else prompt.values.shape[1]
    if mask.shape[1] + slots <= backbone.max_positions:
        return
    longest = int((mask.sum(1) + (0 if prompt is None else prompt.lengths[prompt.prompt_index])).max())
    if longest > backbone.max_positions:
        raise BackboneError(
            f"prompt and text need {longest} positions, {backbone.name or 'the model'} takes {backbone.max_positions}; "
            f"shorten the text (max_length) or the prompt"
        )


def start_id(backbone: Backbone) -> int:
    """The token a decoder begins with."""
    config = backbone.model.config
    found = config.decoder_start_token_id
    return int(found if found is not None else config.bos_token_id)


def shift_right(backbone: Backbone, ids: Tensor) -> Tensor:
    """Decoder input [B, S] for targets [B, S]: the start token, then the targets but the last."""
    padding = backbone.model.config.pad_token_id
    moved = torch.cat([torch.full_like(ids[:, :1], start_id(backbone)), ids[:, :-1]], 1)
    return moved.masked_fill(moved == IGNORE, padding if padding is not None else 0)
