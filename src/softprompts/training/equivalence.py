"""Compare a step on the fast path with plain concatenation: loss and gradient of one batch, computed both ways."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from softprompts.backbone import Backbone
from softprompts.backbone.kernels import Kernels
from softprompts.errors import TrainingError
from softprompts.model import SoftPromptModel
from softprompts.types import Batch, Objective, Step, TeacherBatch

ALLOWED: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (1e-5, 1e-3),
    torch.float16: (1e-2, 0.1),
    torch.bfloat16: (2e-2, 0.2),
}
"""Relative differences of loss and gradient that are the rounding of a dtype in any case.

On the default model, packed rows move the prompt gradient by 1e-5 against concatenation, in float32 on ordinary text.
Random text, whose gradient is a small difference of large sums, moves it by 3e-4 with oneDNN's matrix products. In
bfloat16 it moves by 0.06 to 0.26, so `compare` measures the rounding of the plain way there too.
"""

NOISE = 2
"""A difference may be this many times the difference between two plain ways, where that is more than ALLOWED."""


@dataclass(frozen=True)
class Equivalence:
    """Relative differences between two ways to compute a step.

    Attributes:
        loss: The relative difference of the losses.
        gradient: The relative difference of the gradients of everything trained.
        path: The path of the fast way.
        plain: The path of the plain way.
        dtype: The dtype of the backbone.
        noise: The same two figures between two plain ways; zeros where the model has only one.
    """

    loss: float
    gradient: float
    path: str
    plain: str
    dtype: torch.dtype
    noise: tuple[float, float] = (0.0, 0.0)

    @property
    def allowed(self) -> tuple[float, float]:
        """The largest differences of loss and gradient that are rounding."""
        loss, gradient = ALLOWED[self.dtype]
        return max(loss, NOISE * self.noise[0]), max(gradient, NOISE * self.noise[1])

    @property
    def holds(self) -> bool:
        """Whether both differences are rounding."""
        loss, gradient = self.allowed
        return self.loss <= loss and self.gradient <= gradient

    def __str__(self) -> str:
        loss, gradient = self.allowed
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.path} against {self.plain}: loss differs by {self.loss:.1e}, gradient by {self.gradient:.1e} "
            f"(allowed in {dtype}: {loss:.0e}, {gradient:.0e})"
        )


def check(
    model: SoftPromptModel,
    batch: Batch,
    objective: Objective,
    teacher: TeacherBatch | None = None,
    prompts: Sequence[str] | None = None,
) -> str:
    """Compare as `compare` does, and describe the difference.

    Raises:
        TrainingError: The two ways differ by more than rounding.
    """
    equivalence = compare(model, batch, objective, teacher, prompts)
    if not equivalence.holds:
        raise TrainingError(
            f"the next batch differs from plain concatenation: {equivalence}. No step was made; set "
            f"model.attention to eager and model.matmul_backend to torch, and please report the model"
        )
    return str(equivalence)


def compare(
    model: SoftPromptModel,
    batch: Batch,
    objective: Objective,
    teacher: TeacherBatch | None = None,
    prompts: Sequence[str] | None = None,
) -> Equivalence:
    """Compute a step as the loop does, and as plainly as possible: a prompt in every row, through stock kernels.

    In half precision two plain ways, with two of transformers' attention implementations, show the size of rounding.
    At site kv, where nothing can be concatenated, the plain way is the model's own cache. Gradients stay as they were.

    Args:
        model: The model.
        batch: The rows of the step; `task_ids` [B] count the prompts of the model.
        objective: The loss of the step.
        teacher: The teachers' outputs for the rows, where the objective compares with them.
        prompts: The prompts whose gradients are compared; None compares those of the rows.

    Returns:
        The differences.
    """
    backbone = model.backbone
    names = tuple(model.registry.used(batch.task_ids).values())
    parameters = list(model.trainable(names if prompts is None else prompts).values())
    in_cache = model.registry.site_of(names).in_cache
    plain_path = None if not backbone.family.scores_next_token else "shared" if in_cache else "concatenation"
    loss, path, gradient = _loss_and_gradient(model, batch, objective, None, teacher, parameters)
    plain_steps = []
    for attention in _plain_attentions(backbone):
        with _stock_kernels(model, attention):
            plain_steps.append(_loss_and_gradient(model, batch, objective, plain_path, teacher, parameters))
    expected_loss, plain, expected = plain_steps[0]
    other_loss, _, other = plain_steps[-1]
    return Equivalence(
        loss=_relative_difference(loss, expected_loss),
        gradient=_relative_distance(gradient, expected),
        path=path,
        plain=plain,
        dtype=backbone.dtype,
        noise=(_relative_difference(other_loss, expected_loss), _relative_distance(other, expected)),
    )


def _plain_attentions(backbone: Backbone) -> list[str | None]:
    """The attention implementations of the plain way: the model's own, and in half precision another one."""
    if backbone.dtype.itemsize > 2 or not backbone.model._can_set_attn_implementation():
        return [None]
    other = "eager" if backbone.model.config._attn_implementation != "eager" else "sdpa"
    return [None, other] if other == "eager" or backbone.model._supports_sdpa else [None]


@contextlib.contextmanager
def _stock_kernels(model: SoftPromptModel, attention: str | None) -> Iterator[None]:
    """Inside, the model runs with stock kernels and this attention implementation."""
    backbone = model.backbone
    model.backbone = replace(backbone, kernels=Kernels(path="shared", attn_implementation=attention))
    try:
        yield
    finally:
        model.backbone = backbone


def _relative_difference(value: float, expected: float) -> float:
    return abs(value - expected) / (abs(expected) or 1.0)


def _relative_distance(vector: Tensor, expected: Tensor) -> float:
    return float((vector - expected).norm() / (expected.norm() or 1.0))


def _loss_and_gradient(
    model: SoftPromptModel,
    batch: Batch,
    objective: Objective,
    path: str | None,
    teacher: TeacherBatch | None,
    parameters: Sequence[nn.Parameter],
) -> tuple[float, str, Tensor]:
    """Loss, path and flat gradient of one step; all ways draw the same, and the random stream is put back."""
    layers = sorted({number for _, number in teacher.layer_states}) if teacher else []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # on every device, so that both ways drop out alike; each step seeds itself anyway
        prompt = model.make_prompts(batch, training=True)
        output = model.score(batch, prompts=prompt, path=path, return_logits=True if teacher else None, layers=layers)
        loss = objective(Step(batch, prompt, output, teacher))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        part = torch.zeros(parameter.numel()) if gradient is None else gradient.detach().cpu().flatten()
        flat.append(part.double())
    return float(loss.detach()), output.path, torch.cat(flat)
