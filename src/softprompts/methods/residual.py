"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937): a prompt, and what a network adds to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompts.types import Context, ParamGroup, Prompt, PromptInit, PromptSpec, for_tasks


class ResidualPromptTuning(nn.Module):
    """Each task's prompt is `P + Φ(P)`, `Φ(p) = g ∘ norm(W_up ReLU(W_down p + b_down) + b_up) + s` (section 3).

    P [P, D], W_down [b, D], W_up [D, b], and g and s [D], the scale and shift of the layer norm. The tokens of a task
    share Φ, or each has one of its own. Training begins at `start.prompt` with g = s = 0, where this is prompt tuning,
    or with g = 1, as the paper has it. Trained numbers: P·D + n·(b·(2·D + 1) + 3·D), n = 1 or P.
    """

    paper: ClassVar[str] = "Razdaibiedina et al. 2023, arXiv 2305.03937"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder", "layers", "kv")
    sees_input: ClassVar[bool] = False
    per_task: ClassVar[tuple[str, ...]] = ("prompts", "scales", "shifts", "networks")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        # What is normed is about one, so that scales and shifts are as large as the prompt they make.
        "prompt": ParamGroup(("prompts", "scales", "shifts")),
        "network": ParamGroup(("networks",), unit="one", rate=1e-3),
    }

    @dataclass(frozen=True)
    class Config:
        """`bottleneck`: b; `per_token`: a network for each prompt token, instead of one that they share.

        output: how g begins: `zero`, so that training begins at the start, or `torch`, at one.
        """

        bottleneck: int = 800
        per_token: bool = False
        output: Literal["zero", "torch"] = "zero"

        def __post_init__(self) -> None:
            if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
                raise ValueError(f"bottleneck must be a whole number from 1 on, given {self.bottleneck!r}")
            if self.output not in ("zero", "torch"):
                raise ValueError(f"output '{self.output}' is unknown; possible: zero, torch")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot = slot
        count, first = slot.length if config.per_token else 1, 0.0 if config.output == "zero" else 1.0
        self.prompts = nn.ParameterList(start.prompt.detach().clone().float() for _ in slot.tasks)
        self.scales = nn.ParameterList(torch.full((count, slot.width), first) for _ in slot.tasks)
        self.shifts = nn.ParameterList(torch.zeros(count, slot.width) for _ in slot.tasks)
        self.networks = nn.ModuleList(_Network(count, slot.width, config.bottleneck) for _ in slot.tasks)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks `[B]`; tasks that are not in it get no gradient."""
        return for_tasks(context.task_ids, self._prompt)

    def fold(self, task: str) -> Tensor:
        """The plain prompt `[P, D]` of `task`."""
        return self._prompt(self.slot.tasks.index(task)).detach().clone()

    def _prompt(self, index: int) -> Tensor:
        prompt = self.prompts[index]
        return prompt + self.scales[index] * self.networks[index](prompt) + self.shifts[index]


class _Network(nn.Module):
    """The inner part of Φ for `count` networks, one for all tokens or one for each: `[P, D]` to normed `[P, D]`."""

    def __init__(self, count: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Parameter(_drawn(count, width, bottleneck, inputs=width))
        self.down_bias = nn.Parameter(_drawn(count, 1, bottleneck, inputs=width))
        self.up = nn.Parameter(_drawn(count, bottleneck, width, inputs=bottleneck))
        self.up_bias = nn.Parameter(_drawn(count, 1, width, inputs=bottleneck))

    def forward(self, prompt: Tensor) -> Tensor:
        tokens = prompt.unflatten(0, (len(self.down), -1))
        made = torch.relu(tokens @ self.down + self.down_bias) @ self.up + self.up_bias
        return functional.layer_norm(made, made.shape[-1:]).flatten(0, 1)


def _drawn(*shape: int, inputs: int) -> Tensor:
    """Weights as torch draws those of a linear layer with so many inputs."""
    return (torch.rand(shape) * 2 - 1) / math.sqrt(inputs)
