"""SoftPromptModel: a stock transformers model with named prompts, each task with a copy of the head of its own."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompts import injection
from softprompts.backbone import Backbone, wrap
from softprompts.config import PromptConfig
from softprompts.errors import BackboneError, ConfigError
from softprompts.injection import Site, generation
from softprompts.methods import shares
from softprompts.model import persistence, stock_inputs
from softprompts.model import stock_outputs as stock
from softprompts.model.persistence import Described
from softprompts.model.registry import Held, Made
from softprompts.types import Batch, Prompt


class SoftPromptModel(nn.Module):
    """A stock `model`, which it freezes in place, with a prompt for `task` as `config` says.

    config: a PromptConfig, a peft.PromptTuningConfig or peft.MultitaskPromptTuningConfig, or None to begin without a
    prompt; tokenizer: for prompts that start from words; tasks: names of several tasks that share what their method
    shares (without them the tasks of a MultitaskPromptTuningConfig are called 0, 1, ...). More tasks come with
    `add_task`, `add_tasks` and `load_prompt`. Of all tensors only the prompts and, in classification models, a copy of
    the head for each task require a gradient, and only they are in `state_dict`; the model's own head stays as it was.
    It begins in eval mode, as models of from_pretrained do; `train()` turns on what prompts do in training only.
    The object's class is a subclass that bears the stock class's name, because Trainer and pipelines go by that name
    (whether labels are shifted, which arguments are labels, which tasks a model is for).
    Raises BackboneError for a site the model does not have, ConfigError for a configuration that makes no sense.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: PromptConfig | Described | None = None,
        task: str = "default",
        tokenizer: Any = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone: Backbone = wrap(model, tokenizer)
        self.model = model
        self.prompts = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        # Only a causal language model's loss can be divided by the labels of several batches, as in the stock models.
        self.accepts_loss_kwargs = self.backbone.head == "lm" and self.backbone.family.scores_next_token
        self._held = Held(self.prompts, self.heads)
        self._active: str | None = None
        self._prompted = True
        self.eval()  # as transformers' from_pretrained leaves its models: who trains says train()
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):  # data collators look for it
            self.prepare_decoder_input_ids_from_labels = model.prepare_decoder_input_ids_from_labels
        if type(self) is SoftPromptModel:
            stock_class: Any = type(model)
            self.__class__ = _called(stock_class, self.backbone.head)
        if config is not None:
            self.add_tasks(persistence.names_of(config, task, tasks), config)
        elif tasks is not None:
            raise ConfigError("tasks are named, but there is no config that says what they are")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the loaded prompts, in the order that `task_ids` count."""
        return tuple(self._held.tasks)

    @property
    def task(self) -> str:
        """The task of rows that name none; assign another of `tasks` to change it."""
        if self._active is None:
            raise ConfigError("no prompt is loaded; use add_task or load_prompt first, or no_prompt() to do without")
        return self._active

    @task.setter
    def task(self, name: str) -> None:
        self._active = self.tasks[stock_inputs.index(name, self.tasks)]

    def add_task(
        self, name: str, config: PromptConfig | Described | None = None, modules_to_save: Sequence[str] | None = None
    ) -> None:
        """Add a prompt called `name`; without `config` like the active one, sharing with it what its method shares.

        modules_to_save: modules of the head that are trained along; None takes what `config` says, else the whole
        classification head.
        Raises ConfigError for a name that is taken and for modules that the head does not have.
        """
        if config is None:
            config = self._held.tasks[self.task].config
            if shares(self._held.method(self.task)):
                self._held.check_new((name,))
                made = persistence.alike(self.backbone, self._held, name, self.task, modules_to_save)
                self._held.join(made, self.task)
                return
        self.add_tasks((name,), config, modules_to_save)

    def add_tasks(
        self, names: Sequence[str], config: PromptConfig | Described, modules_to_save: Sequence[str] | None = None
    ) -> None:
        """Add prompts that share what the method of `config` shares; arguments and errors as for `add_task`."""
        self._held.check_new(names)
        self._put(persistence.create(self.backbone, self._held.sentences, tuple(names), config, modules_to_save))

    def remove_task(self, name: str) -> None:
        """Forget the prompt called `name` and its head; the first of the others takes its place where it was active."""
        name = self.tasks[stock_inputs.index(name, self.tasks)]
        self._held.remove(name)
        if self._active == name:
            self._active = next(iter(self.tasks), None)

    def load_prompt(
        self, path: str | Path, task: str | None = None, allow_other_weights: bool = False
    ) -> tuple[str, list[str]]:
        """Load a trained prompt, ours or PEFT's, to use it or to train it on; returns its name and warnings.

        task: a name other than the artifact's own; a prompt of that name is replaced.
        Raises ArtifactError for a prompt that was made for other weights or does not fit, saying how.
        """
        made, warnings = persistence.restore(self.backbone, self._held.sentences, path, task, allow_other_weights)
        self._put(made)
        return made.tasks[0].name, warnings

    def load_prompts(self, path: str | Path, allow_other_weights: bool = False) -> tuple[tuple[str, ...], list[str]]:
        """Load all prompts of a directory, those together that share a method; returns their names and warnings.

        Raises ArtifactError as `load_prompt` does.
        """
        found, order, warnings = persistence.restore_all(
            self.backbone, self._held.sentences, Path(path), allow_other_weights
        )
        for made in found:
            self._put(made)
        self._held.last(order)
        return order, warnings

    def save_pretrained(self, directory: str | Path) -> None:
        """Write one task as an artifact into `directory`, several each into a sub-directory of it.

        Beside the sub-directories stand PEFT's two files for tasks that share a prompt, where PEFT can reproduce them.
        Raises ArtifactError where the disk or what is in the directory forbids it.
        """
        persistence.save(self.backbone, self._held, Path(directory))

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, path: str | Path, tokenizer: Any = None, allow_other_weights: bool = False
    ) -> "SoftPromptModel":
        """`model`, in eval mode, with what `save_pretrained` wrote to `path`, or with a directory of ours or PEFT's.

        Raises ArtifactError as `load_prompt` does.
        """
        made = cls(model, tokenizer=tokenizer)
        made.load_prompts(path, allow_other_weights)
        return made.eval()

    @contextlib.contextmanager
    def no_prompt(self) -> Iterator[None]:
        """Inside, this is the stock model and nothing else."""
        before, self._prompted = self._prompted, False
        try:
            yield
        finally:
            self._prompted = before

    def _put(self, made: Made) -> None:
        self._held.put(made, self.device)
        self._active = self._active or made.tasks[0].name

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
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The stock model's ModelOutput, with stock shapes and loss: nothing in it knows about prompt positions.

        input_ids, attention_mask, token_type_ids, position_ids [B, T] (positions count text, without the prompt),
        inputs_embeds [B, T, H], decoder_input_ids, decoder_attention_mask [B, S], labels, start_positions and
        end_positions as the stock model takes them; padding may stand on either side. tasks: a name for all rows or one
        each; task_ids [B]: the same as places in `tasks`; neither: the active task. prompt_places [B], or [B, S] where
        prompts have segments: text tokens before each; None: by the prompts' own place, which `template` leaves open.
        words [B, T]: 1 for instructions, for methods that ask; logits_to_keep, num_items_in_batch: as in stock models.
        Raises ConfigError for unknown tasks, BackboneError when prompt and text do not fit the model's positions.
        """
        given = {
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
        if not self._prompted:
            return self.model(**{name: value for name, value in given.items() if value is not None})
        batch, prompt, site = self._read({**given, "words": words, "prompt_places": prompt_places}, tasks, task_ids)
        reading = injection.run_trunk(self.backbone, batch, prompt, site)
        wanted = stock_inputs.labels(given)
        wish = stock.OutputOptions(
            None if wanted is None else wanted.to(self.device), logits_to_keep, num_items_in_batch
        )
        heads = {i: self._held.head(name) for i, name in enumerate(self.tasks)} if self.heads else {}
        made = stock.output(self.backbone, batch, reading, wish, heads)
        return made.to_tuple() if return_dict is False else made

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

        Comes back what the stock model gives; see `generate.generate`; further arguments as in `forward`.
        """
        ids = inputs if input_ids is None else input_ids
        if attention_mask is None and ids is not None:
            attention_mask = stock_inputs.text_mask(ids, options, getattr(self.model, "generation_config", None))
        given = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        if not self._prompted:
            stock_model: Any = self.model
            return stock_model.generate(**{k: v for k, v in given.items() if v is not None}, **options)
        with torch.no_grad():
            batch, prompt, site = self._read({**given, "words": words, "prompt_places": prompt_places}, tasks, task_ids)
            if inputs_embeds is not None:
                batch = replace(batch, input_ids=batch.input_ids[:, :0])
            return generation.generate(self.backbone, batch, prompt, site, **options)

    def _read(
        self, given: Mapping[str, Any], names: stock_inputs.Names, ids: stock_inputs.Places
    ) -> tuple[Batch, Prompt, Site]:
        """The batch, the prompts of all its rows, whatever their tasks, and the site where they enter."""
        where = functools.partial(stock_inputs.places, names, ids, loaded=self.tasks, active=lambda: self.task)
        batch = stock_inputs.batch(self.backbone, given, where)
        return self._held.of_batch(
            self.backbone, batch, stock_inputs.readable(self.backbone, batch.attention_mask, given)
        )

    # What Trainer, pipelines and people ask a model for

    def train(self, mode: bool = True) -> "SoftPromptModel":
        """Set the mode of prompts; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Prompts and heads only: `prompts.<task>.*`, `heads.<task>.*`."""
        found: dict[str, Any] = self._trained().state_dict(*args, **kwargs)
        return found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; the frozen model is not looked for."""
        return self._trained().load_state_dict(state_dict, strict=strict, assign=assign)

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
            "gradient checkpointing has no effect here: the frozen model is in eval mode, and transformers drops a "
            "prefix cache under it; leave it off and use smaller batches with gradient accumulation instead"
        )

    activation_checkpointing_enable = gradient_checkpointing_enable

    @property
    def loss_type(self) -> str | None:
        """What Trainer goes by when it counts labels: keys, values and prompts behind text score no row's first one."""
        site = self._held.tasks[self._active].site if self._active is not None else None
        unscored = site is not None and (site.name == "kv" or site.place in ("after_start", "template"))
        return "ForCausalLM" if self.accepts_loss_kwargs and unscored else None

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
