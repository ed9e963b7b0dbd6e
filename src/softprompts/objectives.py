"""What is minimised: each objective is a function of a Step that gives a scalar; a run weighs and adds them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from softprompts.config import ConfigError, closest
from softprompts.prompt import IGNORE, Objective, Step


def task(step: Step) -> Tensor:
    """The task's own loss over scored positions, in float32 at least.

    Cross-entropy for tokens and classes (mean over the N labels that are not ignored), binary cross-entropy for
    multi-label [B, C], squared error for values [B].
    Raises ValueError when the batch has no label to learn from.
    """
    logits, labels = step.output.logits, step.output.labels
    if step.output.nll is not None:
        return step.output.nll.mean()
    if logits is None or labels is None or labels.numel() == 0:
        raise ValueError("the batch holds no label to learn from; check the task's template, label column and head")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not labels.is_floating_point():
        return functional.cross_entropy(logits, labels, ignore_index=IGNORE)
    if labels.dim() == 2:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))


OBJECTIVES: dict[str, Objective] = {"task": task}


def weigh(weights: Mapping[str, float]) -> Objective:
    """The weighted sum of the named objectives.

    Raises ConfigError for a name that is not in OBJECTIVES.
    """
    for name in weights:
        if name not in OBJECTIVES:
            raise ConfigError(f"unknown objective '{name}'{closest(name, OBJECTIVES)} known: {', '.join(OBJECTIVES)}")

    def total(step: Step) -> Tensor:
        return torch.stack([weight * OBJECTIVES[name](step) for name, weight in weights.items()]).sum()

    return total
