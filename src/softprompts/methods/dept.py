"""DePT (Shi and Lipani 2024, arXiv 2309.05173): a short prompt, and a low-rank change of the text's embeddings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from softprompts.types import Context, EmbeddingDelta, ParamGroup, Prompt, PromptInit, PromptSpec, distinct


class DePT(nn.Module):
    """A task's prompt, and `scale * columns rows` added to its texts: `[P ; E[x] + c A B]` (section 2.2 of the paper).

    columns [s, r] (A) and rows [r, H] (B): token i of a text gets row i of their product, whatever token it is; beyond
    s tokens a text stays as it is. Columns begin as torch's Kaiming start with a = √5, as in the paper's code, and rows
    at zero, so that training begins at `start.prompt` and at the text as it is. Trained numbers of each task:
    P·D + (s + H)·r, which at P = 40, r = 45 and at P = 60, r = 30 are those of a prompt of 100 (s = 256, D = H = 768).
    """

    paper: ClassVar[str] = "Shi and Lipani 2024, arXiv 2309.05173"
    sites: ClassVar[tuple[str, ...]] = ("input", "decoder", "layers", "kv")
    sees_input: ClassVar[bool] = False
    per_task: ClassVar[tuple[str, ...]] = ("prompts", "columns", "rows")
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("prompts",)),
        "matrices": ParamGroup(("columns", "rows"), unit="one", rate=5e-4),
    }

    @dataclass(frozen=True)
    class Config:
        """`rank`: r; `positions`: s, the text tokens that are changed; `scale`: c, 8/√r as in the paper's code if None.

        The paper's equation has no scale (c = 1), its code has it, and its rates were found with it.
        """

        rank: int = 45
        positions: int = 256
        scale: float | None = None

        def __post_init__(self) -> None:
            for name, given in (("rank", self.rank), ("positions", self.positions)):
                if not isinstance(given, int) or given < 1:
                    raise ValueError(f"{name} must be a whole number from 1 on, given {given!r}")
            if self.scale is not None and not (isinstance(self.scale, int | float) and 0 < self.scale < math.inf):
                raise ValueError(f"scale must be a number above 0, given {self.scale!r}")

    def __init__(self, config: Config, slot: PromptSpec, start: PromptInit) -> None:
        super().__init__()
        self.slot = slot
        self.scale = 8 / math.sqrt(config.rank) if config.scale is None else config.scale
        self.prompts = nn.ParameterList(start.prompt.detach().clone().float() for _ in slot.tasks)
        first = nn.init.kaiming_uniform_(torch.empty(config.positions, config.rank), a=math.sqrt(5))
        self.columns = nn.ParameterList(first.clone() for _ in slot.tasks)
        self.rows = nn.ParameterList(torch.zeros(config.rank, slot.features) for _ in slot.tasks)

    def forward(self, context: Context) -> Prompt:
        """The distinct prompts `[U, P, D]` of the batch's tasks, with what each adds to its texts, `[U, s, H]`."""
        used, row = distinct(context.task_ids)
        values = torch.stack([self.prompts[i] for i in used.tolist()])
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        added = torch.stack([self.scale * (self.columns[i] @ self.rows[i]) for i in used.tolist()])
        return Prompt(values, mask, row, embedding_delta=EmbeddingDelta(added, context.attention_mask.bool().sum(1)))

    def size(self) -> Tensor:
        """The root mean square of the tasks' prompts; what is added to texts is not counted."""
        return torch.stack(list(self.prompts)).square().mean().sqrt()
