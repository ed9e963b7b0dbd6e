"""Scores that line up with labels: the stock head on the states that score the labeled positions."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
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
"""Logits (positions times vocabulary) that are made at once; in float32 they take 128 MB."""


def score(
    backbone: Backbone,
    batch: Batch,
    prompt: Prompt | None,
    site: Site,
    *,
    path: str | None = None,
    prefix: Prefix | None = None,
    layers: Collection[int] = (),
    return_hidden_states: bool = False,
    return_logits: bool | None = None,
) -> Output:
    """Scores that line up with the labels of `batch`, for the labeled positions only.

    Args:
        backbone: The frozen model.
        batch: The texts with their labels, padded on either side.
        prompt: The prompts of the rows; None: the stock model without one.
        site: Where they enter.
        path: packed, shared or concatenation; None: the best that is possible.
        prefix: The distinct prompts, computed before.
        layers: Layers whose states of the text to return, 1 for the first, -1 for what the head reads; of
            encoder-decoder models of both stacks.
        return_hidden_states: Whether to return the text's last hidden states [B, T, H], of encoder-decoder models the
            encoder's. A model without a head always returns them, an encoder-decoder then the decoder's.
        return_logits: Of a language model the logits [N, V] (True), or each label's `nll` [N] alone, made a few rows at
            a time (False); None: the latter where the logits would be large.

    Raises:
        BackboneError: Prompt and text do not fit the model's positions, or the site or path is not possible.
    """
    needs_every_token = return_hidden_states or layers or backbone.head in ("span", "features")
    trunk = run_trunk(
        backbone,
        batch,
        prompt,
        site,
        path=path,
        prefix=prefix,
        needed_tokens=None if needs_every_token else functools.partial(_scoring_tokens, backbone, batch),
        layers=layers,
    )
    # Heads that read every token read the decoder's states, where the caller asks for the encoder's.
    head_states = text_states(trunk) if backbone.head in ("span", "features") else None
    hidden_states = head_states
    if return_hidden_states and backbone.head != "features":
        hidden_states = text_states(trunk.encoder or trunk)
    output = _output_without_scores(backbone, trunk, hidden_states, layers)
    if backbone.head == "features" or (batch.labels is None and backbone.head in ("lm", "token")):
        return output
    if backbone.head == "sequence":
        return replace(output, logits=sequence_scores(backbone, trunk), labels=batch.labels)
    if backbone.head == "span":
        assert head_states is not None
        return _span_output(output, span_scores(backbone, trunk, head_states, batch.attention_mask), batch.labels)
    assert batch.labels is not None
    labeled = _labeled_states(backbone, trunk, batch.labels)

    def head(states: Tensor) -> Tensor:
        return apply_head(backbone, trunk, states[None])[0]

    output = replace(
        output,
        labels=labeled.labels,
        batch_rows=labeled.rows,
        label_columns=labeled.columns,
        label_states=labeled.states,
        head=head,
    )
    if return_logits is None:
        return_logits = backbone.head != "lm" or len(labeled.labels) * backbone.vocab_size <= MAX_LOGITS
    if return_logits or backbone.head != "lm":
        return replace(output, logits=head(labeled.states))
    rows_at_once = max(1, MAX_LOGITS // backbone.vocab_size)
    return replace(output, nll=chunked_nll(labeled.states, labeled.labels, head, rows_at_once))


def _output_without_scores(
    backbone: Backbone, trunk: TrunkOutput, hidden_states: Tensor | None, layers: Collection[int]
) -> Output:
    """The states that the caller asked for, and those that everybody gets."""
    output = Output(
        logits=None,
        labels=None,
        batch_rows=torch.arange(len(trunk.hidden_states), device=trunk.hidden_states.device),
        hidden_states=hidden_states,
        cache=trunk.cache,
        path=trunk.path,
    )
    if layers:
        output = replace(
            output, layer_states=_text_states_of_layers(trunk, layers), token_counts=_text_token_counts(trunk)
        )
    if backbone.head == "lm" and backbone.family.scores_next_token:
        output = replace(output, last_state=_end_states(trunk))
    return output


def _sides(trunk: TrunkOutput) -> dict[str, TrunkOutput]:
    """The stacks that read text, by the names that `Output.layer_states` has for them."""
    if trunk.encoder is None:
        return {"text": trunk}
    return {"text": trunk.encoder, "target": trunk}


def _text_states_of_layers(trunk: TrunkOutput, layers: Collection[int]) -> dict[tuple[str, int], Tensor]:
    """(side, layer) -> states [M, H] of all M text tokens, row behind row."""
    states_of = {}
    for side, stack in _sides(trunk).items():
        for layer in layers:
            states = stack.hidden_states if layer == LAST_HIDDEN_STATE else stack.layer_states[layer]
            positions = stack.text_positions[..., None].expand(-1, -1, states.shape[-1])
            states_of[side, layer] = states.gather(1, positions)[stack.text_mask.bool()]
    return states_of


def _text_token_counts(trunk: TrunkOutput) -> dict[str, Tensor]:
    """Side -> how many text tokens each row has, [B]."""
    return {side: stack.text_mask.sum(1) for side, stack in _sides(trunk).items()}


def _span_output(output: Output, scores: Tensor, labels: Tensor | None) -> Output:
    """Scores [B, T, 2] and labels [B, 2] as starts of all rows, then their ends: [2B, T] and [2B]."""
    return replace(
        output,
        logits=scores.permute(2, 0, 1).reshape(-1, scores.shape[1]),
        labels=None if labels is None else labels.T.reshape(-1),
        batch_rows=output.batch_rows.repeat(2),
    )


def chunked_nll(states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], rows_at_once: int) -> Tensor:
    """Minus the log-probability of each label [N], in float32, without all logits in memory.

    Args:
        states: [N, H], what the head reads.
        labels: [N], token ids.
        head: From states [n, H] to logits [n, V].
        rows_at_once: How many rows of logits, and of their gradient, are in memory at a time.
    """
    if torch.is_grad_enabled() and states.requires_grad:
        return _ChunkedNll.apply(states, labels, head, rows_at_once)
    chunks = zip(states.split(rows_at_once), labels.split(rows_at_once), strict=True)
    return torch.cat([_nll(head(chunk), chunk_labels) for chunk, chunk_labels in chunks])


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, reduction="none")


class _ChunkedNll(torch.autograd.Function):
    """The logits of a position depend on its own state alone, so the gradient is made together with the value."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], rows_at_once: int
    ) -> Tensor:
        values = []
        gradients = []
        for chunk, chunk_labels in zip(states.split(rows_at_once), labels.split(rows_at_once), strict=True):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                chunk_values = _nll(head(leaf), chunk_labels)
                gradients.append(torch.autograd.grad(chunk_values.sum(), leaf)[0])
            values.append(chunk_values.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (state_gradient,) = ctx.saved_tensors
        return state_gradient * gradients[0][:, None].to(state_gradient.dtype), None, None, None


def apply_head(backbone: Backbone, trunk: TrunkOutput, states: Tensor, mask: Tensor | None = None) -> Tensor:
    """The stock head's scores for some states: the model runs with its trunk replaced by a replay of them.

    Args:
        backbone: The frozen model.
        trunk: The output that the states are from.
        states: [R, K, H].
        mask: [R, K], true for states, false for padding, for heads that average over them; None: all are states.

    Returns:
        Scores [R, K, V] of language models, [R, K, C] of token heads, [R, C] of sequence heads.
    """
    ids = torch.full(states.shape[:2], _end_id(backbone), dtype=torch.long, device=states.device)
    with backbone.replay(_replayed_output(trunk, states)):
        if backbone.family is SEQ2SEQ:
            return backbone.model(**_encoder_decoder_arguments(backbone, trunk, states, ids)).logits
        mask = torch.ones_like(ids) if mask is None else mask.long()
        return backbone.model(input_ids=ids, attention_mask=mask, return_dict=True).logits


def sequence_scores(backbone: Backbone, trunk: TrunkOutput) -> Tensor:
    """Scores [B, C] of a sequence head: encoders pool as the stock model does, others read the end of the run."""
    if not backbone.family.scores_next_token and backbone.family is not SEQ2SEQ:
        columns = torch.arange(trunk.hidden_states.shape[1], device=trunk.end_positions.device)
        return apply_head(backbone, trunk, trunk.hidden_states, columns <= trunk.end_positions[:, None])
    states = _end_states(trunk)[:, None]
    if backbone.family.scores_next_token and backbone.config.pad_token_id is None:
        # The stock head refuses batches when no padding token is defined; a row at a time it does not ask.
        return torch.cat([apply_head(backbone, trunk, row_states[None]) for row_states in states])
    return apply_head(backbone, trunk, states)


def span_scores(backbone: Backbone, trunk: TrunkOutput, states: Tensor, mask: Tensor) -> Tensor:
    """Start and end scores [B, T, 2] of a span head; padding can never be chosen.

    Args:
        backbone: The frozen model.
        trunk: The output that the states are from.
        states: [B, T, H] in the text's own layout.
        mask: [B, T], true for text.
    """
    ids = torch.full(states.shape[:2], _end_id(backbone), device=states.device)
    with backbone.replay(_replayed_output(trunk, states)):
        if backbone.family is SEQ2SEQ:
            output = backbone.model(**_encoder_decoder_arguments(backbone, trunk, states, ids))
        else:
            output = backbone.model(input_ids=ids, return_dict=True)
    scores = torch.stack([output.start_logits, output.end_logits], -1)
    return scores.masked_fill(~mask.bool()[..., None], torch.finfo(scores.dtype).min)


def _replayed_output(trunk: TrunkOutput, states: Tensor) -> Any:
    """The trunk's output with other last hidden states."""
    return type(trunk.output)(**{**trunk.output, "last_hidden_state": states})


def _encoder_decoder_arguments(backbone: Backbone, trunk: TrunkOutput, states: Tensor, ids: Tensor) -> dict[str, Any]:
    """Arguments of an encoder-decoder model whose decoder is replayed; its encoder does not run."""
    assert trunk.encoder is not None
    encoder_output = type(trunk.encoder.output)(last_hidden_state=states[:, :1])
    arguments = {"encoder_outputs": encoder_output, "decoder_input_ids": ids, "return_dict": True}
    if backbone.head != "lm":  # sequence and span heads look for the end token in input_ids
        arguments["input_ids"] = ids
    return arguments


def _end_id(backbone: Backbone) -> int:
    """A token id for each replayed state: the end token where a head looks for it, else any."""
    end = backbone.model.config.eos_token_id
    return int(end[0] if isinstance(end, list) else end) if backbone.family is SEQ2SEQ else 0


def _scoring_tokens(backbone: Backbone, batch: Batch, token_order: Tensor, text_mask: Tensor) -> Tensor:
    """The text tokens [B, T] whose states `score` reads: those that score a label, and the last of each text."""
    scoring = torch.zeros_like(text_mask)
    scoring.scatter_(1, (text_mask.sum(1, keepdim=True) - 1).clamp(min=0), True)
    if batch.labels is not None and backbone.head in ("lm", "token"):
        labeled = (batch.labels.gather(1, token_order) != IGNORE) & text_mask
        # A language model's label is scored by the token before it.
        scoring |= functional.pad(labeled[:, 1:], (0, 1)) if backbone.head == "lm" else labeled
    return scoring & text_mask


@dataclass(frozen=True)
class _LabeledStates:
    """The N labeled positions: states [N, H] that score them, labels, batch rows and original columns [N]."""

    states: Tensor
    labels: Tensor
    rows: Tensor
    columns: Tensor


def _labeled_states(backbone: Backbone, trunk: TrunkOutput, labels: Tensor) -> _LabeledStates:
    aligned_labels = labels.gather(1, trunk.token_order)
    is_labeled = (aligned_labels != IGNORE) & trunk.text_mask
    positions = trunk.text_positions
    if backbone.head == "lm" and backbone.family.scores_next_token:
        positions = positions - 1
        is_labeled = is_labeled & (positions >= 0)
    rows, aligned_columns = is_labeled.nonzero(as_tuple=True)
    return _LabeledStates(
        states=trunk.hidden_states[rows, positions[rows, aligned_columns]],
        labels=aligned_labels[rows, aligned_columns],
        rows=rows,
        columns=trunk.token_order[rows, aligned_columns],
    )


def _end_states(trunk: TrunkOutput) -> Tensor:
    """The state [B, H] at the end of each row's run, which scores the first new token."""
    rows = torch.arange(len(trunk.end_positions), device=trunk.end_positions.device)
    return trunk.hidden_states[rows, trunk.end_positions]


def text_states(trunk: TrunkOutput) -> Tensor:
    """The last hidden states [B, T, H] of the text in its own layout, zero on padding."""
    width = trunk.hidden_states.shape[-1]
    states = trunk.hidden_states.gather(1, trunk.text_positions[..., None].expand(-1, -1, width))
    states = states * trunk.text_mask[..., None]
    return torch.zeros_like(states).scatter(1, trunk.token_order[..., None].expand_as(states), states)
