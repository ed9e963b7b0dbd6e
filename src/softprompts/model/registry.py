"""The prompts of a SoftPromptModel by name: the method that makes each, its head, and what is known of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from softprompts import injection
from softprompts.artifacts.artifact import Artifact
from softprompts.backbone import Backbone
from softprompts.config import PromptConfig, closest
from softprompts.data import TaskTemplate
from softprompts.errors import BackboneError, ConfigError
from softprompts.injection import Site
from softprompts.methods import PromptMethod, make_prompts
from softprompts.model.sentence_encoders import SentenceEncoders
from softprompts.types import Batch, Prompt


@dataclass(frozen=True)
class PromptRecord:
    """What is known of a prompt beside its tensors.

    Attributes:
        site: Where it enters.
        config: How it was configured.
        initial: Where training began, [P, D]; None where nobody says.
        template: The task's template: how a row is put into words.
        artifact: The artifact that it was loaded from.
        run: The configuration of the run that trains it, which its artifact keeps.
        parents: Digests of the artifacts that it starts from.
        seed: The seed of its start; None where none was given.
        init_digest: The digest of a start that is not drawn as `config` describes; None where it is.
    """

    site: Site
    config: PromptConfig
    initial: Tensor | None = field(default=None, repr=False)
    template: TaskTemplate | None = None
    artifact: Artifact | None = field(default=None, repr=False)
    run: Mapping[str, Any] = field(default_factory=dict, repr=False)
    parents: tuple[str, ...] = ()
    seed: int | None = None
    init_digest: str | None = None

    @property
    def task_template(self) -> TaskTemplate | None:
        """How a row is put into words: as `template` or the artifact says."""
        if self.template is not None or self.artifact is None or self.artifact.template is None:
            return self.template
        return TaskTemplate.from_json(self.artifact.template)


@dataclass(frozen=True)
class NewPrompt:
    """A prompt that is ready to be registered: its method, its record and its head (None: the model's)."""

    name: str
    method: PromptMethod
    record: PromptRecord
    head: nn.Module | None = None


def key(name: str) -> str:
    """A prompt's name as torch takes it for a module: no dots, none of a module's own attributes."""
    safe = name.replace("%", "%25").replace(".", "%2E")
    return f"%{safe}" if hasattr(nn.ModuleDict(), safe) else safe


@dataclass(eq=False)
class PromptRegistry:
    """Prompts by name, in the order that `task_ids` count.

    Attributes:
        prompts: The method of each prompt, by `key(name)`. Methods that share something have one module `shared`.
        heads: The head of each prompt that has its own.
        records: What is known of each prompt.
        encoders: The frozen encoders of whole texts that methods read with.
    """

    prompts: nn.ModuleDict
    heads: nn.ModuleDict
    records: dict[str, PromptRecord] = field(default_factory=dict)
    encoders: SentenceEncoders = field(default_factory=SentenceEncoders)

    @property
    def names(self) -> tuple[str, ...]:
        """All prompts, in their order."""
        return tuple(self.records)

    def index(self, name: str) -> int:
        """The place of a prompt; raises ConfigError that suggests what was meant."""
        names = self.names
        if name not in names:
            raise ConfigError(f"no prompt '{name}'{closest(name, names)} loaded: {', '.join(sorted(names)) or 'none'}")
        return names.index(name)

    def method(self, name: str) -> PromptMethod:
        """The method that makes a prompt."""
        method = self.prompts[key(name)]
        assert isinstance(method, PromptMethod)
        return method

    def head(self, name: str) -> dict[str, nn.Parameter]:
        """The prompt's own head by the names of the model's parameters; empty where it has none."""
        return dict(self.heads[key(name)].named_parameters()) if key(name) in self.heads else {}

    def group(self, name: str) -> tuple[str, ...]:
        """The prompts whose methods share a module with this one, in their order; the prompt alone if none does."""
        shared = self.method(name).shared
        if shared is None:
            return (name,)
        return tuple(other for other in self.records if self.method(other).shared is shared)

    def check_new(self, names: Sequence[str]) -> None:
        """Raise ConfigError unless each is a name and none is taken."""
        if isinstance(names, str) or not names:
            raise ConfigError(f"name the tasks as a list, given {names!r}")
        for i, name in enumerate(names):
            if not name:
                raise ConfigError("a task needs a name")
            if name in self.records or name in names[:i]:
                raise ConfigError(f"prompt '{name}' already exists; remove_task('{name}') first, or give another name")

    def add(self, prompt: NewPrompt, device: torch.device) -> None:
        """Register a prompt and move it to `device`; it takes the place of one that has its name."""
        if prompt.name in self.records:
            self.heads.pop(key(prompt.name)) if key(prompt.name) in self.heads else None
        self.records[prompt.name] = prompt.record
        self.prompts[key(prompt.name)] = prompt.method.to(device).train(self.prompts.training)
        if prompt.head is not None:
            self.heads[key(prompt.name)] = prompt.head.to(device)

    def remove(self, name: str) -> None:
        """Forget a prompt and its head; prompts that share a module with it keep that module."""
        del self.records[name], self.prompts[key(name)]
        if key(name) in self.heads:
            del self.heads[key(name)]

    def move_last(self, names: Sequence[str]) -> None:
        """Put these prompts behind all others, in this order."""
        for name in names:
            self.records[name] = self.records.pop(name)

    def describe(self, name: str, segments: tuple[int, ...], run: Mapping[str, Any]) -> None:
        """Note the segments that its template gives a prompt, and the configuration of the run that trains it."""
        record = self.records[name]
        self.records[name] = replace(record, site=replace(record.site, segments=segments), run=run)

    def used(self, task_ids: Tensor) -> dict[int, str]:
        """The prompts of a batch by their places; task_ids [B]."""
        names = self.names
        return {index: names[index] for index in task_ids.unique().tolist()}

    def site_of(self, names: Sequence[str]) -> Site:
        """The site where all of these prompts enter; raises BackboneError where they differ."""
        sites = {name: self.records[name].site for name in names}
        if len({(site.name, site.mode) for site in sites.values()}) > 1:
            where = ", ".join(f"{name} at {site.name} ({site.mode})" for name, site in sites.items())
            raise BackboneError(
                f"prompts that enter at different sites cannot share a batch: {where}; put them into separate batches"
            )
        return next(iter(sites.values()))

    def make(self, backbone: Backbone, batch: Batch, mask: Tensor, ids_are_text: bool = True) -> Prompt:
        """The prompts of all rows, whatever their tasks.

        Args:
            backbone: The frozen backbone, whose embeddings and states methods may look at.
            batch: Its `task_ids` are places among the prompts.
            mask: What of the text prompts may be made from, [B, T].
            ids_are_text: Whether the batch's token ids are its text.
        """
        used = self.used(batch.task_ids)
        context = self.encoders.context(backbone, batch, mask, ids_are_text=ids_are_text)
        return make_prompts({index: self.method(name) for index, name in used.items()}, batch.task_ids, context)

    def place(self, backbone: Backbone, batch: Batch, mask: Tensor) -> Batch:
        """The batch with each row's prompt offsets and segments, where rows differ in them or the text decides.

        Args:
            backbone: The frozen backbone.
            batch: Its `task_ids` are places among the prompts.
            mask: What of the text prompts may be made from, [B, T]; it ends where the labels begin.
        """
        used = self.used(batch.task_ids)
        sites = {index: self.records[name].site for index, name in used.items()}
        rows = batch.task_ids.tolist()
        places = {site.placement for site in sites.values()}
        if batch.prompt_offsets is None and (len(places) > 1 or "suffix" in places):
            # In a batch of the stock model's arguments only `mask` knows where the labels begin.
            texts, free = batch.attention_mask.bool().sum(1), mask.bool().sum(1)
            each = {place: injection.prompt_offsets(backbone, place, texts, free) for place in places}
            offsets = torch.stack([each[sites[index].placement][row] for row, index in enumerate(rows)])
            batch = replace(batch, prompt_offsets=offsets)
        if batch.segment_lengths is not None or not any(site.segments for site in sites.values()):
            return batch
        sizes = {i: site.segments or (self.records[used[i]].config.num_virtual_tokens,) for i, site in sites.items()}
        lengths = nn.utils.rnn.pad_sequence([torch.tensor(sizes[index]) for index in rows], batch_first=True)
        return replace(batch, segment_lengths=lengths.to(batch.task_ids.device))
