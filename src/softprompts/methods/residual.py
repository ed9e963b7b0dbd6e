"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937): a prompt, and what a network adds to it."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import Context, ParamGroup, PromptInit, PromptSpec


class ResidualPromptTuning(PromptMethod):
    """The prompt is `P + Φ(P)`, `Φ(p) = g ∘ norm(W_up ReLU(W_down p + b_down) + b_up) + s` (section 3).

    P [P, D], W_down [b, D], W_up [D, b], and g and s [D], the scale and shift of the layer norm. The tokens of a prompt
    share Φ, or each has its own. Training begins at `init.prompt` with g = s = 0, where this is prompt tuning,
    or with g = 1, as the paper has it. Trained numbers: P·D + n·(b·(2·D + 1) + 3·D), n = 1 or P.
    """

    paper: ClassVar[str] = "Razdaibiedina et al. 2023, arXiv 2305.03937"
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        # What is normed is about one, so that scales and shifts are as large as the prompt they make.
        "prompt": ParamGroup(("prompt", "scale", "shift")),
        "network": ParamGroup(("network",), unit="one", rate=1e-3),
    }

    class Config(MethodConfig):
        """The options of residual."""

        bottleneck: int = Field(default=800, ge=1)
        """b, the hidden units of the network."""

        per_token: bool = False
        """Whether each prompt token has its own network, instead of a shared one."""

        output: Literal["zero", "torch"] = "zero"
        """How g begins: at `zero`, so that training begins at the start, or as in `torch`, at one."""

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        count, first = spec.length if config.per_token else 1, 0.0 if config.output == "zero" else 1.0
        self.prompt = nn.Parameter(init.prompt.detach().clone().float())
        self.scale = nn.Parameter(torch.full((count, spec.width), first))
        self.shift = nn.Parameter(torch.zeros(count, spec.width))
        self.network = _Network(count, spec.width, config.bottleneck)

    def forward(self, context: Context) -> Tensor:
        """The prompt, [P, D]."""
        return self.prompt + self.scale * self.network(self.prompt) + self.shift


class _Network(nn.Module):
    """The inner part of Φ for `count` networks, one for all tokens or one for each: `[P, D]` to normed `[P, D]`."""

    def __init__(self, count: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Parameter(_drawn(count, width, bottleneck, inputs=width))
        self.down_bias = nn.Parameter(_drawn(count, 1, bottleneck, inputs=width))
        self.up = nn.Parameter(_drawn(count, bottleneck, width, inputs=bottleneck))
        self.up_bias = nn.Parameter(_drawn(count, 1, width, inputs=bottleneck))

    def forward(self, prompt: Tensor) -> Tensor:
        """norm(W_up ReLU(W_down p + b_down) + b_up) of each token, [P, D]."""
        tokens = prompt.unflatten(0, (len(self.down), -1))
        states = torch.relu(tokens @ self.down + self.down_bias) @ self.up + self.up_bias
        return functional.layer_norm(states, states.shape[-1:]).flatten(0, 1)


def _drawn(*shape: int, inputs: int) -> Tensor:
    """Weights as torch draws those of a linear layer with so many inputs."""
    return (torch.rand(shape) * 2 - 1) / math.sqrt(inputs)
