"""Does the fast path give what plain concatenation gives? The same batch both ways: loss and gradient compared."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from softprompts import inject
from softprompts.kernels import Kernels
from softprompts.learner import Learner
from softprompts.prompt import Batch, Objective, Output, Prompt, Step

ALLOWED: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (1e-5, 1e-3),
    torch.float16: (1e-2, 0.1),
    torch.bfloat16: (2e-2, 0.2),
}
"""Relative differences of loss and gradient that are the number format's rounding.

On the default model, packed rows against concatenation, the prompt gradient moves by up to 0.06 in bfloat16 and by 1e-5
in float32 on ordinary text. Random text, whose gradient is a small difference of large sums, reaches 3e-4 in float32
with oneDNN's products.
"""


@dataclass(frozen=True)
class Parity:
    """Relative differences of loss and of the gradient of all that is trained, and the two ways compared."""

    loss: float
    gradient: float
    path: str
    plain: str
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """Whether both differences are rounding (see ALLOWED)."""
        loss, gradient = ALLOWED[self.dtype]
        return self.loss <= loss and self.gradient <= gradient

    def __str__(self) -> str:
        loss, gradient = ALLOWED[self.dtype]
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.path} against {self.plain}: loss differs by {self.loss:.1e}, gradient by {self.gradient:.1e} "
            f"(allowed in {name}: {loss:.0e}, {gradient:.0e})"
        )


def compare(learner: Learner, batch: Batch, objective: Objective) -> Parity:
    """One step of `learner` on `batch` as it is run, and as plain as can be: prompts in every row, stock kernels.

    Nothing is changed: gradients are returned to where they were. At site kv, where nothing can be concatenated, the
    plain way is the model's own cache.
    """
    plain = "shared" if learner.site.name == "kv" else "concatenation"
    stock = replace(learner, backbone=replace(learner.backbone, kernels=Kernels(rows="shared")))
    fast, path, gradients = _once(learner, batch, objective, None)
    slow, plain, expected = _once(stock, batch, objective, plain if learner.backbone.family.shifted else None)
    scale = float(torch.cat(expected).norm()) or 1.0
    return Parity(
        abs(fast - slow) / (abs(slow) or 1.0),
        float((torch.cat(gradients) - torch.cat(expected)).norm()) / scale,
        path,
        plain,
        learner.backbone.dtype,
    )


def _once(learner: Learner, batch: Batch, objective: Objective, path: str | None) -> tuple[float, str, list[Tensor]]:
    """Loss, path and flat gradients of one step; the random stream is put back, so that both ways draw the same."""
    parameters: list[nn.Parameter] = list(learner.parameters().values())

    def run(prompt: Prompt | None) -> Output:
        with learner.own_head():
            return inject.forward(learner.backbone, batch, prompt, learner.site, path=path)

    with torch.random.fork_rng(devices=[]):
        prompt = learner.prompt(batch)
        assert prompt is not None
        output = run(prompt)
        loss = objective(Step(batch, prompt, output, run))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros(p.numel()) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return float(loss.detach()), output.path, [g.detach().double().cpu().flatten() for g in flat]
