"""DePT (Shi and Lipani 2024, arXiv 2309.05173): a short prompt, and a low-rank change of the text's embeddings."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from softprompts.methods.base import MethodConfig, PromptMethod
from softprompts.types import Context, ParamGroup, PromptInit, PromptOutput, PromptSpec


class DePT(PromptMethod):
    """A prompt, and `scale * columns rows` added to the text: `[P ; E[x] + c A B]` (section 2.2 of the paper).

    columns [s, r] (A) and rows [r, H] (B): token i of a text gets row i of their product, whatever token it is; beyond
    s tokens a text stays as it is. Columns begin as torch's Kaiming start with a = √5, as in the paper's code, and rows
    at zero, so that training begins at `init.prompt` and at the text as it is. Trained numbers:
    P·D + (s + H)·r, which at P = 40, r = 45 and at P = 60, r = 30 are those of a prompt of 100 (s = 256, D = H = 768).
    """

    paper: ClassVar[str] = "Shi and Lipani 2024, arXiv 2309.05173"
    changes_text: ClassVar[bool] = True
    groups: ClassVar[Mapping[str, ParamGroup]] = {
        "prompt": ParamGroup(("prompt",)),
        "matrices": ParamGroup(("columns", "rows"), unit="one", rate=5e-4),
    }

    class Config(MethodConfig):
        """The options of dept."""

        rank: int = Field(default=45, ge=1)
        """r, the rank of what is added to the text."""

        positions: int = Field(default=256, ge=1)
        """s, the number of text tokens that are changed."""

        scale: float | None = Field(default=None, gt=0)
        """c, the scale of what is added; None is 8/√r, as in the paper's code.

        The paper's equation has no scale (c = 1), its code has it, and its rates were found with it.
        """

    def __init__(self, config: Config, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        super().__init__(config, spec, init, shared)
        self.scale = 8 / math.sqrt(config.rank) if config.scale is None else config.scale
        self.prompt = nn.Parameter(init.prompt.detach().clone().float())
        columns = nn.init.kaiming_uniform_(torch.empty(config.positions, config.rank), a=math.sqrt(5))
        self.columns = nn.Parameter(columns)
        self.rows = nn.Parameter(torch.zeros(config.rank, spec.embedding_size))

    def forward(self, context: Context) -> PromptOutput:
        """The prompt [P, D], and what it adds to the text, [s, H]."""
        return PromptOutput(self.prompt, embedding_delta=self.scale * (self.columns @ self.rows))

    def rms(self) -> Tensor:
        """The root mean square of the prompt; what is added to the text is not counted."""
        return self.prompt.square().mean().sqrt()
