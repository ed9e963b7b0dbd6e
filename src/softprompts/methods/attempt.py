"""ATTEMPT (Asai, Salehi, Peters, Hajishirzi 2022, arXiv 2205.11961): each text mixes frozen prompts of other tasks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from softprompts.methods.text import require_text
from softprompts.types import Context, ParamGroup, Prompt, PromptInit, PromptSpec, distinct


class Attempt(nn.Module):
    """A prompt per task plus, for each text, a mixture of it and frozen source prompts, weighed by attention.

    With the pooled text `x [H]`, its largest value over the text's tokens in each coordinate, and the sources and the
    task's own prompt `P_j [P, D]`, pooled alike over their tokens, section 3 of the paper has
    `h = LayerNorm(W_up SiLU(W_down x))`, `a = softmax(<pool(P_j), h> / T)` and the prompt `P_own + sum_j a_j P_j`.
    Sources `start.sources [S, P, D]` never change; each task's own prompt starts at `start.prompt`, and W_down, W_up
    and the norm, which all tasks share, start as torch has them. Padding is no text; a row without text has x = 0.

    Raises ValueError where there are no sources.
    """

    paper: ClassVar[str] = "Asai et al. 2022, arXiv 2205.11961"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder", "layers", "kv")
    sees_input: ClassVar[bool] = True
    per_task: ClassVar[tuple[str, ...]] = ("prompts",)
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("prompts",)),
        "attention": ParamGroup(("down", "up", "norm"), unit="one", rate=1e-3),
    }

    @dataclass(frozen=True)
    class Config:
        """`rank`: rows of W_down; `temperature`: T, the paper's e * D (about 2087 at 768) where it is None."""

        rank: int = 100
        temperature: float | None = None

        def __post_init__(self) -> None:
            if not isinstance(self.rank, int) or self.rank < 1:
                raise ValueError(f"rank must be a whole number from 1 on, given {self.rank!r}")
            number = isinstance(self.temperature, int | float)
            if self.temperature is not None and not (number and 0 < self.temperature < math.inf):
                raise ValueError(f"temperature must be a number above 0, given {self.temperature!r}")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        if start.sources is None or not len(start.sources):
            raise ValueError("it mixes trained prompts: set prompt.init.sources to the directories of some")
        self.slot = slot
        self.temperature = config.temperature or math.e * slot.width
        self.sources: Tensor
        self.register_buffer("sources", start.sources.detach().clone().float())
        self.prompts = nn.ParameterList(start.prompt.detach().clone().float() for _ in slot.tasks)
        self.down = nn.Linear(slot.features, config.rank, bias=False)
        self.up = nn.Linear(config.rank, slot.width, bias=False)
        self.norm = nn.LayerNorm(slot.width)

    def forward(self, context: Context) -> Prompt:
        """A prompt for each row, [B, P, D]; aux `attention [B, S + 1]` holds the sources' weights, then the own.

        Raises PromptError where no row of a batch to learn from has text.
        """
        require_text(context)
        used, row = distinct(context.task_ids)
        own = torch.stack([self.prompts[i] for i in used.tolist()])
        query = self._query(context)
        scores = torch.cat([query @ self.sources.amax(1).T, (query * own.amax(1)[row]).sum(1, keepdim=True)], 1)
        weights = (scores / self.temperature).softmax(1)
        mixed = torch.einsum("bs,spd->bpd", weights[:, :-1], self.sources)
        values = (1 + weights[:, -1, None, None]) * own[row] + mixed
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Prompt(values, mask, torch.arange(len(values), device=values.device), {"attention": weights})

    def _query(self, context: Context) -> Tensor:
        """h of each row, [B, D]."""
        text = context.attention_mask.bool()[:, :, None]
        # A last column that is no text, so that the largest value of no text at all is there too.
        embeds = nn.functional.pad(context.inputs_embeds.masked_fill(~text, -math.inf), (0, 0, 0, 1), value=-math.inf)
        pooled = embeds.amax(1)
        seen = pooled.masked_fill(~text.any(1), 0).to(self.down.weight.dtype)
        found: Tensor = self.norm(self.up(nn.functional.silu(self.down(seen))))
        return found

    def size(self) -> Tensor:
        """The root mean square of the tasks' own prompts, to which the mixtures are added."""
        return torch.stack(list(self.prompts)).square().mean().sqrt()
