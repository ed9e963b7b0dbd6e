"""Optimizers, the rates of their groups of parameters, and how these change from step to step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from softprompts.config import TrainConfig
from softprompts.methods import groups
from softprompts.model.learner import Learner


class _UnfactoredAdafactor(Adafactor):
    """Adafactor that keeps the full second moment, as the code of Lester et al. does for prompts."""

    @staticmethod
    def _get_options(param_group: Mapping[str, Any], param_shape: Sequence[int]) -> tuple[bool, bool]:
        return False, param_group["beta1"] is not None


def build_optimizer(learner: Learner, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> Any:
    """The optimizer of a learner's `parameters`, in groups that each remember their full rate under `rate`.

    A rate counts in units of rms(E), where the group and the configuration say so.
    """
    found = []
    for name, group in groups(learner.method).items():
        unit = learner.backbone.embedding_rms if config.rate_unit == "rms" and group.unit == "rms" else 1.0
        rate = config.rates.get(name, config.rate if group.rate is None else group.rate)
        decay = config.weight_decay if group.decay else 0.0
        found.append((tuple(f"method.{prefix}" for prefix in group.parameters), rate * unit, decay))
    parts = []
    for prefixes, rate, decay in (*found, (("head.",), config.head_rate, config.weight_decay)):
        chosen = [p for name, p in parameters.items() if name.startswith(prefixes)]
        if chosen:
            parts.append({"params": chosen, "lr": rate, "rate": rate, "weight_decay": decay})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parts, weight_decay=config.weight_decay)
    return _UnfactoredAdafactor(
        parts, lr=config.rate, weight_decay=config.weight_decay, scale_parameter=False, relative_step=False
    )


def set_rates(optimizer: Any, config: TrainConfig, step: int) -> float:
    """Set every group's rate for `step` (counted from 0) and return the first, the prompt's."""
    factor = 1.0
    if step < config.warmup:
        factor = (step + 1) / config.warmup
    elif config.schedule != "constant":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        factor = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return float(optimizer.param_groups[0]["lr"])
