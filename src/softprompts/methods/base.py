"""What every method is: a module that makes one prompt for one task, and says which optional abilities it has."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from softprompts.types import (
    SOURCES,
    Context,
    EmbeddingDelta,
    ParamGroup,
    Prompt,
    PromptInit,
    PromptOutput,
    PromptSpec,
    in_mode,
    mix_prompts,
)

SITES = ("input", "decoder", "layers", "kv")


class MethodConfig(BaseModel):
    """The options of a method. Unknown options are refused, and true and false are no numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PromptMethod(nn.Module):
    """Makes one prompt for one task.

    A method is one file: a subclass that says how a prompt is made (`forward`) and, by the attributes below, what else
    it can do. It runs in training mode for the prompts of a training step only.

    Attributes:
        paper: Where the method comes from.
        sites: The names of the sites that it can be used at.
        input_dependent: Whether the prompt depends on the text. If not, `fold` gives its plain prompt.
        changes_text: Whether it adds to the embeddings of the text (`PromptOutput.embedding_delta`); such a method has
            no plain prompt.
        groups: Parameters with separate learning rates, by the beginnings of their names.
        pretrained: The beginnings of the names of what `softprompts pretrain` can teach; the method then has
            `features`.
        spec: What the method fills.
        shared: What the tasks of a run share, made by `share`; None where they share nothing.
    """

    paper: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = SITES
    input_dependent: ClassVar[bool] = False
    changes_text: ClassVar[bool] = False
    groups: ClassVar[Mapping[str, ParamGroup]] = {"prompt": ParamGroup(("",))}
    pretrained: ClassVar[tuple[str, ...]] = ()

    class Config(MethodConfig):
        """This method has no options."""

    def __init__(self, config: Any, spec: PromptSpec, init: PromptInit, shared: nn.Module | None = None) -> None:
        """Make the method at its start; random draws follow torch's global generator.

        Args:
            config: An instance of the class's `Config`.
            spec: What the prompt must fill.
            init: Where training begins.
            shared: What `share` made for all tasks of the run; None: this task shares it with no other.

        Raises:
            ValueError: The options contradict the spec or the start.
        """
        super().__init__()
        self.spec = spec
        self.shared = self.share(config, spec, init, ("task",)) if shared is None else shared

    @classmethod
    def share(cls, config: Any, spec: PromptSpec, init: PromptInit, tasks: Sequence[str]) -> nn.Module | None:
        """The module that the methods of `tasks` share; None where each task has its own of everything."""
        return None

    @classmethod
    def sentence_encoders(cls, config: Any) -> tuple[str, ...]:
        """The frozen encoders of whole texts, beside the backbone, that the method asks for vectors."""
        return ()

    def forward(self, context: Context) -> Tensor | PromptOutput:
        """The task's prompt for the rows of `context`: [P, D], [B, P, D] where it depends on the text, or more."""
        raise NotImplementedError

    def rms(self) -> Tensor | None:
        """The root mean square of the prompt, []; None where only the prompts of a batch say it."""
        prompt = _plain(self)
        return None if prompt is None else prompt.square().mean().sqrt()

    def features(self, context: Context) -> Tensor:
        """What a classifier reads of each text in pretraining, [B, F]."""
        raise NotImplementedError

    @property
    def sources(self) -> Tensor | None:
        """The prompts [S, P, D] that the method keeps, from `init.sources`; None where it keeps none."""
        return next((value for name, value in self.state_dict().items() if name.split(".")[-1] == SOURCES), None)

    @property
    def shares_parameters(self) -> bool:
        """Whether tasks of one run train parameters together."""
        return self.shared is not None and next(self.shared.parameters(), None) is not None

    @property
    def shares_all(self) -> bool:
        """Whether tasks that have this module `shared` have the same prompts."""
        if self.shared is None:
            return False
        return all(name.startswith("shared.") for name in self.state_dict(keep_vars=True))


def fold(method: PromptMethod) -> Tensor | None:
    """The plain prompt [P, D], in float32 on the CPU; None where a text decides it, or it changes the text."""
    prompt = _plain(method)
    return None if prompt is None else prompt.float().cpu().clone()


def _plain(method: PromptMethod) -> Tensor | None:
    """The same on the method's device and in its number format."""
    if method.input_dependent or method.changes_text:
        return None
    with torch.no_grad(), in_mode(method, False):
        output = method(Context.empty())
    prompt: Tensor = output.prompt if isinstance(output, PromptOutput) else output
    return prompt.detach()


def make_prompts(methods: Mapping[int, PromptMethod], task_ids: Tensor, context: Context) -> Prompt:
    """The prompts of a batch, each task's made once by its own method.

    Tasks that share all that makes a prompt are one task here, so that their rows can share prompts too.

    Args:
        methods: The method of each task, by the number that `task_ids` uses.
        task_ids: The task of each row, [B].
        context: What the methods may look at, of all rows.

    Returns:
        The distinct prompts [U, P, D] of the batch. Tasks that are not in it are not computed and get no gradient.
    """
    alike: dict[int, list[int]] = {}
    for task in task_ids.unique().tolist():
        method = methods[task]
        alike.setdefault(id(method.shared if method.shares_all else method), []).append(task)
    if len(alike) == 1:
        (tasks,) = alike.values()
        return _prompt_of(methods[tasks[0]](context), context)
    prompts, rows = [], []
    for tasks in alike.values():
        index = torch.isin(task_ids, torch.tensor(tasks, device=task_ids.device)).nonzero()[:, 0]
        part = context.rows(index)
        prompts.append(_prompt_of(methods[tasks[0]](part), part))
        rows.append(index)
    return mix_prompts(prompts, rows)


def _prompt_of(output: Tensor | PromptOutput, context: Context) -> Prompt:
    """What a method returned for the rows of one task, as the distinct prompts of these rows."""
    if isinstance(output, Tensor):
        output = PromptOutput(output)
    rows, device = len(context.input_ids), context.input_ids.device
    prompt_index = output.prompt_index
    if output.prompt.dim() == 2:
        values = output.prompt[None]
        prompt_index = torch.zeros(rows, dtype=torch.long, device=device)
    else:
        values = output.prompt
        if prompt_index is None:
            prompt_index = torch.arange(rows, device=device)
    mask = output.mask
    if mask is None:
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    delta = None
    if output.embedding_delta is not None:
        added = output.embedding_delta.expand(len(values), -1, -1)
        delta = EmbeddingDelta(added, reach=context.attention_mask.bool().sum(1))
    return Prompt(values, mask, prompt_index, output.measures, delta)
