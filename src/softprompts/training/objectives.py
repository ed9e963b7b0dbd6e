"""Objectives: functions of a `Step` that give a scalar loss. A run minimizes a weighted sum of them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.config import closest
from softprompts.errors import ConfigError, DataError
from softprompts.types import IGNORE, Objective, Step, TeacherBatch


def task(step: Step) -> Tensor:
    """The task's own loss, in float32 at least.

    Cross-entropy for tokens and classes (mean over the N labels that are not ignored), binary cross-entropy for
    multi-label [B, C], squared error for values [B].

    Args:
        step: The step.

    Returns:
        The mean loss [].

    Raises:
        DataError: The batch has no label to learn from.
    """
    logits, labels = step.output.logits, step.output.labels
    if step.output.nll is not None:
        return step.output.nll.mean()
    if logits is None or labels is None or labels.numel() == 0:
        raise DataError("the batch holds no label to learn from; check the task's template, label column and head")
    logits = _wide(logits)
    if not labels.is_floating_point():
        return functional.cross_entropy(logits, labels, ignore_index=IGNORE)
    if labels.dim() == 2:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))


def distill_logits(step: Step) -> Tensor:
    """T² KL(teacher || student) of softmax(logits / T), mean over the N labeled positions.

    Wang et al. 2023, section 3.1 (L_Logits); both read the right answer. The factor T² keeps the size of the gradient
    the same for every temperature T (Hinton et al. 2015, section 2).

    Args:
        step: A step with a teacher.

    Returns:
        The mean divergence [].

    Raises:
        ConfigError: The step has no teacher.
    """
    teacher, output = _teacher(step), step.output
    assert output.logits is not None
    assert output.head is not None
    with torch.no_grad():
        target = (_wide(output.head(teacher.label_states)) / teacher.temperature).log_softmax(-1)
    log_probs = (_wide(output.logits) / teacher.temperature).log_softmax(-1)
    divergence = functional.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1)
    return divergence.mean() * teacher.temperature**2


def distill_hidden(step: Step) -> Tensor:
    """The mean squared difference between the teacher's and the student's states of the text.

    Wang et al. 2023, section 3.1 (L_Hidden). The paper's sum would dwarf the other losses, so a row counts with the
    mean over its elements, times its share of the batch's labels; accumulated batches then equal one large batch.
    Prompt positions do not count.

    Args:
        step: A step with a teacher.

    Returns:
        The mean over layers, text tokens and elements [].

    Raises:
        ConfigError: The step has no teacher.
    """
    teacher, output = _teacher(step), step.output
    rows = len(step.batch.input_ids)
    labels = torch.bincount(output.batch_rows, minlength=rows)
    of_layers = []
    for key, states in output.layer_states.items():
        counts = output.token_counts[key[0]]
        of_tokens = (_wide(states) - _wide(teacher.layer_states[key].to(states.device))).square().mean(-1)
        share = labels.to(of_tokens.dtype) / labels.sum()
        row = torch.arange(rows, device=of_tokens.device).repeat_interleave(counts)
        of_layers.append((of_tokens * (share / counts.clamp(min=1))[row]).sum())
    return torch.stack(of_layers).mean()


def _teacher(step: Step) -> TeacherBatch:
    if step.teacher is None:
        raise ConfigError(
            "this objective compares with a teacher, and the step has none; name them in training.distillation"
        )
    return step.teacher


def _wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


OBJECTIVES: dict[str, Objective] = {"task": task, "distill-logits": distill_logits, "distill-hidden": distill_hidden}


def weigh(weights: Mapping[str, float]) -> Objective:
    """The weighted sum of objectives; one with weight 0 is not computed.

    Raises:
        ConfigError: A name is not in OBJECTIVES.
    """
    for name in weights:
        if name not in OBJECTIVES:
            raise ConfigError(f"unknown objective '{name}'{closest(name, OBJECTIVES)} known: {', '.join(OBJECTIVES)}")

    def weighted_sum(step: Step) -> Tensor:
        return torch.stack([weight * OBJECTIVES[name](step) for name, weight in weights.items() if weight]).sum()

    return weighted_sum
