"""P-tuning (Liu et al. 2021, arXiv 2103.10385): an encoder makes the prompt, whose tokens thus depend on each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from softprompts.types import START, Context, ParamGroup, Prompt, PromptInit, PromptSpec, for_tasks


class PTuning(nn.Module):
    """Each task's prompt is made by an encoder of its own from pseudo tokens `e [P, D]`; folding drops both.

    `lstm` is the paper's: `P_i = start_i + MLP([LSTM(e_0..e_i) ; LSTM(e_i..e_P)])`, two bidirectional layers of h units
    each way, then D -> D, ReLU, D -> D with h = D / 2. `mlp` has three linear layers with ReLU between them instead,
    D -> h -> h -> D. Training begins at `start.prompt`; the paper has no start: where it is zero, this is the paper's.
    Trained numbers beside the P·D of e: 8·h·(D + 4·h + 4) + 2·h·(2·h + 1) + D·(2·h + 1) for `lstm`,
    h·(D + 1) + h·(h + 1) + D·(h + 1) for `mlp`.
    """

    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2103.10385"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder")
    sees_input: ClassVar[bool] = False
    per_task: ClassVar[tuple[str, ...]] = ("networks", "outputs")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "network": ParamGroup(("networks",), unit="one", rate=1e-3),
        # The last layer's weights are as large as the prompt they make, whatever the model's embeddings are.
        "output": ParamGroup(("outputs",), rate=2e-3),
    }

    @dataclass(frozen=True)
    class Config:
        """`network`: the encoder; `hidden`: h, None for D / 2 each way of `lstm` and D of `mlp`.

        output: how the last layer begins: `zero`, so that training begins at the start, or `torch`, as in the paper.
        """

        network: Literal["lstm", "mlp"] = "lstm"
        hidden: int | None = None
        output: Literal["zero", "torch"] = "zero"

        def __post_init__(self) -> None:
            if self.network not in ("lstm", "mlp"):
                raise ValueError(f"network '{self.network}' is unknown; possible: lstm, mlp")
            if self.hidden is not None and (not isinstance(self.hidden, int) or self.hidden < 1):
                raise ValueError(f"hidden must be a whole number from 1 on, given {self.hidden!r}")
            if self.output not in ("zero", "torch"):
                raise ValueError(f"output '{self.output}' is unknown; possible: zero, torch")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot = slot
        networks = [_Network(config, slot, start.prompt) for _ in slot.tasks]
        outputs = [nn.Linear(network.width, slot.width) for network in networks]
        for output in outputs if config.output == "zero" else ():
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
        self.networks, self.outputs = nn.ModuleList(networks), nn.ModuleList(outputs)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks `[B]`; tasks that are not in it get no gradient."""
        return for_tasks(context.task_ids, self._prompt)

    def fold(self, task: str) -> Tensor:
        """The plain prompt `[P, D]` of `task`."""
        return self._prompt(self.slot.tasks.index(task)).detach().clone()

    def _prompt(self, index: int) -> Tensor:
        network = self.networks[index]
        found: Tensor = network.start + self.outputs[index](network())
        return found


class _Network(nn.Module):
    """Pseudo tokens and all of one task's encoder but its last layer: gives `[P, width]`; keeps the task's start."""

    def __init__(self, config: PTuning.Config, slot: PromptSpec, start: Tensor) -> None:
        super().__init__()
        self.start: Tensor
        self.register_buffer(START, start.detach().clone().float())
        self.inputs = nn.Parameter(torch.randn(slot.length, slot.width))
        size = config.hidden or (max(1, slot.width // 2) if config.network == "lstm" else slot.width)
        self.width = 2 * size if config.network == "lstm" else size
        self.lstm = (
            nn.LSTM(slot.width, size, 2, batch_first=True, bidirectional=True) if config.network == "lstm" else None
        )
        first = () if self.lstm is not None else (nn.Linear(slot.width, size), nn.ReLU())
        self.body = nn.Sequential(*first, nn.Linear(self.width, self.width), nn.ReLU())

    def forward(self) -> Tensor:
        seen = self.inputs if self.lstm is None else self.lstm(self.inputs[None])[0][0]
        found: Tensor = self.body(seen)
        return found
