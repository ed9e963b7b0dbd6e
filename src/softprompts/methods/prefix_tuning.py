"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190) and P-tuning v2 (Liu et al. 2021, arXiv 2110.07602), in one."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import START, Context, ParamGroup, PromptInit, PromptSpec


class PrefixTuning(PromptMethod):
    """A prompt `[P, D]` that enters at every layer, as keys and values, or as hidden states in encoders.

    It is the matrix itself (P-tuning v2, section 3.2), or made by a network, which folding drops:
    `P_i = start_i + W2 tanh(W1 P'_i + b1) + b2` (Li & Liang, section 4.3), P' [P, H], W1 [h, H], W2 [D, h]. Either
    begins at `init.prompt`; the papers have no start in the second form: where it is zero, this is theirs.
    Trained numbers: P·D, or P·H + h·(H + 1) + D·(h + 1).
    """

    paper: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190; as P-tuning v2 Liu et al. 2021, arXiv 2110.07602"
    sites: ClassVar[tuple[str, ...]] = ("kv", "layers")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("prompt",)),
        "network": ParamGroup(("network",), unit="one", rate=1e-3),
    }

    class Config(MethodConfig):
        """The options of prefix-tuning."""

        reparametrize: bool = False
        """Whether the prompt is trained through a network."""

        hidden: int = Field(default=512, ge=1)
        """h, the network's hidden units."""

        output: Literal["zero", "torch"] = "zero"
        """How the network's last layer begins.

        `zero`: training begins at the start. `torch`: with torch's weights, as the papers have it.
        """

        dropout: float = Field(default=0.0, ge=0, lt=1)
        """The share of the prompt's numbers that a training step leaves out."""

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.dropout = config.dropout
        self.network: _Network | None = None
        if config.reparametrize:
            self.network = _Network(config, spec, init.prompt)
        else:
            self.prompt = nn.Parameter(init.prompt.detach().clone().float())

    def forward(self, context: Context) -> Tensor:
        """The prompt, [P, D]; the rows of a batch share what dropout leaves out."""
        prompt = self.prompt if self.network is None else self.network()
        return functional.dropout(prompt, self.dropout, self.training)


class _Network(nn.Module):
    """What makes the prompt `[P, D]`; it keeps the start, as folding needs it."""

    start: Tensor

    def __init__(self, config: PrefixTuning.Config, spec: PromptSpec, start: Tensor) -> None:
        super().__init__()
        self.register_buffer(START, start.detach().clone().float())
        self.inputs = nn.Parameter(torch.randn(spec.length, spec.embedding_size))
        self.hidden = nn.Linear(spec.embedding_size, config.hidden)
        self.output = nn.Linear(config.hidden, spec.width)
        if config.output == "zero":
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self) -> Tensor:
        """The prompt, [P, D]."""
        added: Tensor = self.output(torch.tanh(self.hidden(self.inputs)))
        return self.start + added
