"""The tasks that a SoftPromptModel holds: which method has their prompts, which head is theirs, what a batch gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from softprompts import injection
from softprompts.artifacts.artifact import Artifact
from softprompts.backbone import Backbone
from softprompts.config import PromptConfig
from softprompts.errors import BackboneError, ConfigError
from softprompts.injection import Site
from softprompts.model import stored
from softprompts.model.sentence_encoders import Sentences
from softprompts.types import Batch, Prompt, mix_prompts


@dataclass(frozen=True)
class Task:
    """What is known of a prompt beside its tensors; `initial [P, D]` is where it began, `found` what it came from.

    group: all tasks that its method holds, in the method's order.
    """

    name: str
    site: Site
    config: PromptConfig
    initial: Tensor | None
    group: tuple[str, ...]
    found: Artifact | None = None


class Made(NamedTuple):
    """Tasks with the method that holds their prompts, and each one's head (None: it has no head of its own)."""

    tasks: Sequence[Task]
    method: Any
    heads: Sequence[nn.Module | None]


def key(*names: str) -> str:
    """Tasks' names as torch takes them for a module: no dots, none of a module's own attributes; commas between."""
    safe = [name.replace("%", "%25").replace(".", "%2E").replace(",", "%2C") for name in names]
    one = ",".join(safe)
    return f"%{one}" if hasattr(nn.ModuleDict(), one) else one


def absorb(method: Any, other: Any) -> None:
    """Give `method` the tasks of `other`, a method of the same kind; what they share is kept from `method`."""
    for part in method.per_task:
        getattr(method, part).extend(getattr(other, part))
    method.slot = replace(method.slot, tasks=(*method.slot.tasks, *other.slot.tasks))


@dataclass(eq=False)
class Held:
    """Tasks by name; `prompts` has a method for each group of tasks, `heads` a head for each task that has one.

    sentences: the encoders of whole texts that methods read with.
    """

    prompts: nn.ModuleDict
    heads: nn.ModuleDict
    tasks: dict[str, Task] = field(default_factory=dict)
    sentences: Sentences = field(default_factory=Sentences)

    def method(self, name: str) -> Any:
        """The method that holds the prompt of a task."""
        return self.prompts[key(*self.tasks[name].group)]

    def head(self, name: str) -> dict[str, Tensor]:
        """The task's own head by the names of the model's; empty where it has none."""
        return dict(self.heads[key(name)].named_parameters()) if key(name) in self.heads else {}

    def check_new(self, names: Sequence[str]) -> None:
        """Raise ConfigError unless each is a name and none is taken."""
        if isinstance(names, str) or not names:
            raise ConfigError(f"name the tasks as a list, given {names!r}")
        for i, name in enumerate(names):
            if not name:
                raise ConfigError("a task needs a name")
            if name in self.tasks or name in names[:i]:
                raise ConfigError(
                    f"there is a prompt '{name}' already; remove_task('{name}') first, or give another name"
                )

    def put(self, made: Made, device: torch.device) -> None:
        """Take tasks in and move them to `device`; tasks that bear their names already give up their places."""
        for task, head in zip(made.tasks, made.heads, strict=True):
            if task.name in self.tasks:
                self._leave(task.name)
            self.tasks[task.name] = task
            if head is not None:
                self.heads[key(task.name)] = head.to(device)
        self.prompts[key(*made.tasks[0].group)] = made.method.to(device).train(self.prompts.training)

    def join(self, made: Made, old: str) -> None:
        """Take in a task that the method of the task `old` shall hold; it begins at what they share."""
        group, (new,), (head,) = self.tasks[old].group, made.tasks, made.heads
        method: Any = self.prompts.pop(key(*group))
        absorb(method, made.method)
        first = stored.folded(method, new.name)
        self.tasks[new.name] = replace(new, initial=self.tasks[old].initial if first is None else first)
        if head is not None:
            self.heads[key(new.name)] = head
        self._regroup((*group, new.name), method)

    def remove(self, name: str) -> None:
        """Forget a task, its parameters and its head; other tasks of its method keep theirs, the same objects."""
        self._leave(name)
        del self.tasks[name]

    def last(self, names: Sequence[str]) -> None:
        """Put these tasks behind all others, in this order."""
        for name in names:
            self.tasks[name] = self.tasks.pop(name)

    def _leave(self, name: str) -> None:
        group = self.tasks[name].group
        method: Any = self.prompts.pop(key(*group))
        if key(name) in self.heads:
            del self.heads[key(name)]
        rest = tuple(other for other in group if other != name)
        if not rest:
            return
        for part in method.per_task:
            kept = [one for one, other in zip(getattr(method, part), group, strict=True) if other != name]
            setattr(method, part, type(getattr(method, part))(kept))
        method.slot = replace(method.slot, tasks=rest)
        self._regroup(rest, method)

    def _regroup(self, group: tuple[str, ...], method: Any) -> None:
        self.prompts[key(*group)] = method.train(self.prompts.training)
        for name in group:
            self.tasks[name] = replace(self.tasks[name], group=group)

    def of_batch(self, backbone: Backbone, batch: Batch, mask: Tensor) -> tuple[Batch, Prompt, Site]:
        """The prompts of all rows, whatever their tasks (places among `tasks`), and the site where they enter.

        mask [B, T]: what of the text prompts may be made from, as of `rows.readable`.

        Raises BackboneError where the sites differ.
        """
        names = tuple(self.tasks)
        used = {names[i]: self.tasks[names[i]] for i in batch.task_ids.unique().tolist()}
        sites = {name: task.site for name, task in used.items()}
        if len({(site.name, site.mode) for site in sites.values()}) > 1:
            where = ", ".join(f"{name} at {site.name}" for name, site in sites.items())
            raise BackboneError(
                f"prompts that enter at different sites cannot share a batch: {where}; batch them apart"
            )
        device = batch.task_ids.device
        batch = self._placed(backbone, batch, mask, sites)
        groups = dict.fromkeys(task.group for task in used.values())
        made, places = [], []
        for group in groups:
            own = torch.tensor([group.index(name) if name in group else -1 for name in names], device=device)[
                batch.task_ids
            ]
            places.append((own >= 0).nonzero()[:, 0])
            part, seen = (batch, mask) if len(groups) == 1 else (batch.rows(places[-1]), mask[places[-1]])
            context = self.sentences.context(
                backbone, part, own[places[-1]], seen, ids_are_text=part.inputs_embeds is None
            )
            made.append(self.prompts[key(*group)](context))
        return batch, made[0] if len(made) == 1 else mix_prompts(made, places), next(iter(sites.values()))

    def _placed(self, backbone: Backbone, batch: Batch, mask: Tensor, sites: Mapping[str, Site]) -> Batch:
        """The batch with the place of each row's prompt, where rows differ or the text says it."""
        names = tuple(self.tasks)
        own = [names[i] for i in batch.task_ids.tolist()]
        places = {name: site.place for name, site in sites.items()}
        if batch.prompt_offsets is None and (len(set(places.values())) > 1 or "suffix" in places.values()):
            # In a batch of the stock model's arguments only `mask` knows where the labels begin.
            texts, free = batch.attention_mask.bool().sum(1), mask.bool().sum(1)
            each = {place: injection.prompt_offsets(backbone, place, texts, free) for place in set(places.values())}
            batch = replace(batch, prompt_offsets=torch.stack([each[places[name]][i] for i, name in enumerate(own)]))
        if not any(site.segments for site in sites.values()):
            return batch
        sizes = {name: site.segments or (self.tasks[name].config.length,) for name, site in sites.items()}
        most = max(map(len, sizes.values()))
        rows_sizes = [[*sizes[name], *[0] * (most - len(sizes[name]))] for name in own]
        return replace(batch, segment_lengths=torch.tensor(rows_sizes, device=batch.task_ids.device))
