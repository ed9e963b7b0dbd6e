"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861): one shared prompt, and for each task factors for it."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import Context, ParamGroup, PromptInit, PromptSpec


class SharedPrompt(nn.Module):
    """The prompt `[P, D]` that all tasks share."""

    def __init__(self, prompt: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(prompt.detach().clone().float())


class MultitaskPromptTuning(PromptMethod):
    """Task k's prompt is `shared ∘ (columns_k rows_k)` (section 3.1): shared [P, D], columns_k [P, r], rows_k [r, D].

    With r = 1 the factors scale rows and columns of the shared prompt, `diag(u_k) shared diag(v_k)`. They are the
    "fast" weights of a task, the shared prompt the "slow" ones of all. Trained numbers: P·D + K·r·(P + D) for K tasks.

    Raises:
        ValueError: The factors of `init` do not fit.
    """

    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2303.02861"
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "shared": ParamGroup(("shared.",)),
        "factors": ParamGroup(("columns", "rows"), unit="one"),
    }
    shared: SharedPrompt

    class Config(MethodConfig):
        """The options of multitask-prompt-tuning."""

        ranks: int = Field(default=1, ge=1)
        """r, the rank of the factors' product."""

        factors: Literal["trained", "fixed"] = "trained"
        """Whether the factors are trained, or fixed at one.

        Fixed factors leave a single prompt for all tasks, the paper's ablation without decomposition.
        """

        start: Literal["ones", "normal"] = "ones"
        """Where factors begin without a source.

        `ones`: training begins at the shared prompt. `normal`: with deviation `spread`, PEFT's start, of which the
        product is nearly zero.
        """

        spread: float = Field(default=0.02, ge=0)
        """The standard deviation of factors that start `normal`."""

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        columns, rows = _factors(config, spec, init)
        self.columns = nn.Parameter(columns, requires_grad=config.factors == "trained")
        self.rows = nn.Parameter(rows, requires_grad=config.factors == "trained")

    @classmethod
    def share(cls, config: Config, spec: PromptSpec, init: PromptInit, tasks: Sequence[str]) -> SharedPrompt:
        """The shared prompt, which starts at `init.prompt`."""
        return SharedPrompt(init.prompt)

    def forward(self, context: Context) -> Tensor:
        """The task's prompt, [P, D]."""
        return self.shared.prompt * (self.columns @ self.rows)


def _factors(config: MultitaskPromptTuning.Config, spec: PromptSpec, init: PromptInit) -> tuple[Tensor, Tensor]:
    """Where a task's factors begin: columns [P, r] and rows [r, D]."""
    shapes = (spec.length, config.ranks), (config.ranks, spec.width)
    if init.factors is not None:
        for name, factor, shape in zip(("columns", "rows"), init.factors, shapes, strict=True):
            if tuple(factor.shape) != shape:
                raise ValueError(
                    f"the start's {name} are {list(factor.shape)}, but {spec.length} prompt tokens of width "
                    f"{spec.width} with ranks {config.ranks} need {list(shape)}"
                )
        columns, rows = init.factors
        return columns.detach().clone().float(), rows.detach().clone().float()
    if config.start == "normal":
        return torch.randn(shapes[0]) * config.spread, torch.randn(shapes[1]) * config.spread
    # The first pair makes the product one. The others must differ from it, and one half of each must not be zero, or
    # no gradient would ever reach them.
    columns = torch.cat([torch.ones(spec.length, 1), torch.randn(spec.length, config.ranks - 1).sign()], 1)
    return columns, torch.cat([torch.ones(1, spec.width), torch.zeros(config.ranks - 1, spec.width)])
