"""Prompt tuning (Lester, Al-Rfou, Constant 2021, arXiv 2104.08691): one learned matrix a task, nothing else."""

from typing import ClassVar

from torch import Tensor, nn

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import Context, PromptInit, PromptSpec


class PromptTuning(PromptMethod):
    """The prompt is a parameter `[P, D]` that starts at `init.prompt` (section 2)."""

    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"

    class Config(MethodConfig):
        """Prompt tuning has nothing to choose beyond length, place and start."""

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.prompt = nn.Parameter(init.prompt.detach().clone().float())

    def forward(self, context: Context) -> Tensor:
        """The prompt, [P, D]."""
        return self.prompt
