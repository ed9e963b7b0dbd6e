"""ATTEMPT (Asai, Salehi, Peters, Hajishirzi 2022, arXiv 2205.11961): each text mixes frozen prompts of other tasks."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.methods.text import require_text
from softprompts.types import Context, ParamGroup, PromptInit, PromptOutput, PromptSpec


class SharedAttention(nn.Module):
    """The source prompts [S, P, D] and the attention that weighs them: W_down, W_up and the norm."""

    sources: Tensor

    def __init__(self, config: "Attempt.Config", spec: PromptSpec, sources: Tensor) -> None:
        super().__init__()
        self.register_buffer("sources", sources.detach().clone().float())
        self.down = nn.Linear(spec.embedding_size, config.rank, bias=False)
        self.up = nn.Linear(config.rank, spec.width, bias=False)
        self.norm = nn.LayerNorm(spec.width)

    def query(self, context: Context) -> Tensor:
        """h of each row, [B, D]."""
        text = context.attention_mask.bool()[:, :, None]
        # A last column that is no text, so that the largest value of no text at all is there too.
        embeds = nn.functional.pad(context.inputs_embeds.masked_fill(~text, -math.inf), (0, 0, 0, 1), value=-math.inf)
        pooled = embeds.amax(1)
        seen = pooled.masked_fill(~text.any(1), 0).to(self.down.weight.dtype)
        query: Tensor = self.norm(self.up(nn.functional.silu(self.down(seen))))
        return query


class Attempt(PromptMethod):
    """A prompt plus, for each text, a mixture of it and frozen source prompts, weighed by attention.

    With the pooled text `x [H]`, its largest value over the text's tokens in each coordinate, and the sources and the
    task's own prompt `P_j [P, D]`, pooled alike over their tokens, section 3 of the paper has
    `h = LayerNorm(W_up SiLU(W_down x))`, `a = softmax(<pool(P_j), h> / T)` and the prompt `P_own + sum_j a_j P_j`.
    Sources `init.sources [S, P, D]` never change; the own prompt starts at `init.prompt`, and W_down, W_up and the
    norm, which all tasks share, start as torch has them. Padding is no text; a row without text has x = 0.

    Raises:
        ValueError: There are no sources.
    """

    paper: ClassVar[str] = "Asai et al. 2022, arXiv 2205.11961"
    input_dependent: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("prompt",)),
        "attention": ParamGroup(("shared.",), unit="one", rate=1e-3),
    }
    shared: SharedAttention

    class Config(MethodConfig):
        """The options of attempt."""

        rank: int = Field(default=100, ge=1)
        """The number of rows of W_down."""

        temperature: float | None = Field(default=None, gt=0)
        """T, the temperature of the attention; None is the paper's e·D (about 2087 at D = 768)."""

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.temperature = config.temperature or math.e * spec.width
        self.prompt = nn.Parameter(init.prompt.detach().clone().float())

    @classmethod
    def share(cls, config: Config, spec: PromptSpec, init: PromptInit, tasks: Sequence[str]) -> SharedAttention:
        """The sources and the attention."""
        if init.sources is None or not len(init.sources):
            raise ValueError("it mixes trained prompts: set prompt.init.sources to the directories of some")
        return SharedAttention(config, spec, init.sources)

    def forward(self, context: Context) -> PromptOutput:
        """A prompt for each row, [B, P, D]; `attention [B, S + 1]` measures the sources' weights, then the own.

        Raises:
            PromptError: No row of a batch to learn from has text.
        """
        require_text(context)
        sources, query = self.shared.sources, self.shared.query(context)
        own_score = (query * self.prompt.amax(0)).sum(1, keepdim=True)
        scores = torch.cat([query @ sources.amax(1).T, own_score], 1)
        weights = (scores / self.temperature).softmax(1)
        mixture = torch.einsum("bs,spd->bpd", weights[:, :-1], sources)
        prompt = (1 + weights[:, -1, None, None]) * self.prompt + mixture
        return PromptOutput(prompt, measures={"attention": weights})

    def rms(self) -> Tensor:
        """The root mean square of the task's own prompt, to which the mixtures are added."""
        return self.prompt.square().mean().sqrt()
