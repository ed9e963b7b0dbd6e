"""Scores that line up with labels: the stock head on the states that score the labeled positions."""

import functools
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.injection.forward import TrunkOutput, run_trunk
from softprompts.injection.hidden_states import LAST_HIDDEN_STATE
from softprompts.injection.packed import Prefix
from softprompts.injection.sites import Site
from softprompts.types import IGNORE, Batch, Output, Prompt

MAX_LOGITS = 1 << 25
"""Scores (positions times vocabulary) that are made at once; in float32 they take 128 MB."""


def score(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    *,
    return_hidden_states: bool = False,
    path: str | None = None,
    prefix: Prefix | None = None,
    return_logits: bool | None = None,
    layers: Collection[int] = (),
) -> Output:
    """Scores that line up with the labels of `batch`, for the labeled positions only.

    prompt: None runs the stock model without one; hidden: also return the text's states [B, T, H] (encoder-decoder
    models: the encoder's; with head features always, and then the decoder's, as the stock model does); path: `packed`,
    `shared` or `concatenation`, None takes the best that is possible; prefix: the distinct prompts, read before;
    logits: of a language model the scores [N, V] (True) or each label's `nll` [N] alone (False), made a few rows at a
    time; None takes the latter where scores would be large; layers: whose states of the text to return too, 1 for the
    first layer, -1 for what the head reads (encoder-decoder models: of both stacks).
    Raises BackboneError when prompt and text do not fit the model's positions, or the path is not possible.
    """
    every = return_hidden_states or layers or backbone.head in ("span", "features")
    wanted = None if every else functools.partial(_wanted, backbone, batch)
    reading = run_trunk(backbone, batch, prompt, site, path=path, prefix=prefix, wanted=wanted, layers=layers)
    rows = torch.arange(len(batch.input_ids), device=reading.hidden_states.device)
    states = _unpack(reading) if backbone.head in ("span", "features") else None
    seen = _unpack(reading.encoder or reading) if return_hidden_states and backbone.head != "features" else states
    result = Output(None, None, rows, hidden_states=seen, cache=reading.cache, path=reading.path)
    if layers:
        result = replace(result, **_text_states(reading, layers))
    if backbone.head == "lm" and backbone.family.scores_next_token:
        result = replace(result, last=_last(reading))
    if backbone.head == "features" or (batch.labels is None and backbone.head in ("lm", "token")):
        return result
    if backbone.head == "sequence":
        return replace(result, logits=sequence_scores(backbone, reading), labels=batch.labels)
    if backbone.head == "span":
        assert states is not None
        scores = span_scores(backbone, reading, states, batch.attention_mask)
        flat = scores.permute(2, 0, 1).reshape(-1, scores.shape[1])
        labels = None if batch.labels is None else batch.labels.T.reshape(-1)
        return replace(result, logits=flat, labels=labels, row=rows.repeat(2))
    assert batch.labels is not None
    state, labels, row, column = _labeled(backbone, reading, batch.labels)

    def read_off(part: Tensor) -> Tensor:
        return apply_head(backbone, reading, part[None])[0]

    result = replace(result, labels=labels, row=row, column=column, states=state, scores=read_off)

    if backbone.head == "lm" and (
        len(labels) * backbone.vocab_size > MAX_LOGITS if return_logits is None else not return_logits
    ):
        return replace(result, nll=chunked_nll(state, labels, read_off, max(1, MAX_LOGITS // backbone.vocab_size)))
    return replace(result, logits=read_off(state))


def _text_states(reading: TrunkOutput, layers: Collection[int]) -> dict[str, Any]:
    """`layers` and `tokens` of an Output."""
    sides = {"text": reading} if reading.encoder is None else {"text": reading.encoder, "target": reading}
    found = {}
    for side, own in sides.items():
        for number in layers:
            states = own.hidden_states if number == LAST_HIDDEN_STATE else own.layer_states[number]
            places = own.text_positions[..., None].expand(-1, -1, states.shape[-1])
            found[side, number] = states.gather(1, places)[own.text_mask.bool()]
    return {"layers": found, "tokens": {side: own.text_mask.sum(1) for side, own in sides.items()}}


def chunked_nll(states: Tensor, labels: Tensor, scores: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Minus the log-probability of each label [N] at states [N, H], in float32, `size` rows of scores at a time.

    Neither the scores nor their gradient ever stand in memory as a whole.
    """
    if not torch.is_grad_enabled() or not states.requires_grad:
        return torch.cat([_nll(scores(s), y) for s, y in zip(states.split(size), labels.split(size), strict=True)])
    return _ChunkedNll.apply(states, labels, scores, size)


def _nll(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        scores.to(torch.promote_types(scores.dtype, torch.float32)), labels, reduction="none"
    )


class _ChunkedNll(torch.autograd.Function):
    """A position's scores depend on its own state alone, so the gradient is made together with the value."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, scores: Callable[[Tensor], Tensor], size: int) -> Tensor:
        values, gradients = [], []
        for part, wanted in zip(states.split(size), labels.split(size), strict=True):
            with torch.enable_grad():
                own = part.detach().requires_grad_()
                value = _nll(scores(own), wanted)
                gradients.append(torch.autograd.grad(value.sum(), own)[0])
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        return own * gradients[0][:, None].to(own.dtype), None, None, None


def apply_head(backbone: Backbone, reading: TrunkOutput, states: Tensor, mask: Tensor | None = None) -> Tensor:
    """The stock head's scores for `states [R, K, H]`: the trunk is replayed, the head is the model's own.

    mask [R, K]: which states there are, for heads that average over them (default: all).
    """
    output = type(reading.output)(**{**reading.output, "last_hidden_state": states})
    ids = torch.full(states.shape[:2], _end_id(backbone), dtype=torch.long, device=states.device)
    with backbone.replay(output):
        if backbone.family is not SEQ2SEQ:
            mask = torch.ones_like(ids) if mask is None else mask.long()
            return backbone.model(input_ids=ids, attention_mask=mask, return_dict=True).logits
        encoded = type(reading.encoded[0])(last_hidden_state=states[:, :1])  # type: ignore[index]
        return backbone.model(encoder_outputs=encoded, **_decoder_input(backbone, ids), return_dict=True).logits


def sequence_scores(backbone: Backbone, reading: TrunkOutput) -> Tensor:
    """Scores [B, C] of a sequence head: encoders pool as the stock model does, others the last position of the run."""
    if not backbone.family.scores_next_token and backbone.family is not SEQ2SEQ:
        columns = torch.arange(reading.hidden_states.shape[1], device=reading.end_positions.device)
        return apply_head(backbone, reading, reading.hidden_states, columns <= reading.end_positions[:, None])
    states = _last(reading)[:, None]
    if backbone.family.scores_next_token and backbone.config.pad_token_id is None:
        # The stock head refuses batches when no padding token is defined; a row at a time it does not ask.
        return torch.cat([apply_head(backbone, reading, row[None]) for row in states])
    return apply_head(backbone, reading, states)


def span_scores(backbone: Backbone, reading: TrunkOutput, states: Tensor, mask: Tensor) -> Tensor:
    """Start and end scores [B, T, 2] in the text's own layout; padding can never be chosen."""
    ids = torch.full(states.shape[:2], _end_id(backbone), device=states.device)
    output = type(reading.output)(**{**reading.output, "last_hidden_state": states})
    with backbone.replay(output):
        if backbone.family is SEQ2SEQ:
            encoded = type(reading.encoded[0])(last_hidden_state=states[:, :1])  # type: ignore[index]
            out = backbone.model(encoder_outputs=encoded, **_decoder_input(backbone, ids), return_dict=True)
        else:
            out = backbone.model(input_ids=ids, return_dict=True)
    scores = torch.stack([out.start_logits, out.end_logits], -1)
    return scores.masked_fill(~mask.bool()[..., None], torch.finfo(scores.dtype).min)


def _decoder_input(backbone: Backbone, ids: Tensor) -> dict[str, Tensor]:
    # Sequence and span heads look for the end token in input_ids; language models only want a decoder input.
    return {"decoder_input_ids": ids} if backbone.head == "lm" else {"input_ids": ids, "decoder_input_ids": ids}


def _end_id(backbone: Backbone) -> int:
    end = backbone.model.config.eos_token_id
    return int(end[0] if isinstance(end, list) else end) if backbone.family is SEQ2SEQ else 0


def _wanted(backbone: Backbone, batch: Batch, order: Tensor, mask: Tensor) -> Tensor:
    """Which packed text tokens [B, T] have states that `forward` looks at: those that score a label, and the last."""
    ends = torch.zeros_like(mask)
    ends.scatter_(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0), True)
    if batch.labels is not None and backbone.head in ("lm", "token"):
        scored = (batch.labels.gather(1, order) != IGNORE) & mask
        ends |= functional.pad(scored[:, 1:], (0, 1)) if backbone.head == "lm" else scored
    return ends & mask


def _labeled(backbone: Backbone, reading: TrunkOutput, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [N, H] that score the labeled positions, with their labels, rows and original columns [N]."""
    packed = labels.gather(1, reading.token_order)
    wanted = (packed != IGNORE) & reading.text_mask
    place = reading.text_positions
    if backbone.head == "lm" and backbone.family.scores_next_token:
        place = place - 1
        wanted = wanted & (place >= 0)
    row, column = wanted.nonzero(as_tuple=True)
    return reading.hidden_states[row, place[row, column]], packed[row, column], row, reading.token_order[row, column]


def _last(reading: TrunkOutput) -> Tensor:
    """The state [B, H] at the end of each row's run, which scores the first new token."""
    return reading.hidden_states[
        torch.arange(len(reading.end_positions), device=reading.end_positions.device), reading.end_positions
    ]


def _unpack(reading: TrunkOutput) -> Tensor:
    """The text's states [B, T, H] in the text's own layout, zero on padding."""
    states = reading.hidden_states.gather(
        1, reading.text_positions[..., None].expand(-1, -1, reading.hidden_states.shape[-1])
    )
    states = states * reading.text_mask[..., None]
    return torch.zeros_like(states).scatter(1, reading.token_order[..., None].expand_as(states), states)
