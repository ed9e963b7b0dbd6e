"""A frozen backbone with a method at a site and, for classification, a head of its own: what is trained and judged."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from softprompts import injection
from softprompts.backbone import Backbone
from softprompts.injection import Prefix, Site
from softprompts.model.sentence_encoders import Sentences
from softprompts.types import Batch, Context, Output, Prompt, PromptSpec, Step, in_mode, mask_before_labels


@dataclass(frozen=True)
class Learner:
    """`method` fills `slot` at `site` of the frozen `backbone`; `head` holds the task's copy of a classification head.

    sentences: the encoders of whole texts that the method reads with, and what they made of texts.
    Without a method (None) it is the stock model, read with the same head.
    """

    backbone: Backbone
    site: Site
    slot: PromptSpec
    method: Any = None
    head: dict[str, nn.Parameter] | None = None
    sentences: Sentences = field(default_factory=Sentences)

    def stock(self) -> "Learner":
        """The same backbone without a prompt."""
        return replace(self, method=None)

    def prompt(self, batch: Batch, training: bool = False) -> Prompt | None:
        """The prompts of the rows of `batch`, [U, P, D]; None without a method.

        training: for a step, with what a method does in training only, such as dropout; else to judge or to answer.
        """
        if self.method is None:
            return None
        with in_mode(self.method, training):
            made: Prompt = self.method(self.context(batch))
        return made

    def context(self, batch: Batch) -> Context:
        """What a method may look at of `batch`: of a causal text nothing from its first label on."""
        backbone = self.backbone
        mask = mask_before_labels(
            batch.attention_mask, batch.labels if backbone.head == "lm" and backbone.family.scores_next_token else None
        )
        return self.sentences.context(backbone, batch, batch.task_ids, mask)

    def step(self, batch: Batch) -> Step:
        """Run `batch` in training mode and give what objectives look at; its text is embedded once."""
        if batch.inputs_embeds is None:
            batch = replace(batch, inputs_embeds=self.backbone.embed(batch.input_ids))
        prompt = self.prompt(batch, training=True)

        def again(other: Prompt | None) -> Output:
            return self.forward(batch, other)

        assert prompt is not None
        return Step(batch, prompt, again(prompt), again)

    def forward(
        self,
        batch: Batch,
        prompt: Prompt | None,
        *,
        prefix: Prefix | None = None,
        logits: bool | None = None,
        layers: Collection[int] = (),
    ) -> Output:
        """Scores that line up with the labels of `batch`, as `inject.forward` gives them, read with the own head."""
        with self.own_head():
            return injection.score(
                self.backbone, batch, prompt, self.site, prefix=prefix, return_logits=logits, layers=layers
            )

    def fixed(self, tasks: Sequence[int]) -> Prompt | None:
        """The prompts of `tasks` for any text, one row each; None where they depend on the text."""
        if not hasattr(self.method, "fold"):
            return None
        task = torch.tensor(list(tasks), device=self.backbone.device)
        word = torch.zeros(len(task), 1, dtype=torch.long, device=task.device)  # what a text says does not matter
        return self.prompt(Batch(word, torch.ones_like(word), task))

    def rms_ratio(self) -> float:
        """rms(P)/rms(E) over the prompts of all tasks.

        Where they depend on the text, P is what the method calls its `size`; without one it is 0.
        """
        if hasattr(self.method, "fold"):
            with in_mode(self.method, False):
                prompts = torch.stack([self.method.fold(task) for task in self.slot.tasks])
            return float(prompts.detach().square().mean().sqrt()) / self.backbone.embedding_rms
        return float(self.method.size().detach()) / self.backbone.embedding_rms if hasattr(self.method, "size") else 0.0

    def reader(self, tasks: Sequence[int]) -> "Reader":
        """The learner for many batches of rows of `tasks`, which must follow each other."""
        return Reader(self, tasks[0], self.fixed(tasks))

    def own_head(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's head is the learner's copy; the model's own stays as it was."""
        if not self.head:
            return contextlib.nullcontext()
        # The copy is trained in float32 and used in the model's own number format.
        own = self.backbone.model.get_parameter
        return self.backbone.with_head({name: value.to(own(name).dtype) for name, value in self.head.items()})

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained, by name: `method.*` and `head.*`."""
        every = () if self.method is None else self.method.named_parameters()
        named = {f"method.{name}": value for name, value in every if value.requires_grad}
        return {**named, **{f"head.{k}": v for k, v in (self.head or {}).items()}}


@dataclass(frozen=True)
class Reader:
    """A learner for judging: prompts that are the same for any text are computed and read once, not once a batch.

    fixed: the prompts of the tasks from number `first` on; None where they depend on the text.
    """

    learner: Learner
    first: int
    fixed: Prompt | None
    known: dict[tuple[int, ...], tuple[Prompt, Prefix | None]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether tokens that all texts begin with can be read together with the prompts, once."""
        one = self.learner
        return (
            self.fixed is not None and one.site.name == "input" and injection.can_compute_prefix(one.backbone, one.site)
        )

    def prompts(self, batch: Batch, leading: tuple[int, ...] = ()) -> tuple[Prompt | None, Prefix | None]:
        """The prompts of the rows of `batch` and, where they were read before, what was read.

        leading: tokens that stood before every text of `batch`, and now stand behind every prompt.
        """
        if self.fixed is None:
            return self.learner.prompt(batch), None
        if leading not in self.known:
            self.known.clear()  # one is used for many batches, and then no more
            prompt = self._followed(leading)
            self.known[leading] = prompt, injection.compute_prefix(self.learner.backbone, prompt, self.learner.site)
        prompt, prefix = self.known[leading]
        return prompt.rows(batch.task_ids - self.first), prefix

    def forward(self, batch: Batch, leading: tuple[int, ...] = (), logits: bool | None = None) -> Output:
        """Scores that line up with the labels of `batch`; arguments as for `prompts` and `inject.forward`."""
        prompt, prefix = self.prompts(batch, leading)
        return self.learner.forward(batch, prompt, prefix=prefix, logits=logits)

    def _followed(self, leading: tuple[int, ...]) -> Prompt:
        """The prompts with the embeddings of `leading` behind each: to the model they are tokens like others."""
        assert self.fixed is not None
        if not leading:
            return self.fixed
        words = self.learner.backbone.embed(torch.tensor(leading, device=self.learner.backbone.device))
        dtype = torch.promote_types(words.dtype, self.fixed.values.dtype)
        each = words.to(dtype).expand(len(self.fixed.values), -1, -1)
        there = self.fixed.mask.new_ones(each.shape[:2])
        return replace(
            self.fixed,
            values=torch.cat([self.fixed.values.to(dtype), each], 1),
            mask=torch.cat([self.fixed.mask, there], 1),
        )


def copy_head(backbone: Backbone) -> dict[str, nn.Parameter] | None:
    """A trainable float32 copy of the backbone's classification head; None for models without one."""
    state = dict(backbone.model.named_parameters())
    found = {name: nn.Parameter(state[name].detach().clone().float()) for name in backbone.head_names}
    return found or None
