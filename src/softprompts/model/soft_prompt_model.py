"""SoftPromptModel: a stock transformers model with named prompts, each task with its own copy of the head."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompts import injection
from softprompts.artifacts import artifact, collection
from softprompts.artifacts.artifact import Artifact
from softprompts.backbone import Backbone, wrap
from softprompts.config import ModelConfig, parse
from softprompts.data import ExampleTokenizer, TaskTemplate
from softprompts.errors import BackboneError, ConfigError
from softprompts.injection import Prefix, Site, generation
from softprompts.model import persistence, setup, stock_inputs
from softprompts.model import stock_outputs as stock
from softprompts.model.persistence import AnyConfig, Start
from softprompts.model.prefix_cache import PrefixCache
from softprompts.model.registry import NewPrompt, PromptRegistry, key
from softprompts.types import Batch, Context, Output, Prompt, PromptInit


class SoftPromptModel(nn.Module):
    """A stock model, which it freezes in place, with any number of named prompts.

    It has two doors. `score` gives scores that line up with a batch's labels: objectives, ranking and serving read it.
    `forward` gives the stock model's ModelOutput: Trainer and people read it. Both run on the same kernels.

    Of all tensors only the prompts and, in classification models, a copy of the head for each prompt require a
    gradient, and only they are in `state_dict`; the model's own head stays as it was. The model begins in eval mode, as
    models of from_pretrained do; `train()` turns on what prompts do in training only. The object's class is a subclass
    with the stock class's name, because Trainer and pipelines go by that name (whether labels are shifted, which
    arguments are labels, which tasks a model is for).

    Args:
        model: A stock transformers model, or a `Backbone`.
        config: What the first prompt is: a PromptConfig, or a PromptTuningConfig or MultitaskPromptTuningConfig under
            PEFT's names; None: begin without a prompt.
        task: The first prompt's name.
        tokenizer: The model's tokenizer, for prompts that start from words and for templates.
        tasks: Names of several prompts that share what their method shares; without them the tasks of a
            MultitaskPromptTuningConfig are called 0, 1, ...
        autotune: Whether a stock model runs with the kernels that are fastest on its device. They are measured before
            its first pass, once per model and machine, and cached. A `Backbone` keeps its kernels.

    Attributes:
        backbone: The frozen model as the library sees it.
        prompts: The method of each prompt.
        heads: The head of each prompt that has its own.
        registry: What is known of each prompt.

    Raises:
        BackboneError: The model does not have the site.
        ConfigError: The configuration makes no sense.
    """

    def __init__(
        self,
        model: PreTrainedModel | Backbone,
        config: AnyConfig | None = None,
        task: str = "default",
        tokenizer: Any = None,
        tasks: Sequence[str] | None = None,
        *,
        autotune: bool = True,
    ) -> None:
        super().__init__()
        self.backbone: Backbone = model if isinstance(model, Backbone) else wrap(model, tokenizer)
        stock_model = self.backbone.model
        self.model = stock_model
        self._autotune = autotune and not isinstance(model, Backbone)
        self._tuned_for: tuple[torch.device, torch.dtype] | None = None
        self.prompts = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        # Only a causal language model's loss can be divided by the labels of several batches, as in the stock models.
        self.accepts_loss_kwargs = self.backbone.head == "lm" and self.backbone.family.scores_next_token
        self.registry = PromptRegistry(self.prompts, self.heads)
        self._active: str | None = None
        self._prompted = True
        self.eval()  # as transformers' from_pretrained leaves its models: who trains says train()
        if hasattr(stock_model, "prepare_decoder_input_ids_from_labels"):  # data collators look for it
            self.prepare_decoder_input_ids_from_labels = stock_model.prepare_decoder_input_ids_from_labels
        if type(self) is SoftPromptModel:
            stock_class: Any = type(stock_model)
            self.__class__ = _called(stock_class, self.backbone.head)
        if config is not None:
            self.add_tasks(persistence.prompt_names(config, task, tasks), config)
        elif tasks is not None:
            raise ConfigError("tasks names prompts, but config is missing; give a config for them")

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | str | Path,
        path: str | Path | None = None,
        tokenizer: Any = None,
        allow_other_weights: bool = False,
        *,
        config: ModelConfig | None = None,
        autotune: bool = True,
        log: Callable[[str], None] = setup.no_log,
    ) -> "SoftPromptModel":
        """A model in eval mode, with prompts where there are some.

        Args:
            model: A stock model; or the name of a packaged model, a local model directory, or a hub name; or a
                directory of prompts, ours or PEFT's, which name the model that they were made for.
            path: A directory of prompts that `save_pretrained` or PEFT wrote; None: no prompts.
            tokenizer: The stock model's tokenizer.
            allow_other_weights: Whether prompts that were made for other weights only cost a warning.
            config: How a named model is loaded: number format, device, head, kernels. What it leaves out is as by
                default or, for prompts, as in the run that made them. Its name does not count.
            autotune: Whether the kernels that the configuration leaves open are measured, once per model and machine.
            log: Receives a line about each step of loading a named model.

        Raises:
            ArtifactError: As `load_prompt` does.
            BackboneError: A named model cannot be loaded.
            AssetError: A packaged model cannot be fetched.
        """
        if isinstance(model, str | Path):
            changes = {} if config is None else config.model_dump(include=config.model_fields_set - {"name"})
            if path is None and (collection.is_artifact(Path(model)) or collection.written_by_softprompts(Path(model))):
                path = model
            else:
                changes["name"] = str(model)
            if path is None:
                prompted = cls(setup.load_backbone(parse(changes, ModelConfig, "model"), autotuned=autotune, log=log))
            else:
                member = collection.member_groups(Path(path))[0][0]
                first = artifact.load(member.path, member.task)
                loading = backbone_config(first, changes=changes)
                prompted = cls(setup.load_backbone(loading, labels=head_rows(first), autotuned=autotune, log=log))
        else:
            prompted = cls(model, tokenizer=tokenizer, autotune=autotune)
        if path is not None:
            prompted.load_prompts(path, allow_other_weights)
        return prompted.eval()

    # The prompts

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the prompts, in the order that `task_ids` count."""
        return self.registry.names

    @property
    def task(self) -> str:
        """The task of rows that name none; assign another of `tasks` to change it."""
        if self._active is None:
            raise ConfigError("no prompt is loaded; use add_task or load_prompt first, or no_prompt() to do without")
        return self._active

    @task.setter
    def task(self, name: str) -> None:
        self._active = self.tasks[self.index(name)]

    def index(self, name: str) -> int:
        """The place of a prompt in `tasks`; raises ConfigError that suggests what was meant."""
        return self.registry.index(name)

    def add_prompt(
        self,
        name: str,
        config: AnyConfig | None = None,
        template: TaskTemplate | None = None,
        *,
        init: PromptInit | None = None,
        seed: int | None = None,
        modules_to_save: Sequence[str] | None = None,
    ) -> None:
        """Add a prompt called `name`.

        Args:
            name: Its name.
            config: What it is; None: like the active prompt, sharing with it what its method shares.
            template: How a row of the task is put into words; its label words are those of `init: labels`.
            init: Where it starts; None: as `config` says. A prompt that shares parameters starts at the shared ones.
            seed: Of the start and of what the method draws for itself.
            modules_to_save: Modules of the head that are trained along; None takes what `config` says, else the whole
                classification head.

        Raises:
            ConfigError: The name is taken, the head does not have the modules, or `init` is given for a prompt that
                starts at shared parameters.
            BackboneError: The model does not have the site.
        """
        if config is None:
            config = self.registry.records[self.task].config
            if self.registry.method(self.task).shares_parameters:
                self.registry.check_new((name,))
                if init is not None:
                    raise ConfigError(
                        f"'{name}' shares the prompt of '{self.task}' and starts there; leave init out, or give a "
                        f"config for a separate prompt"
                    )
                shared = persistence.create_sharing(
                    self.backbone,
                    self.registry,
                    name,
                    self.task,
                    template=template,
                    seed=seed,
                    modules_to_save=modules_to_save,
                )
                self.registry.add(shared, self.device)
                return
        labels = () if template is None else label_words(template)
        start = Start(init, seed, labels)
        self.add_prompts((name,), config, (template,), start=start, modules_to_save=modules_to_save)

    def add_prompts(
        self,
        names: Sequence[str],
        config: AnyConfig,
        templates: Sequence[TaskTemplate | None] | None = None,
        *,
        start: Start | None = None,
        modules_to_save: Sequence[str] | None = None,
    ) -> None:
        """Add prompts that share what the method of `config` shares; arguments and errors as for `add_prompt`."""
        self.registry.check_new(names)
        created = persistence.create(
            self.backbone,
            self.registry.encoders,
            tuple(names),
            config,
            start=start,
            modules_to_save=modules_to_save,
            templates=templates,
        )
        for prompt in created:
            self._add(prompt)

    def add_task(
        self, name: str, config: AnyConfig | None = None, modules_to_save: Sequence[str] | None = None
    ) -> None:
        """The same as `add_prompt`, by PEFT's word."""
        self.add_prompt(name, config, modules_to_save=modules_to_save)

    def add_tasks(self, names: Sequence[str], config: AnyConfig, modules_to_save: Sequence[str] | None = None) -> None:
        """The same as `add_prompts`, by PEFT's word."""
        self.add_prompts(names, config, modules_to_save=modules_to_save)

    def remove_prompt(self, name: str) -> None:
        """Forget the prompt called `name` and its head; the first of the others takes its place where it was active."""
        self.index(name)
        self.registry.remove(name)
        if self._active == name:
            self._active = next(iter(self.tasks), None)

    remove_task = remove_prompt

    def load_prompt(
        self,
        path: str | Path,
        task: str | None = None,
        allow_other_weights: bool = False,
        *,
        trainable: bool = True,
    ) -> tuple[str, list[str]]:
        """Load a trained prompt, ours or PEFT's, to use it or to train it on.

        Args:
            path: The directory of the artifact.
            task: A name other than the artifact's own; a prompt of that name is replaced.
            allow_other_weights: Whether a prompt that was made for other weights only costs a warning.
            trainable: Whether it is to be trained on; if not, a plain prompt is opened without its method.

        Returns:
            The prompt's name, and warnings.

        Raises:
            ArtifactError: The prompt was made for other weights or does not fit, saying how.
        """
        prompt, warnings = persistence.open_artifact(
            self.backbone,
            self.registry.encoders,
            path,
            name=task,
            allow_other_weights=allow_other_weights,
            trainable=trainable,
        )
        self._add(prompt)
        return prompt.name, warnings

    def load_prompts(self, path: str | Path, allow_other_weights: bool = False) -> tuple[tuple[str, ...], list[str]]:
        """Load all prompts of a directory, those together that share something; returns their names and warnings.

        Raises:
            ArtifactError: As `load_prompt` does.
        """
        prompts, order, warnings = persistence.open_directory(
            self.backbone, self.registry.encoders, Path(path), allow_other_weights
        )
        for prompt in prompts:
            self._add(prompt)
        self.registry.move_last(order)
        return order, warnings

    def pack(self, name: str, *, task: str | None = None, scores: Mapping[str, Any] | None = None) -> Artifact:
        """The artifact of a prompt as it is now; `task`: what it calls the task, if not the prompt's name."""
        self.index(name)
        return persistence.pack(self.backbone, self.registry, name, task=task, scores=scores)

    def save_prompt(self, name: str, directory: str | Path) -> Path:
        """Write one prompt as an artifact into `directory`; `load_prompt` is the way back.

        Raises:
            ArtifactError: The disk, or what is in the directory, forbids it.
        """
        return artifact.save(self.pack(name), directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write one prompt as an artifact into `directory`, several each into a sub-directory of it.

        Beside the sub-directories lie PEFT's two files for prompts that share one, where PEFT can reproduce them.

        Raises:
            ArtifactError: The disk, or what is in the directory, forbids it.
        """
        persistence.save(self.backbone, self.registry, Path(directory))

    def example_tokenizer(self, name: str) -> ExampleTokenizer:
        """What turns rows of a prompt's task into tokens.

        Raises:
            ConfigError: Nobody said how a row is put into words.
        """
        place, record = self.index(name), self.registry.records[name]
        template = record.task_template
        if template is None:
            raise ConfigError(f"prompt '{name}' has no template; give one to add_prompt")
        return setup.example_tokenizer(
            self.backbone, template, record.config.num_virtual_tokens, place, record.site.placement
        )

    @contextlib.contextmanager
    def no_prompt(self) -> Iterator[None]:
        """Inside, this is the stock model and nothing else."""
        before, self._prompted = self._prompted, False
        try:
            yield
        finally:
            self._prompted = before

    def _add(self, prompt: NewPrompt) -> None:
        self.registry.add(prompt, self.device)
        self._active = self._active or prompt.name

    # Scores that line up with labels

    def score(
        self,
        batch: Batch,
        *,
        prompts: Prompt | None = None,
        prefix: Prefix | None = None,
        return_logits: bool | None = None,
        layers: Collection[int] = (),
        path: str | None = None,
    ) -> Output:
        """Scores that line up with the labels of `batch`, for the labeled positions only.

        Args:
            batch: The rows; `task_ids` [B] are places in `tasks`.
            prompts: Their prompts, as `make_prompts` gives them; None: they are made.
            prefix: What was read of these prompts before; see `PrefixCache`.
            return_logits: Of a language model the scores [N, V] (True) or each label's negative log-likelihood [N]
                alone (False); None takes the latter where scores would be large.
            layers: Layers whose states of the text are returned too; 1 is the first, -1 what the head reads.
            path: `packed`, `shared` or `concatenation`; None takes the best that is possible.

        Raises:
            BackboneError: Prompt and text do not fit the model's positions, or the rows' prompts cannot share a batch.
        """
        self._tune()
        options: dict[str, Any] = {"prefix": prefix, "return_logits": return_logits, "layers": layers, "path": path}
        if not self._prompted:
            return injection.score(self.backbone, batch, None, Site(), **options)
        names = tuple(self.registry.used(batch.task_ids).values())
        site = self.registry.site_of(names)
        if prompts is None:
            prompts = self.make_prompts(batch)
        if len({self.registry.records[name].site for name in names}) > 1:
            batch = self.registry.place(self.backbone, batch, self._readable(batch))
        with self._own_head(names):
            return injection.score(self.backbone, batch, prompts, site, **options)

    def make_prompts(self, batch: Batch, training: bool | None = None) -> Prompt:
        """The distinct prompts [U, P, D] of the rows of `batch`.

        Args:
            batch: The rows; `task_ids` [B] are places in `tasks`.
            training: Whether methods do what they do in training only, such as dropout; None: as `train()` and
                `eval()` have set it.
        """
        with self._in_mode(training):
            return self.registry.make(self.backbone, batch, self._readable(batch))

    def fixed_prompts(self, names: Sequence[str]) -> Prompt | None:
        """The prompts called `names` for any text, one row each; None where one depends on the text or changes it."""
        methods = [self.registry.method(name) for name in names]
        if any(method.input_dependent or method.changes_text for method in methods):
            return None
        task_ids = torch.tensor([self.index(name) for name in names], device=self.device)
        word = torch.zeros(len(names), 1, dtype=torch.long, device=self.device)  # what a text says does not matter
        return self.make_prompts(Batch(word, torch.ones_like(word), task_ids), training=False)

    def context(self, batch: Batch) -> Context:
        """What a method may look at of `batch`: of a causal text nothing from its first label on."""
        return self.registry.encoders.context(self.backbone, batch, self._readable(batch))

    def trainable(self, names: Sequence[str] | Mapping[str, str] | None = None) -> dict[str, nn.Parameter]:
        """What is trained of some prompts, each parameter once, by its name in `state_dict`.

        Args:
            names: The prompts, or the prompts with what each is called in the result; None: all.

        Raises:
            ConfigError: Two prompts have one name in the result.
        """
        trainable: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        names = self.tasks if names is None else names
        labels = names if isinstance(names, Mapping) else {name: name for name in names}
        if len(set(labels.values())) < len(labels):
            raise ConfigError(f"prompts need different names in the result, given {', '.join(labels.values())}")
        for part, modules in (("prompts", self.prompts), ("heads", self.heads)):
            for name, label in labels.items():
                if key(name) not in modules:
                    continue
                for tensor, parameter in modules[key(name)].named_parameters():
                    if parameter.requires_grad and id(parameter) not in seen:
                        seen.add(id(parameter))
                        trainable[f"{part}.{key(label)}.{tensor}"] = parameter
        return trainable

    def rms_ratio(self, names: Sequence[str]) -> float | None:
        """rms(P)/rms(E) over the prompts called `names`; None where only the prompts of a batch say how large they are.

        P are the prompts, or what their methods call `rms`; E are the word embeddings.
        """
        sizes = []
        with torch.no_grad():
            for name in names:
                size = self.registry.method(name).rms()
                if size is None:
                    return None
                sizes.append(float(size))
        if len(sizes) == 1:
            return sizes[0] / self.backbone.embedding_rms
        return float(torch.tensor(sizes, dtype=torch.float64).square().mean().sqrt()) / self.backbone.embedding_rms

    def prefix_cache(self, names: Sequence[str]) -> PrefixCache:
        """Prompts and leading words read once for many batches; no names: the stock model without a prompt."""
        return PrefixCache(self, names)

    def _readable(self, batch: Batch) -> Tensor:
        """What of the text a prompt may be made from, [B, T]: where the model scores its own text, no label."""
        return stock_inputs.readable(self.backbone, batch.attention_mask, batch.labels)

    @contextlib.contextmanager
    def _in_mode(self, training: bool | None) -> Iterator[None]:
        before = self.prompts.training
        if training is None or training == before:
            yield
            return
        self.prompts.train(training)
        try:
            yield
        finally:
            self.prompts.train(before)

    @contextlib.contextmanager
    def _own_head(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, the model's head is the prompts' own copy; the model's own stays as it was."""
        if not any(key(name) in self.heads for name in names):
            yield
            return
        if len(names) > 1:
            raise BackboneError(
                f"prompts with separate classification heads are scored one by one, given {', '.join(names)}"
            )
        # The copy is trained in float32 and used in the model's own number format.
        parameter = self.model.get_parameter
        head = self.registry.head(names[0])
        with self.backbone.with_head({name: value.to(parameter(name).dtype) for name, value in head.items()}):
            yield

    # What a stock model does

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        tasks: stock_inputs.Names = None,
        task_ids: stock_inputs.Places = None,
        words: Tensor | None = None,
        prompt_places: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The stock model's ModelOutput, with stock shapes and loss: nothing in it knows about prompt positions.

        In training mode, a language model with labels projects labeled positions only. Its logits are then None, unless
        `logits_to_keep` asks for them (0: all). This is the convention of fused losses. Eval mode returns all logits.

        input_ids, attention_mask, token_type_ids, position_ids [B, T] (positions count text, without the prompt),
        inputs_embeds [B, T, H], decoder_input_ids, decoder_attention_mask [B, S], labels, start_positions and
        end_positions as the stock model takes them; padding may be on either side. tasks: a name for all rows or one
        each; task_ids [B]: the same as places in `tasks`; neither: the active task. prompt_places [B], or [B, S] where
        prompts have segments: text tokens before each; None: by the prompts' own place, which `template` leaves open.
        words [B, T]: 1 for instructions, for methods that ask; logits_to_keep, num_items_in_batch: as in stock models.
        Raises ConfigError for unknown tasks, BackboneError when prompt and text do not fit the model's positions.
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "num_items_in_batch": num_items_in_batch,
            "logits_to_keep": logits_to_keep if isinstance(logits_to_keep, Tensor) or logits_to_keep else None,
            "return_dict": return_dict,
        }
        self._tune()
        if not self._prompted:
            return self.model(**stock_inputs.without_none(arguments))
        batch, prompt, site = self._read({**arguments, "words": words, "prompt_places": prompt_places}, tasks, task_ids)
        if self.training and labels is not None and logits_to_keep is None and self.backbone.head == "lm":
            loss = stock.training_output(self.backbone, batch, prompt, site, labels.to(self.device), num_items_in_batch)
            return loss.to_tuple() if return_dict is False else loss
        reading = injection.run_trunk(self.backbone, batch, prompt, site)
        wanted = stock_inputs.labels(arguments)
        wish = stock.OutputOptions(
            labels=None if wanted is None else wanted.to(self.device),
            keep=0 if logits_to_keep is None else logits_to_keep,
            items=num_items_in_batch,
        )
        heads = {i: self.registry.head(name) for i, name in enumerate(self.tasks)} if self.heads else {}
        output = stock.output(self.backbone, batch, reading, wish, heads)
        return output.to_tuple() if return_dict is False else output

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        tasks: stock_inputs.Names = None,
        task_ids: stock_inputs.Places = None,
        words: Tensor | None = None,
        prompt_places: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Continue each row with its task's prompt; `options` are those of transformers' generate.

        Comes back what the stock model gives; see `injection.generation.generate`; further arguments as in `forward`.
        """
        ids = inputs if input_ids is None else input_ids
        if attention_mask is None and ids is not None:
            attention_mask = stock_inputs.text_mask(ids, options, getattr(self.model, "generation_config", None))
        arguments = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        self._tune()
        if not self._prompted:
            stock_model: Any = self.model
            return stock_model.generate(**stock_inputs.without_none(arguments), **options)
        with torch.no_grad():
            batch, prompt, site = self._read(
                {**arguments, "words": words, "prompt_places": prompt_places}, tasks, task_ids
            )
            if inputs_embeds is not None:
                batch = replace(batch, input_ids=batch.input_ids[:, :0])
            return generation.generate(self.backbone, batch, prompt, site, **options)

    def _tune(self) -> None:
        """Measure or look up the fastest kernels, where that was not done for the model's device and dtype."""
        place = (self.device, self.dtype)
        if self._autotune and self._tuned_for != place:
            tuned = setup.autotune(self.backbone, log=setup.log_to_logger)
            self.backbone = replace(self.backbone, kernels=tuned.kernels, facts={})
            self._tuned_for = place

    def _read(
        self, arguments: Mapping[str, Any], names: stock_inputs.Names, ids: stock_inputs.Places
    ) -> tuple[Batch, Prompt, Site]:
        """The batch, the prompts of all its rows, whatever their tasks, and the site where they enter."""
        places = functools.partial(
            stock_inputs.places, names, ids, loaded=self.tasks, index=self.index, active=lambda: self.task
        )
        batch = stock_inputs.batch(self.backbone, arguments, places)
        site = self.registry.site_of(tuple(self.registry.used(batch.task_ids).values()))
        readable = stock_inputs.readable(self.backbone, batch.attention_mask, stock_inputs.labels(arguments))
        batch = self.registry.place(self.backbone, batch, readable)
        ids_are_text = batch.inputs_embeds is None
        return batch, self.registry.make(self.backbone, batch, readable, ids_are_text=ids_are_text), site

    # What Trainer, pipelines and people ask a model for

    def train(self, mode: bool = True) -> "SoftPromptModel":
        """Set the mode of prompts; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Prompts and heads only: `prompts.<name>.*`, `heads.<name>.*`; what prompts share is there once."""
        state: dict[str, Any] = self._trained().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for names in self._shared_names():
            for name in names[1:]:
                state.pop(prefix + name, None)
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; the frozen model is not looked for."""
        state = dict(state_dict)
        for names in self._shared_names():
            stored = next((state[name] for name in names if name in state), None)
            if stored is not None:
                state |= dict.fromkeys(names, stored)
        return self._trained().load_state_dict(state, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load as a part of another module, which looks for the frozen model and for shared tensors under each name."""
        for name, tensor in self.model.state_dict(prefix=f"{prefix}model.").items():
            state_dict.setdefault(name, tensor)
        for names in self._shared_names():
            stored = next((state_dict[prefix + name] for name in names if prefix + name in state_dict), None)
            if stored is not None:
                state_dict.update({prefix + name: stored for name in names})
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _shared_names(self) -> list[list[str]]:
        """The names of each tensor that has several, because prompts share it."""
        trained = self._trained()
        names: dict[int, list[str]] = {}
        for kind in (trained.named_parameters, trained.named_buffers):
            for name, tensor in kind(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(name)
        return [each for each in names.values() if len(each) > 1]

    def _trained(self) -> nn.ModuleDict:
        return nn.ModuleDict({"prompts": self.prompts, "heads": self.heads})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SoftPromptModel":
        def move(tensor: Tensor) -> Tensor:  # prompts stay float32 whatever the model becomes
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.model._apply(fn, recurse)
        self._trained()._apply(move, recurse)
        return self

    def __reduce__(self) -> Any:
        return _empty, (type(self.model), self.backbone.head), self.__dict__

    def _replicate_for_data_parallel(self) -> Any:
        raise BackboneError(
            "DataParallel copies modules and would run all of them on one device; start one process for each device "
            "(torchrun, accelerate launch), or show one device only (CUDA_VISIBLE_DEVICES=0)"
        )

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Refuse: transformers checkpoints in training mode only, and drops a prefix's cache when it does."""
        raise BackboneError(
            "transformers' gradient checkpointing has no effect here: the frozen model is in eval mode, and "
            "transformers drops a prefix cache under it; load the model with from_pretrained(NAME, "
            "config=ModelConfig(gradient_checkpointing=True)), or use smaller batches with gradient accumulation"
        )

    activation_checkpointing_enable = gradient_checkpointing_enable

    @property
    def loss_type(self) -> str | None:
        """What Trainer goes by when it counts labels: keys, values and prompts behind text score no row's first one."""
        site = self.registry.records[self._active].site if self._active is not None else None
        unscored = site is not None and (not site.scores_first_token or site.placement in ("after_start", "template"))
        return "ForCausalLM" if self.accepts_loss_kwargs and unscored else None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where none was given."""
        return self.backbone.tokenizer

    @property
    def device(self) -> torch.device:
        """Where token ids must be."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The frozen model's floating point type."""
        return self.backbone.dtype

    config = stock.attribute("config", "The stock model's own configuration.")
    generation_config = stock.attribute("generation_config", "The stock model's own generation settings.")
    main_input_name = stock.attribute("main_input_name", "The argument that holds the text.")
    base_model_prefix = stock.attribute("base_model_prefix", "The stock model's name for its trunk.")
    name_or_path = stock.attribute("name_or_path", "Where the stock model came from.")
    hf_device_map = stock.attribute("hf_device_map", "Where accelerate put the stock model's parts, if it did.")

    def can_generate(self) -> bool:
        """Whether the stock model generates text."""
        return bool(self.model.can_generate())

    def get_input_embeddings(self) -> nn.Module:
        """The stock model's word embeddings."""
        return self.backbone.embedding

    def get_output_embeddings(self) -> Any:
        """The stock model's output projection, None where it has none."""
        return self.model.get_output_embeddings()


class _Spans(SoftPromptModel):
    """The same for span heads, whose labels have other names; Trainer wants to see all labels that it can find."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        tasks: stock_inputs.Names = None,
        task_ids: stock_inputs.Places = None,
        words: Tensor | None = None,
        prompt_places: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As SoftPromptModel.forward; start_positions and end_positions [B] are columns of input_ids."""
        return super().forward(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            tasks=tasks,
            task_ids=task_ids,
            words=words,
            prompt_places=prompt_places,
            return_dict=return_dict,
        )


@functools.cache
def _called(stock: type, head: str) -> type[SoftPromptModel]:
    """The class of models around `stock`: ours in everything but the name."""
    return type(stock.__name__, (_Spans if head == "span" else SoftPromptModel,), {"__doc__": SoftPromptModel.__doc__})


def _empty(stock: type, head: str) -> SoftPromptModel:
    kind = _called(stock, head)
    return kind.__new__(kind)


def label_words(template: TaskTemplate) -> tuple[str, ...]:
    """The words that a task's answers begin with, for starts from labels."""
    return tuple(f"{template.separator}{word}" for word in (template.verbalizer or {}).values())


def backbone_config(
    opened: Artifact, config: ModelConfig | None = None, changes: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The backbone that an artifact was made for, with the attention and the quantization of the run that made it.

    Args:
        opened: The artifact.
        config: The backbone instead, when not where the artifact says. Its head is the artifact's all the same.
        changes: Keys of the section `model` that differ from the artifact's run. A backbone of another name has no
            revision, and a device replaces a device map.

    Raises:
        ConfigError: The artifact does not say which backbone it was made for, or a change is not possible.
    """
    if config is not None:
        return config.model_copy(update={"head": opened.head})
    changes, run = dict(changes or {}), opened.settings("model")
    values: dict[str, Any] = {key: run[key] for key in ("attention", "quantize") if key in run}
    if run.get("device_map") == "auto" and "device" not in changes:
        values["device_map"] = "auto"
    if "name" not in changes:
        if not opened.backbone:
            raise ConfigError("the artifact does not name its model; give one with --model")
        values |= {"name": opened.backbone, "revision": opened.revision}
    resolved: ModelConfig = parse({**values, **changes, "head": opened.head}, ModelConfig, "model")
    return resolved


def head_rows(opened: Artifact) -> int | None:
    """Classes of an artifact's head: the task's, or, where none is stored, the rows of its last weight."""
    if opened.template is not None:
        return setup.head_size(opened.head, TaskTemplate.from_json(opened.template))
    sizes = [value.shape[0] for name, value in opened.heads.items() if name.endswith("weight")]
    return sizes[-1] if sizes and opened.head in ("sequence", "token") else None


def open_prompts(
    paths: Sequence[str | Path],
    *,
    config: ModelConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    allow_other_weights: bool = False,
    log: Callable[[str], None] = setup.no_log,
) -> tuple[SoftPromptModel, tuple[str, ...]]:
    """A model whose prompts answer as artifacts of one backbone, site and length do, which can share a batch.

    Args:
        paths: The artifacts' directories; prompt i of the model is that of path i.
        config: Where the backbone is, when not where the artifact says; its head is the artifact's all the same.
        changes: Keys of the section `model` that differ from the run that made the artifacts.
        allow_other_weights: Whether prompts that were made for other weights only cost a warning.
        log: Receives a line about each step.

    Returns:
        The model, and warnings. A single prompt has its own name; several are called 0:NAME, 1:NAME, ...

    Raises:
        ArtifactError, BackboneError, AssetError: They cannot be opened.
        ConfigError: The artifacts cannot share a batch.
    """
    opened = [artifact.load(path) for path in paths]
    first = opened[0]
    for other, path in zip(opened, paths, strict=True):
        differs = [
            fact
            for fact in ("site", "mode", "placement", "segments", "head", "method")
            if getattr(other, fact) != getattr(first, fact)
        ]
        if {**(other.template or {}), "name": ""} != {**(first.template or {}), "name": ""}:
            differs.append("template")
        if differs or other.shape != first.shape:
            raise ConfigError(f"{path} and {paths[0]} differ in {', '.join(differs) or 'shape'}: open them one by one")
    if len(opened) > 1 and any(artifact_opened.heads for artifact_opened in opened):
        raise ConfigError("prompts with separate classification heads cannot vote in one batch; open them one by one")
    model = SoftPromptModel(
        setup.load_backbone(backbone_config(first, config, changes), labels=head_rows(first), log=log)
    )
    warnings: list[str] = []
    for place, (path, artifact_opened) in enumerate(zip(paths, opened, strict=True)):
        name = artifact_opened.task if len(paths) == 1 else f"{place}:{artifact_opened.task}"
        prompt, noted = persistence.open_artifact(
            model.backbone,
            model.registry.encoders,
            path,
            name=name,
            allow_other_weights=allow_other_weights,
            trainable=False,
            loaded=artifact_opened,
        )
        model._add(prompt)
        warnings += noted
    return model, tuple(dict.fromkeys(warnings))
