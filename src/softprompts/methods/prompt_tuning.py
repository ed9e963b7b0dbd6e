"""Prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691): one learned matrix a task, nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softprompts.prompt import Context, Prompt, Slot, Start, distinct


class PromptTuning(nn.Module):
    """One prompt `[P, D]` per task, all starting at `start.prompt`; a row gets its task's prompt (section 2)."""

    @dataclass(frozen=True)
    class Config:
        """Prompt tuning has nothing to choose beyond length, place and start."""

    def __init__(self, config: Config, slot: Slot, start: Start) -> None:
        super().__init__()
        self.slot = slot
        self.prompts = nn.ParameterList(start.prompt.detach().clone().float() for _ in slot.tasks)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks `[B]`."""
        used, row = distinct(context.task)
        values = torch.stack([self.prompts[i] for i in used.tolist()])
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Prompt(values, mask, row)

    def alone(self, task: str) -> dict[str, Tensor]:
        """The state of the method for `task` alone."""
        return {"prompts.0": self.prompts[self.slot.tasks.index(task)].detach()}

    def fold(self, task: str) -> Tensor:
        """The plain prompt `[P, D]` of `task`."""
        return self.prompts[self.slot.tasks.index(task)].detach().clone()
