"""Encoder-decoder models: prompts in front of the decoder's input, or in the decoder's cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompts.backbone import Backbone
from softprompts.backbone.cache import EncoderDecoderCache, cache_argument
from softprompts.errors import BackboneError
from softprompts.injection.layout import assemble_embeddings, check_room, layout_rows, trim_padding
from softprompts.injection.sites import Site, fill_cache
from softprompts.types import IGNORE, Batch, Prompt


@dataclass(frozen=True)
class DecoderInput:
    """What the decoder reads.

    Attributes:
        ids: [B, S], token ids at the left edge.
        mask: [B, S], true for tokens, false for padding.
        token_order: [B, S], the column of the labels that each token scores.
    """

    ids: Tensor
    mask: Tensor
    token_order: Tensor


@dataclass(frozen=True)
class DecoderOutput:
    """The decoder's output, in a layout where nothing but the positions shows the prompt.

    Attributes:
        output: The decoder's own output.
        text_positions: [B, S], the position of each token of the DecoderInput in it.
        end_positions: [B], the last position of each row's run.
    """

    output: Any
    text_positions: Tensor
    end_positions: Tensor


def decoder_input(backbone: Backbone, batch: Batch, token_order: Tensor, text_mask: Tensor) -> DecoderInput:
    """The decoder's input for `batch`: as given there, else the labels shifted, else the text shifted.

    Args:
        backbone: An encoder-decoder model.
        batch: The batch as the caller gave it.
        token_order: [B, T], the original column of each text token at the left edge. Heads that are no language model
            read the text in the decoder too.
        text_mask: [B, T], true for text at the left edge.
    """
    if batch.decoder_input_ids is not None:
        ids = batch.decoder_input_ids
        if batch.decoder_attention_mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        else:
            mask = batch.decoder_attention_mask.bool()
        decoder_order = mask.long().argsort(dim=1, descending=True, stable=True)
        return DecoderInput(ids.gather(1, decoder_order), mask.gather(1, decoder_order), decoder_order)
    if backbone.head != "lm":
        text_ids = batch.input_ids.gather(1, token_order)
        return DecoderInput(shift_right(backbone, text_ids), text_mask, token_order)
    if batch.labels is None:
        ids = torch.full((len(batch.input_ids), 1), start_id(backbone), device=batch.input_ids.device)
        return DecoderInput(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))
    labels = batch.labels
    # A label in the middle may be ignored; only what follows the last scored one is padding.
    mask = (labels != IGNORE).flip(1).cumsum(1).flip(1) > 0
    columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return DecoderInput(shift_right(backbone, labels), mask, columns)


def decode(
    backbone: Backbone,
    tokens: DecoderInput,
    encoder_states: Tensor,
    encoder_mask: Tensor,
    prompt: Prompt | None,
    site: Site,
) -> DecoderOutput:
    """Run the decoder over `tokens` behind its own prompt.

    Args:
        backbone: An encoder-decoder model.
        tokens: What the decoder reads.
        encoder_states: [B, S', H], the encoder's last hidden states.
        encoder_mask: [B, S'], true where they are not padding.
        prompt: A prompt at site decoder or kv; None: there is none in the decoder.
        site: Where it enters.

    Raises:
        BackboneError: Prompt and tokens need more positions than the model has, or prompts of several lengths share a
            batch at site kv of a decoder that counts positions itself.
    """
    check_room(backbone, tokens.mask, prompt)
    arguments: dict[str, Any] = {
        "encoder_hidden_states": encoder_states,
        "encoder_attention_mask": encoder_mask.long(),
    }
    columns = torch.arange(tokens.ids.shape[1], device=tokens.ids.device).expand_as(tokens.ids)
    end_columns = tokens.mask.sum(1) - 1
    if backbone.kernels.gradient_checkpointing and (prompt is None or not site.in_cache):
        arguments["use_cache"] = False  # nothing follows, and a layer that is computed again would find its own keys
    if prompt is None:
        output = backbone.decoder(input_ids=tokens.ids, attention_mask=tokens.mask.long(), **arguments)
        return DecoderOutput(output, columns, end_columns)
    if site.in_cache:
        prompt = trim_padding(prompt)
        _check_equal_lengths(backbone, prompt)
        self_attention_cache = backbone.new_cache()
        fill_cache(self_attention_cache, backbone, prompt)
        self_attention_cache.batch_select_indices(prompt.prompt_index)
        mask = torch.cat([prompt.mask[prompt.prompt_index].bool(), tokens.mask], 1).long()
        cache = EncoderDecoderCache(self_attention_cache, backbone.new_cache())
        arguments |= cache_argument(backbone.decoder, cache)
        output = backbone.decoder(input_ids=tokens.ids, attention_mask=mask, **arguments)
        return DecoderOutput(output, columns, end_columns)
    layout = layout_rows(tokens.mask, torch.zeros_like(tokens.ids[:, 0]), prompt)
    embeddings = assemble_embeddings(backbone.decoder.embed_tokens(tokens.ids), prompt, layout)
    output = backbone.decoder(inputs_embeds=embeddings, attention_mask=layout.attention_mask.long(), **arguments)
    return DecoderOutput(output, layout.text_positions, layout.attention_mask.sum(1) - 1)


def _check_equal_lengths(backbone: Backbone, prompt: Prompt) -> None:
    lengths = prompt.lengths[prompt.prompt_index]
    if backbone.max_positions is not None and bool((lengths != lengths[0]).any()):
        raise BackboneError(
            f"prompts of {sorted(set(lengths.tolist()))} tokens cannot share a batch at site 'kv' of "
            f"{type(backbone.model).__name__}, whose decoder counts positions itself; batch them by length"
        )


def start_id(backbone: Backbone) -> int:
    """The token with which a decoder begins."""
    config = backbone.model.config
    start = config.decoder_start_token_id
    return int(start if start is not None else config.bos_token_id)


def shift_right(backbone: Backbone, ids: Tensor) -> Tensor:
    """Decoder input [B, S] for targets [B, S]: the start token, then the targets but the last."""
    padding = backbone.model.config.pad_token_id
    shifted = torch.cat([torch.full_like(ids[:, :1], start_id(backbone)), ids[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORE, padding if padding is not None else 0)
