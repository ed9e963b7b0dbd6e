"""A frozen backbone with a method at a site and, for classification, a head of its own: what is trained and judged."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softprompts import inject
from softprompts.backbone import Backbone
from softprompts.inject import Site
from softprompts.prompt import Batch, Context, Output, Prompt, Slot, Step


@dataclass(frozen=True)
class Learner:
    """`method` fills `slot` at `site` of the frozen `backbone`; `head` holds the task's copy of a classification head.

    Without a method (None) it is the stock model, read with the same head.
    """

    backbone: Backbone
    site: Site
    slot: Slot
    method: Any = None
    head: dict[str, nn.Parameter] | None = None

    def stock(self) -> "Learner":
        """The same backbone without a prompt."""
        return replace(self, method=None)

    def prompt(self, batch: Batch) -> Prompt | None:
        """The prompts of the rows of `batch`, [U, P, D]; None without a method."""
        if self.method is None:
            return None
        backbone = self.backbone
        embeds = backbone.embed(batch.ids) if batch.embeds is None else batch.embeds

        def encode() -> Tensor:
            with torch.no_grad():
                states = inject.forward(backbone, replace(batch, labels=None), None, self.site, hidden=True).hidden
            assert states is not None
            return states

        made: Prompt = self.method(Context(batch.task, batch.ids, embeds, batch.mask, encode))
        return made

    def step(self, batch: Batch) -> Step:
        """Run `batch` and give what objectives look at."""
        prompt = self.prompt(batch)

        def again(other: Prompt | None) -> Output:
            return self.forward(batch, other)

        assert prompt is not None
        return Step(batch, prompt, again(prompt), again)

    def forward(self, batch: Batch, prompt: Prompt | None) -> Output:
        """Scores that line up with the labels of `batch`, as `inject.forward` gives them, read with the own head."""
        with self.own_head():
            return inject.forward(self.backbone, batch, prompt, self.site)

    def own_head(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's head is the learner's copy; the model's own stays as it was."""
        if not self.head:
            return contextlib.nullcontext()
        # The copy is trained in float32 and used in the model's own number format.
        own = self.backbone.model.get_parameter
        return self.backbone.with_head({name: value.to(own(name).dtype) for name, value in self.head.items()})

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained, by name: `method.*` and `head.*`."""
        named = {} if self.method is None else {f"method.{k}": v for k, v in self.method.named_parameters()}
        return {**named, **{f"head.{k}": v for k, v in (self.head or {}).items()}}


def copy_head(backbone: Backbone) -> dict[str, nn.Parameter] | None:
    """A trainable float32 copy of the backbone's classification head; None for models without one."""
    state = dict(backbone.model.named_parameters())
    found = {name: nn.Parameter(state[name].detach().clone().float()) for name in backbone.head_names}
    return found or None
