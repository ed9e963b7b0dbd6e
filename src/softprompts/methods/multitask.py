"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861): one shared prompt, and for each task factors for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from softprompts.types import Context, ParamGroup, Prompt, PromptInit, PromptSpec, for_tasks


class MultitaskPromptTuning(nn.Module):
    """Task k's prompt is `shared ∘ (columns_k rows_k)` (section 3.1): shared [P, D], columns_k [P, r], rows_k [r, D].

    With r = 1 the factors scale rows and columns of the shared prompt, `diag(u_k) shared diag(v_k)`. They are the
    "fast" weights of a task, the shared prompt the "slow" ones of all. Trained numbers: P·D + K·r·(P + D) for K tasks.
    Raises ValueError for a start whose factors do not fit.
    """

    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2303.02861"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder", "layers", "kv")
    sees_input: ClassVar[bool] = False
    per_task: ClassVar[tuple[str, ...]] = ("columns", "rows")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "shared": ParamGroup(("shared",)),
        "factors": ParamGroup(("columns", "rows"), unit="one"),
    }

    @dataclass(frozen=True)
    class Config:
        """`ranks`: r, the rank of the factors' product.

        factors: `trained`, or `fixed` at one, which leaves a single prompt for all tasks (the paper's ablation without
        decomposition). start: `ones`, so that training begins at the shared prompt, or `normal` with deviation
        `spread`, PEFT's start, of which the product is nearly zero. A start that brings factors wins over both.
        """

        ranks: int = 1
        factors: Literal["trained", "fixed"] = "trained"
        start: Literal["ones", "normal"] = "ones"
        spread: float = 0.02

        def __post_init__(self) -> None:
            for name, given, possible in (
                ("factors", self.factors, ("trained", "fixed")),
                ("start", self.start, ("ones", "normal")),
            ):
                if given not in possible:
                    raise ValueError(f"{name} '{given}' is unknown; possible: {', '.join(possible)}")
            if not isinstance(self.ranks, int) or self.ranks < 1:
                raise ValueError(f"ranks must be a positive number, given {self.ranks!r}")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot = slot
        self.shared = nn.Parameter(start.prompt.detach().clone().float())
        pairs = [_factors(config, slot, start) for _ in slot.tasks]
        self.columns = nn.ParameterList(columns for columns, _ in pairs)
        self.rows = nn.ParameterList(rows for _, rows in pairs)
        if config.factors == "fixed":
            self.columns.requires_grad_(False)
            self.rows.requires_grad_(False)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks `[B]`; tasks that are not in it get no gradient."""
        return for_tasks(context.task_ids, self._prompt)

    def fold(self, task: str) -> Tensor:
        """The plain prompt `[P, D]` of `task`: the product, in float32, as training uses it."""
        return self._prompt(self.slot.tasks.index(task)).detach().clone()

    def _prompt(self, index: int) -> Tensor:
        return self.shared * (self.columns[index] @ self.rows[index])


def _factors(config: MultitaskPromptTuning.Config, slot: PromptSpec, start: PromptInit) -> tuple[Tensor, Tensor]:
    """Where a task's factors begin: columns [P, r] and rows [r, D]."""
    shapes = (slot.length, config.ranks), (config.ranks, slot.width)
    if start.factors is not None:
        for name, given, shape in zip(("columns", "rows"), start.factors, shapes, strict=True):
            if tuple(given.shape) != shape:
                raise ValueError(
                    f"the start's {name} are {list(given.shape)}, but {slot.length} prompt tokens of width "
                    f"{slot.width} with ranks {config.ranks} need {list(shape)}"
                )
        columns, rows = start.factors
        return columns.detach().clone().float(), rows.detach().clone().float()
    if config.start == "normal":
        return torch.randn(shapes[0]) * config.spread, torch.randn(shapes[1]) * config.spread
    # The first pair makes the product one. The others must differ from it, and one half of each must not be zero, or
    # no gradient would ever reach them.
    columns = torch.cat([torch.ones(slot.length, 1), torch.randn(slot.length, config.ranks - 1).sign()], 1)
    return columns, torch.cat([torch.ones(1, slot.width), torch.zeros(config.ranks - 1, slot.width)])
