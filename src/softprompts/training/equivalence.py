"""Does the fast path give what plain concatenation gives? The same batch both ways: loss and gradient compared."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from softprompts.backbone import Backbone
from softprompts.backbone.kernels import Kernels
from softprompts.model import SoftPromptModel
from softprompts.types import Batch, Objective, Output, Prompt, Step, TeacherBatch

ALLOWED: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (1e-5, 1e-3),
    torch.float16: (1e-2, 0.1),
    torch.bfloat16: (2e-2, 0.2),
}
"""Relative differences of loss and gradient that are the number format's rounding in any case.

On the default model, packed rows against concatenation, the prompt gradient moves by 1e-5 in float32 on ordinary text,
and by 3e-4 with oneDNN's products on random text, whose gradient is a small difference of large sums. In bfloat16 it
moves by 0.06 to 0.26, depending on the prompt, so there the rounding of the plain way is measured too (see `compare`).
"""

NOISE = 2
"""How many times the difference between two plain ways a difference may be, where that is more than ALLOWED."""


@dataclass(frozen=True)
class Equivalence:
    """Relative differences of loss and of the gradient of all that is trained, and the two ways compared.

    noise: the same two figures between two plain ways, with transformers' own attention implementations; zeros where
    the model has only one.
    """

    loss: float
    gradient: float
    path: str
    plain: str
    dtype: torch.dtype
    noise: tuple[float, float] = (0.0, 0.0)

    @property
    def allowed(self) -> tuple[float, float]:
        """How much loss and gradient may differ."""
        loss, gradient = ALLOWED[self.dtype]
        return max(loss, NOISE * self.noise[0]), max(gradient, NOISE * self.noise[1])

    @property
    def holds(self) -> bool:
        """Whether both differences are rounding."""
        loss, gradient = self.allowed
        return self.loss <= loss and self.gradient <= gradient

    def __str__(self) -> str:
        loss, gradient = self.allowed
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.path} against {self.plain}: loss differs by {self.loss:.1e}, gradient by {self.gradient:.1e} "
            f"(allowed in {name}: {loss:.0e}, {gradient:.0e})"
        )


def compare(
    model: SoftPromptModel,
    batch: Batch,
    objective: Objective,
    teacher: TeacherBatch | None = None,
    prompts: Sequence[str] | None = None,
) -> Equivalence:
    """One step on `batch` as it is run, and as plain as can be: prompts in every row, stock kernels.

    In half precision the plain way is run with both of transformers' usual attention implementations, where the model
    has them, to see how far rounding alone goes. Nothing is changed: gradients are returned to where they were. At site
    kv, where nothing can be concatenated, the plain way is the model's own cache.

    Args:
        model: The model.
        batch: The rows; `task_ids` are places in the model's tasks.
        objective: What is minimized.
        teacher: Of the rows, where the objective compares with one.
        prompts: The prompts whose gradients are compared; None: those of the rows.
    """
    backbone = model.backbone
    names = tuple(model.registry.used(batch.task_ids).values())
    parameters = list(model.trainable(names if prompts is None else prompts).values())
    in_cache = model.registry.site_of(names).in_cache
    asked = None if not backbone.family.scores_next_token else "shared" if in_cache else "concatenation"
    fast, path, gradient = _once(model, batch, objective, None, teacher, parameters)
    plain_steps = []
    for attention in _ways(backbone):
        with _plain(model, attention):
            plain_steps.append(_once(model, batch, objective, asked, teacher, parameters))
    slow, plain, expected = plain_steps[0]
    noise = (_apart(plain_steps[-1][0], slow), _far(plain_steps[-1][2], expected))
    return Equivalence(_apart(fast, slow), _far(gradient, expected), path, plain, backbone.dtype, noise)


def _ways(backbone: Backbone) -> list[str | None]:
    """The attention implementations of the plain way: the model's own, and in half precision another one."""
    if backbone.dtype.itemsize > 2 or not backbone.model._can_set_attn_implementation():
        return [None]
    other = "eager" if backbone.model.config._attn_implementation != "eager" else "sdpa"
    return [None, other] if other == "eager" or backbone.model._supports_sdpa else [None]


@contextlib.contextmanager
def _plain(model: SoftPromptModel, attention: str | None) -> Iterator[None]:
    """Inside, the model runs with stock kernels and this attention implementation."""
    backbone = model.backbone
    model.backbone = replace(backbone, kernels=Kernels(path="shared", attn_implementation=attention))
    try:
        yield
    finally:
        model.backbone = backbone


def _apart(one: float, other: float) -> float:
    return abs(one - other) / (abs(other) or 1.0)


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / (other.norm() or 1.0))


def _once(
    model: SoftPromptModel,
    batch: Batch,
    objective: Objective,
    path: str | None,
    teacher: TeacherBatch | None,
    parameters: Sequence[nn.Parameter],
) -> tuple[float, str, Tensor]:
    """Loss, path and flat gradient of one step; both ways draw the same, and the random stream is put back."""
    layers = sorted({number for _, number in teacher.layer_states}) if teacher else []

    def run(prompt: Prompt | None) -> Output:
        if prompt is None:
            with model.no_prompt():
                return model.score(batch, path=path)
        return model.score(batch, prompts=prompt, path=path, logits=True if teacher else None, layers=layers)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of every device, so that both ways drop out the same; each step seeds itself anyway
        prompt = model.make_prompts(batch, training=True)
        output = run(prompt)
        loss = objective(Step(batch, prompt, output, run, teacher))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        filled = torch.zeros(parameter.numel()) if gradient is None else gradient
        flat.append(filled.detach().cpu().double().flatten())
    return float(loss.detach()), output.path, torch.cat(flat)
