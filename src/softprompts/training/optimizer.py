"""Optimizers, the rates of their groups of parameters, and how these change from step to step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from softprompts.config import TrainConfig
from softprompts.types import ParamGroup


class _UnfactoredAdafactor(Adafactor):
    """Adafactor that keeps the full second moment, as the code of Lester et al. does for prompts."""

    @staticmethod
    def _get_options(param_group: Mapping[str, Any], param_shape: Sequence[int]) -> tuple[bool, bool]:
        return False, param_group["beta1"] is not None


def build_optimizer(
    groups: Mapping[str, ParamGroup], parameters: Mapping[str, nn.Parameter], config: TrainConfig, rms: float
) -> Any:
    """The optimizer of `parameters`, in groups that each remember their full rate under `rate`.

    Args:
        groups: The method's groups of parameters.
        parameters: What is trained, by the names of `SoftPromptModel.trainable`.
        config: The rates.
        rms: rms(E) of the word embeddings, in units of which a rate counts where group and configuration say so.
    """
    rates = []
    for name, group in groups.items():
        unit = rms if config.learning_rate_unit == "rms" and group.unit == "rms" else 1.0
        rate = config.learning_rates.get(name, config.learning_rate if group.rate is None else group.rate)
        decay = config.weight_decay if group.decay else 0.0
        rates.append(("prompts", group.parameters, rate * unit, decay))
    rates.append(("heads", ("",), config.head_learning_rate, config.weight_decay))
    parts = []
    for part, prefixes, rate, decay in rates:
        chosen = [value for name, value in parameters.items() if _belongs(name, part, prefixes)]
        if chosen:
            parts.append({"params": chosen, "lr": rate, "rate": rate, "weight_decay": decay})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parts, weight_decay=config.weight_decay)
    return _UnfactoredAdafactor(
        parts, lr=config.learning_rate, weight_decay=config.weight_decay, scale_parameter=False, relative_step=False
    )


def _belongs(name: str, part: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a parameter `prompts.TASK.TENSOR` or `heads.TASK.TENSOR` is of that part and its tensor of the group."""
    kind, _, tensor = name.split(".", 2)
    return kind == part and tensor.startswith(prefixes)


def set_rates(optimizer: Any, config: TrainConfig, step: int) -> float:
    """Set every group's rate for `step` (counted from 0) and return the first, the prompt's."""
    factor = 1.0
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    elif config.lr_scheduler_type != "constant":
        done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        factor = 1 - done if config.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return float(optimizer.param_groups[0]["lr"])
