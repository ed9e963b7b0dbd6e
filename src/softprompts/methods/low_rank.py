"""Decomposed prompt tuning (Xiao et al. 2023, arXiv 2310.10094): the prompt is a product of two narrow matrices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from softprompts.types import Context, ParamGroup, Prompt, PromptInit, PromptSpec, for_tasks


class LowRankPromptTuning(nn.Module):
    """Each task's prompt is `columns @ rows` (figure 2): columns [P, r], rows [r, D]. Trained numbers: r·(P + D).

    Training begins at the matrix of rank r that is nearest to `start.prompt` in the Frobenius norm, which is the start
    itself where its rank is not above r; the paper begins at random.
    """

    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2310.10094"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder", "layers", "kv")
    sees_input: ClassVar[bool] = False
    per_task: ClassVar[tuple[str, ...]] = ("columns", "rows")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "rows": ParamGroup(("rows",)),
        "columns": ParamGroup(("columns",), unit="one"),
    }

    @dataclass(frozen=True)
    class Config:
        """`rank`: r."""

        rank: int = 10

        def __post_init__(self) -> None:
            if not isinstance(self.rank, int) or self.rank < 1:
                raise ValueError(f"rank must be a whole number from 1 on, given {self.rank!r}")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot = slot
        columns, rows = _nearest(start.prompt.detach(), config.rank)
        self.columns = nn.ParameterList(columns.clone() for _ in slot.tasks)
        self.rows = nn.ParameterList(rows.clone() for _ in slot.tasks)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks `[B]`; tasks that are not in it get no gradient."""
        return for_tasks(context.task_ids, self._prompt)

    def fold(self, task: str) -> Tensor:
        """The plain prompt `[P, D]` of `task`: the product, in float32, as training uses it."""
        return self._prompt(self.slot.tasks.index(task)).detach().clone()

    def _prompt(self, index: int) -> Tensor:
        return self.columns[index] @ self.rows[index]


def _nearest(prompt: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Columns [P, r] of root mean square one and rows [r, D] whose product is nearest to `prompt` (Eckart and Young).

    So the rows are in the prompt's own units, and both learn as fast as a prompt does at the same `train.rate`.
    """
    left, values, right = torch.linalg.svd(prompt.cpu().double(), full_matrices=False)
    unit, kept = math.sqrt(len(prompt)), min(rank, len(values))
    columns, rows = left[:, :kept] * unit, values[:kept, None] * right[:kept] / unit
    # Where the rank is above the prompt's, the rest of the rows is zero, and of the columns not, or none would learn.
    more = torch.randn(len(prompt), rank - kept, dtype=columns.dtype).sign()
    columns, rows = torch.cat([columns, more], 1), torch.cat([rows, rows.new_zeros(rank - kept, rows.shape[1])])
    return columns.float(), rows.float()
