"""P-tuning (Liu et al. 2021, arXiv 2103.10385): an encoder makes the prompt, whose tokens thus depend on each other."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import START, Context, ParamGroup, PromptInit, PromptSpec


class PTuning(PromptMethod):
    """The prompt is made by an encoder from pseudo tokens `e [P, D]`; folding drops both.

    `lstm` is the paper's: `P_i = start_i + MLP([LSTM(e_0..e_i) ; LSTM(e_i..e_P)])`, two bidirectional layers of h units
    each way, then D -> D, ReLU, D -> D with h = D / 2. `mlp` has three linear layers with ReLU between them instead,
    D -> h -> h -> D. Training begins at `init.prompt`; the paper has no start: where it is zero, this is the paper's.
    Trained numbers beside the P·D of e: 8·h·(D + 4·h + 4) + 2·h·(2·h + 1) + D·(2·h + 1) for `lstm`,
    h·(D + 1) + h·(h + 1) + D·(h + 1) for `mlp`.
    """

    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2103.10385"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "network": ParamGroup(("network",), unit="one", rate=1e-3),
        # The last layer's weights are as large as the prompt they make, whatever the model's embeddings are.
        "output": ParamGroup(("output",), rate=2e-3),
    }

    class Config(MethodConfig):
        """The options of p-tuning."""

        network: Literal["lstm", "mlp"] = "lstm"
        """The encoder."""

        hidden: int | None = Field(default=None, ge=1)
        """h, the hidden units; None is D / 2 each way of `lstm` and D of `mlp`."""

        output: Literal["zero", "torch"] = "zero"
        """How the last layer begins.

        `zero`: training begins at the start. `torch`: with torch's weights, as in the paper.
        """

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.network = _Network(config, spec, init.prompt)
        self.output = nn.Linear(self.network.width, spec.width)
        if config.output == "zero":
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, context: Context) -> Tensor:
        """The prompt, [P, D]."""
        prompt: Tensor = self.network.start + self.output(self.network())
        return prompt


class _Network(nn.Module):
    """Pseudo tokens and all of the encoder but its last layer; it keeps the start, as folding needs it."""

    start: Tensor

    def __init__(self, config: PTuning.Config, spec: PromptSpec, start: Tensor) -> None:
        super().__init__()
        self.register_buffer(START, start.detach().clone().float())
        self.inputs = nn.Parameter(torch.randn(spec.length, spec.width))
        size = config.hidden or (max(1, spec.width // 2) if config.network == "lstm" else spec.width)
        self.width = 2 * size if config.network == "lstm" else size
        self.lstm = (
            nn.LSTM(spec.width, size, 2, batch_first=True, bidirectional=True) if config.network == "lstm" else None
        )
        first = () if self.lstm is not None else (nn.Linear(spec.width, size), nn.ReLU())
        self.body = nn.Sequential(*first, nn.Linear(self.width, self.width), nn.ReLU())

    def forward(self) -> Tensor:
        """The states [P, width] that the last layer reads."""
        seen = self.inputs if self.lstm is None else self.lstm(self.inputs[None])[0][0]
        states: Tensor = self.body(seen)
        return states
