"""Decomposed prompt tuning (Xiao et al. 2023, arXiv 2310.10094): the prompt is a product of two narrow matrices."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import Context, ParamGroup, PromptInit, PromptSpec


class LowRankPromptTuning(PromptMethod):
    """The prompt is `columns @ rows` (figure 2): columns [P, r], rows [r, D]. Trained numbers: r·(P + D).

    Training begins at the matrix of rank r that is nearest to `init.prompt` in the Frobenius norm, which is the start
    itself where its rank is not above r; the paper begins at random.
    """

    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2310.10094"
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "rows": ParamGroup(("rows",)),
        "columns": ParamGroup(("columns",), unit="one"),
    }

    class Config(MethodConfig):
        """The options of low-rank."""

        rank: int = Field(default=10, ge=1)
        """r, the rank of the prompt."""

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        columns, rows = _nearest(init.prompt.detach(), config.rank)
        self.columns = nn.Parameter(columns)
        self.rows = nn.Parameter(rows)

    def forward(self, context: Context) -> Tensor:
        """The prompt, [P, D]."""
        return self.columns @ self.rows


def _nearest(prompt: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Columns [P, r] of root mean square one and rows [r, D] whose product is nearest to `prompt` (Eckart and Young).

    So the rows are in the prompt's own units, and both learn as fast as a prompt does at the same learning rate.
    """
    left, values, right = torch.linalg.svd(prompt.cpu().double(), full_matrices=False)
    unit, count = math.sqrt(len(prompt)), min(rank, len(values))
    columns, rows = left[:, :count] * unit, values[:count, None] * right[:count] / unit
    # Where the rank is above the prompt's, the rest of the rows is zero, and of the columns not, or none would learn.
    more = torch.randn(len(prompt), rank - count, dtype=columns.dtype).sign()
    columns, rows = torch.cat([columns, more], 1), torch.cat([rows, rows.new_zeros(rank - count, rows.shape[1])])
    return columns.float(), rows.float()
