"""Prompts that are the same for any text, and leading words, read once for many batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from softprompts import injection
from softprompts.injection import Prefix, Site
from softprompts.types import Batch, Output, Prompt

if TYPE_CHECKING:
    from softprompts.model.soft_prompt_model import SoftPromptModel


class PrefixCache:
    """What the model has read of some of its prompts, for many batches whose rows use them.

    Prompts that depend on the text are computed for each batch; without prompts the stock model reads the batches.

    Args:
        model: The model; its prompts must not change while the cache is used.
        names: The prompts that the rows of the batches use; none: the stock model.
    """

    def __init__(self, model: "SoftPromptModel", names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self._fixed = model.fixed_prompts(self.names) if self.names else None
        self._local = torch.full((len(model.tasks) or 1,), -1, device=model.device)
        for place, name in enumerate(self.names):
            self._local[model.index(name)] = place
        self._entry: tuple[tuple[int, ...], Prompt, Prefix | None] | None = None

    @property
    def site(self) -> Site:
        """Where the prompts enter; without prompts it does not matter."""
        return self.model.registry.site_of(self.names) if self.names else Site()

    @property
    def reads_leading(self) -> bool:
        """Whether tokens that all texts begin with can be read together with the prompts, once."""
        if self._fixed is None:
            return False
        return self.site.at_embeddings and injection.can_compute_prefix(self.model.backbone, self.site)

    def prompts(self, batch: Batch, leading: tuple[int, ...] = ()) -> tuple[Prompt | None, Prefix | None]:
        """The prompts of the rows of `batch` and, where they were read before, what was read.

        Args:
            batch: The rows; `task_ids` are places in the model's tasks.
            leading: Tokens that preceded every text of `batch`, and are now read behind every prompt.
        """
        if not self.names:
            return None, None
        if self._fixed is None:
            return self.model.make_prompts(batch, training=False), None
        if self._entry is None or self._entry[0] != leading:  # one entry serves many batches, and then none
            self._entry = None
            prompt = self._followed(self._fixed, leading)
            prefix = injection.compute_prefix(self.model.backbone, prompt, self.site)
            self._entry = (leading, prompt, prefix)
        _, prompt, prefix = self._entry
        return prompt.rows(self._local[batch.task_ids]), prefix

    def score(self, batch: Batch, leading: tuple[int, ...] = (), return_logits: bool | None = None) -> Output:
        """Scores that line up with the labels of `batch`; see `SoftPromptModel.score`."""
        prompts, prefix = self.prompts(batch, leading)
        if prompts is None:
            with self.model.no_prompt():
                return self.model.score(batch, return_logits=return_logits)
        return self.model.score(batch, prompts=prompts, prefix=prefix, return_logits=return_logits)

    def _followed(self, prompt: Prompt, leading: tuple[int, ...]) -> Prompt:
        """The prompts with the embeddings of `leading` behind each: to the model they are tokens like others."""
        if not leading:
            return prompt
        words = self.model.backbone.embed(torch.tensor(leading, device=self.model.device))
        dtype = torch.promote_types(words.dtype, prompt.values.dtype)
        each = words.to(dtype).expand(len(prompt.values), -1, -1)
        values = torch.cat([prompt.values.to(dtype), each], 1)
        mask = torch.cat([prompt.mask, prompt.mask.new_ones(each.shape[:2])], 1)
        return replace(prompt, values=values, mask=mask)
