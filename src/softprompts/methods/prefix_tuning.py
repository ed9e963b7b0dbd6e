"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190) and P-tuning v2 (Liu et al. 2021, arXiv 2110.07602), in one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from softprompts.types import START, Context, ParamGroup, Prompt, PromptInit, PromptSpec, for_tasks


class PrefixTuning(nn.Module):
    """A prompt `[P, D]` for each task that enters at every layer, as keys and values, or as hidden states in encoders.

    It is the matrix itself (P-tuning v2, section 3.2), or made by a network of the task's own, which folding drops:
    `P_i = start_i + W2 tanh(W1 P'_i + b1) + b2` (Li & Liang, section 4.3), P' [P, H], W1 [h, H], W2 [D, h]. Either
    begins at `start.prompt`; the papers have no start in the second form: where it is zero, this is theirs.
    Trained numbers: P·D, or P·H + h·(H + 1) + D·(h + 1).
    """

    paper: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190; as P-tuning v2 Liu et al. 2021, arXiv 2110.07602"
    sites: ClassVar[tuple[str, ...]] = ("kv", "layers")
    sees_input: ClassVar[bool] = False
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("prompts",)),
        "network": ParamGroup(("networks",), unit="one", rate=1e-3),
    }

    @dataclass(frozen=True)
    class Config:
        """`reparametrise`: train the prompt through a network with `hidden` units, h.

        output: how the network's last layer begins: `zero`, so that training begins at the start, or `torch`, as the
        papers have it. dropout: the share of the prompt's numbers that a training step leaves out.
        """

        reparametrise: bool = False
        hidden: int = 512
        output: Literal["zero", "torch"] = "zero"
        dropout: float = 0.0

        def __post_init__(self) -> None:
            if not isinstance(self.hidden, int) or self.hidden < 1:
                raise ValueError(f"hidden must be a whole number from 1 on, given {self.hidden!r}")
            if self.output not in ("zero", "torch"):
                raise ValueError(f"output '{self.output}' is unknown; possible: zero, torch")
            if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
                raise ValueError(f"dropout must be a number from 0 to less than 1, given {self.dropout!r}")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot = slot
        self.dropout = config.dropout
        self.per_task: tuple[str, ...] = ("networks",) if config.reparametrise else ("prompts",)
        if config.reparametrise:
            self.networks = nn.ModuleList(_Network(config, slot, start.prompt) for _ in slot.tasks)
        else:
            self.prompts = nn.ParameterList(start.prompt.detach().clone().float() for _ in slot.tasks)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks `[B]`; rows of a task share what dropout leaves out."""
        return for_tasks(context.task_ids, lambda i: functional.dropout(self._prompt(i), self.dropout, self.training))

    def fold(self, task: str) -> Tensor:
        """The plain prompt `[P, D]` of `task`, nothing left out."""
        return self._prompt(self.slot.tasks.index(task)).detach().clone()

    def _prompt(self, index: int) -> Tensor:
        found: Tensor = self.networks[index]() if "networks" in self.per_task else self.prompts[index]
        return found


class _Network(nn.Module):
    """What makes one task's prompt `[P, D]`; its start is kept, as folding needs it."""

    def __init__(self, config: PrefixTuning.Config, slot: PromptSpec, start: Tensor) -> None:
        super().__init__()
        self.start: Tensor
        self.register_buffer(START, start.detach().clone().float())
        self.inputs = nn.Parameter(torch.randn(slot.length, slot.features))
        self.hidden = nn.Linear(slot.features, config.hidden)
        self.output = nn.Linear(config.hidden, slot.width)
        if config.output == "zero":
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self) -> Tensor:
        made: Tensor = self.output(torch.tanh(self.hidden(self.inputs)))
        return self.start + made
