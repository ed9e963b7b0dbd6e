"""Optimizers, the learning rates of their parameter groups, and the schedule of these rates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from softprompts.config import TrainConfig
from softprompts.errors import ConfigError
from softprompts.types import ParamGroup


class UnfactoredAdafactor(Adafactor):
    """Adafactor that keeps the full second moment, as the code of Lester et al. 2021 does for prompts."""

    @staticmethod
    def _get_options(param_group: Mapping[str, Any], param_shape: Sequence[int]) -> tuple[bool, bool]:
        return False, param_group["beta1"] is not None


def param_group(parameters: Sequence[nn.Parameter], rate: float, weight_decay: float) -> dict[str, Any]:
    """A parameter group of an optimizer, which keeps its full learning rate as `rate`."""
    return {"params": list(parameters), "lr": rate, "rate": rate, "weight_decay": weight_decay}


def prompt_param_groups(
    groups: Mapping[str, ParamGroup], parameters: Mapping[str, nn.Parameter], config: TrainConfig, rms: float
) -> list[dict[str, Any]]:
    """The parameter groups of prompts of one method and of classification heads.

    Args:
        groups: The groups of the method's parameters, which may have separate learning rates.
        parameters: The trained parameters by the names of `SoftPromptModel.trainable`: `prompts.PROMPT.TENSOR` and
            `heads.PROMPT.TENSOR`.
        config: The learning rates; in units of `rms` where the configuration and the group say so.
        rms: The root mean square of the backbone's input embeddings.

    Returns:
        The groups that have parameters, the prompts' first.

    Raises:
        ConfigError: A parameter is in no group, so that nothing would train it.
    """
    chosen = []
    for name, group in groups.items():
        unit = rms if config.learning_rate_unit == "rms" and group.unit == "rms" else 1.0
        rate = config.learning_rates.get(name, config.learning_rate if group.rate is None else group.rate)
        chosen.append(("prompts", group.parameters, rate * unit, config.weight_decay if group.decay else 0.0))
    chosen.append(("heads", ("",), config.head_learning_rate, config.weight_decay))
    param_groups = []
    missing = dict.fromkeys(parameters)
    for part, prefixes, rate, weight_decay in chosen:
        members = []
        for name, parameter in parameters.items():
            parameter_part, _, tensor = name.split(".", 2)
            if parameter_part == part and tensor.startswith(prefixes):
                members.append(parameter)
                missing.pop(name, None)
        if members:
            param_groups.append(param_group(members, rate, weight_decay))
    if missing:
        raise ConfigError(f"the method's groups ({', '.join(groups)}) hold no parameter {', '.join(missing)}")
    return param_groups


def build_optimizer(param_groups: list[dict[str, Any]], config: TrainConfig) -> Any:
    """The optimizer that `config` names, with these parameter groups."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(param_groups, weight_decay=config.weight_decay)
    return UnfactoredAdafactor(
        param_groups,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def set_rates(optimizer: Any, config: TrainConfig, step: int) -> float:
    """Set the learning rate of every group for a step.

    Args:
        optimizer: An optimizer whose groups keep their full rate as `rate`.
        config: Warmup and schedule: constant, linear (1 - x) or cosine ((1 + cos(pi x)) / 2) in the share x of the
            steps after the warmup.
        step: The number of the step, counted from 0.

    Returns:
        The learning rate of the first group.
    """
    factor = 1.0
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    elif config.lr_scheduler_type != "constant":
        share = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        factor = 1 - share if config.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * share)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return float(optimizer.param_groups[0]["lr"])
