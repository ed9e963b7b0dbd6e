"""Prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691): one learned matrix a task, nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from softprompts.types import Context, Prompt, PromptInit, PromptSpec, for_tasks


class PromptTuning(nn.Module):
    """One prompt `[P, D]` per task, all starting at `start.prompt`; a row gets its task's prompt (section 2)."""

    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder", "layers", "kv")
    sees_input: ClassVar[bool] = False
    per_task: ClassVar[tuple[str, ...]] = ("prompts",)

    @dataclass(frozen=True)
    class Config:
        """Prompt tuning has nothing to choose beyond length, place and start."""

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot = slot
        self.prompts = nn.ParameterList(start.prompt.detach().clone().float() for _ in slot.tasks)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks `[B]`."""
        return for_tasks(context.task_ids, lambda i: self.prompts[i])

    def fold(self, task: str) -> Tensor:
        """The plain prompt `[P, D]` of `task`."""
        return self.prompts[self.slot.tasks.index(task)].detach().clone()
