"""What a stock model returns: its own output class, scores as long as its input, its loss; no prompt positions."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from softprompts import injection
from softprompts.backbone import SEQ2SEQ, Backbone
from softprompts.injection import Site, TrunkOutput
from softprompts.types import IGNORE, Batch, Prompt

Heads = Mapping[int, Mapping[str, Tensor]]
"""Tensors that replace the model's head, for each value in Batch.task_ids; empty where no task has its own head."""


@dataclass(frozen=True)
class OutputOptions:
    """What a call asks for: `labels` as the stock head takes them (spans: [B, 2]), the positions to score, and how many
    labels the loss is divided by (None: those of the batch).
    """

    labels: Tensor | None = None
    keep: int | Tensor = 0
    items: Tensor | int | None = None


def attribute(name: str, doc: str) -> Any:
    """An attribute of the stock model `self.model` as one of the object around it."""
    return property(
        lambda self: getattr(self.model, name), lambda self, value: setattr(self.model, name, value), doc=doc
    )


def output(backbone: Backbone, batch: Batch, reading: TrunkOutput, wish: OutputOptions, heads: Heads) -> Any:
    """The stock model's ModelOutput for what the trunk made of `batch`.

    Language models and token heads: logits [B, T, ...] (encoder-decoder: [B, S, V]); sequence heads [B, C]; spans
    start_logits and end_logits [B, T], padding masked; without a head last_hidden_state [B, T, H].
    """
    if backbone.head == "features":
        more = {"pooler_output": reading.output.pooler_output} if "pooler_output" in reading.output else {}
        return type(reading.output)(last_hidden_state=injection.text_states(reading), **more)
    with _class_of_outputs(backbone) as kinds:
        if backbone.head == "span":
            scores, loss = _span(backbone, batch, reading, wish, heads)
        elif backbone.head == "sequence":
            logits = _each(backbone, batch, heads, lambda: injection.sequence_scores(backbone, reading))
            scores = {"logits": logits}
            loss = None if wish.labels is None else class_loss(backbone.config, logits, wish.labels)
        elif backbone.head == "lm" and backbone.family.scores_next_token and wish.labels is not None:
            logits, loss = _shifted(backbone, reading, wish.labels, wish.items)
            scores = {"logits": logits[:, _kept(wish.keep)]}
        else:
            states = injection.text_states(reading)[:, _kept(wish.keep)]
            logits = _each(backbone, batch, heads, lambda: injection.apply_head(backbone, reading, states))
            scores = {"logits": logits}
            loss = None if wish.labels is None else token_loss(logits, wish.labels)
    return kinds[0](loss=loss, **scores)


def training_output(
    backbone: Backbone, batch: Batch, prompt: Prompt, site: Site, labels: Tensor, items: Tensor | int | None
) -> Any:
    """The stock language model's ModelOutput with a loss and without logits: only labeled positions are projected.

    Args:
        backbone: A backbone with a language model's head.
        batch: The rows.
        prompt: Their prompts.
        site: Where the prompts enter.
        labels: Labels [B, T] (encoder-decoder: [B, S]) as the stock model takes them.
        items: The number of labels that divides the loss of a causal model; None: those of the batch.

    Returns:
        The stock class of outputs. Its loss is the mean cross-entropy of the labels in float32, as in eval mode.
    """
    if backbone.family is not SEQ2SEQ:
        labels = labels.masked_fill(batch.attention_mask == 0, IGNORE)  # padding is no text, whatever its label says
    with _class_of_outputs(backbone) as kinds:
        output = injection.score(backbone, replace(batch, labels=labels), prompt, site)
    if output.nll is not None:
        losses = output.nll
    else:
        assert output.logits is not None
        assert output.labels is not None
        wide = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
        losses = functional.cross_entropy(wide, output.labels, reduction="none")
    if items is None or not backbone.family.scores_next_token:
        return kinds[0](loss=losses.mean(), logits=None)
    return kinds[0](loss=losses.sum() / (items.to(losses.device) if isinstance(items, Tensor) else items), logits=None)


def _each(backbone: Backbone, batch: Batch, heads: Heads, score: Callable[[], Tensor]) -> Tensor:
    """`score()` [B, ...] with each row's own head."""
    if not heads:
        return score()
    combined: Tensor | None = None
    parameters = dict(backbone.model.named_parameters())
    for index in batch.task_ids.unique().tolist():
        with backbone.with_head({name: value.to(parameters[name].dtype) for name, value in heads[index].items()}):
            scores = score()
        here = (batch.task_ids == index).view(-1, *[1] * (scores.dim() - 1))
        combined = scores if combined is None else torch.where(here, scores, combined)
    assert combined is not None
    return combined


@contextlib.contextmanager
def _class_of_outputs(backbone: Backbone) -> Iterator[list[type]]:
    """Collects the classes of what the stock model returns inside."""
    classes: list[type] = []
    handle = backbone.model.register_forward_hook(lambda module, args, result: classes.append(type(result)))
    try:
        yield classes
    finally:
        handle.remove()


def _kept(keep: int | Tensor) -> Any:
    return slice(-keep, None) if isinstance(keep, int) else keep


def _at(reading: TrunkOutput, position: Tensor) -> Tensor:
    return reading.hidden_states.gather(1, position[..., None].expand(-1, -1, reading.hidden_states.shape[-1]))


def _shifted(
    backbone: Backbone, reading: TrunkOutput, labels: Tensor, items: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of a causal model in the text's layout, and its loss.

    Each label is scored by the state before it in the full sequence: for the text token behind a segment of the prompt
    that is the segment's last, which the stock layout has no column for. It is scored along and then left out.
    """
    positions, columns = reading.text_positions, reading.token_order
    before = functional.pad(positions[:, :-1], (1, 0), value=-1)
    behind = (positions - 1 != before) & reading.text_mask  # tokens right behind a segment of the prompt
    count = int(behind.sum(1).max())
    at = behind.long().argsort(dim=1, descending=True, stable=True)[:, :count]
    extra = (positions.gather(1, at) - 1).clamp(min=0)
    logits = injection.apply_head(backbone, reading, _at(reading, torch.cat([extra, positions], 1)))
    wanted = labels.gather(1, columns).masked_fill(~reading.text_mask, IGNORE)
    first = wanted.gather(1, at).masked_fill(~behind.gather(1, at), IGNORE)
    others = wanted.masked_fill(behind, IGNORE)[:, 1:]
    loss = token_loss(logits, functional.pad(torch.cat([first, others], 1), (0, 1), value=IGNORE), items)
    logits = logits[:, count:]
    if bool((columns == torch.arange(columns.shape[1], device=columns.device)).all()):
        return logits, loss
    return logits.gather(1, columns.argsort(1)[..., None].expand_as(logits)), loss


def _span(
    backbone: Backbone, batch: Batch, reading: TrunkOutput, wish: OutputOptions, heads: Heads
) -> tuple[dict[str, Tensor], Tensor | None]:
    states = injection.text_states(reading)
    scores = _each(
        backbone, batch, heads, lambda: injection.span_scores(backbone, reading, states, batch.attention_mask)
    )
    start, end = scores.unbind(-1)
    loss = None
    if wish.labels is not None:
        length = start.shape[1]
        starts, ends = wish.labels.clamp(0, length).T  # as the stock head: a span outside the text is not scored
        start_loss = functional.cross_entropy(start, starts, ignore_index=length)
        loss = (start_loss + functional.cross_entropy(end, ends, ignore_index=length)) / 2
    return {"start_logits": start, "end_logits": end}, loss


def token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of logits [..., V] over labels [...], in float32: their mean, or their sum over `items`."""
    flat = logits.float().reshape(-1, logits.shape[-1])
    if items is None:
        return functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE)
    total = functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


def class_loss(config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """The stock loss of a sequence head, logits [B, C]: by `config.problem_type`, else by number and type of labels."""
    kind, count = config.problem_type, config.num_labels
    if kind is None:
        single = not labels.is_floating_point()
        kind = "regression" if count == 1 else "single_label_classification" if single else "multi"
    if kind == "regression":
        if count == 1:
            logits, labels = logits.squeeze(-1), labels.reshape(len(logits))
        return functional.mse_loss(logits, labels.to(logits.dtype))
    if kind == "single_label_classification":
        return functional.cross_entropy(logits, labels.reshape(-1))
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
