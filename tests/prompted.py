"""Models with prompts for tests: methods that a test made, as prompts of a shared tiny backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softprompts.backbone import Backbone
from softprompts.config import PromptConfig, TrainConfig
from softprompts.injection import Site
from softprompts.methods import PromptMethod, make_prompts
from softprompts.model import SoftPromptModel, persistence
from softprompts.model.registry import NewPrompt, PromptRecord
from softprompts.training.optimizer import prompt_param_groups
from softprompts.types import Context, Prompt, PromptInit, PromptSpec


def prompted(backbone: Backbone, site: Site, methods: Any, heads: bool = False) -> SoftPromptModel:
    """A model whose prompts these methods make; a method alone makes the prompt of the task "a".

    heads: whether each prompt has a copy of the model's classification head.
    """
    model = SoftPromptModel(backbone)
    for name, method in ({"a": methods} if isinstance(methods, PromptMethod) else methods).items():
        record = PromptRecord(site, PromptConfig(num_virtual_tokens=method.spec.length))
        head = persistence._new_head(backbone, None) if heads else None
        model.registry.add(NewPrompt(name, method, record, head), backbone.device)
        model.task = model.tasks[0]
    return model


def methods_of(model: SoftPromptModel) -> list[PromptMethod]:
    """The methods of a model's prompts, in their order."""
    return [model.registry.method(name) for name in model.tasks]


def method_of(prepared: Any, index: int = 0) -> Any:
    """The method of a prepared run's task."""
    return prepared.model.registry.method(prepared.prompts[index])


def spec_of(model: SoftPromptModel) -> PromptSpec:
    """What the first prompt's method fills."""
    return methods_of(model)[0].spec


def tensors(model: SoftPromptModel) -> dict[str, nn.Parameter]:
    """What is trained of a model: TASK.TENSOR of each method and, behind all of them, of each head."""
    return {name.partition(".")[2]: value for name, value in model.trainable().items()}


def by_tensor(model: SoftPromptModel) -> list[nn.Parameter]:
    """All parameters of the prompts: each tensor of every task, then the next; what tasks share last."""
    named = dict(model.prompts.named_parameters())
    names = [name.partition(".")[2] for name in named]
    order = {name: (name.startswith("shared."), place) for place, name in reversed(list(enumerate(names)))}
    return [value for name, value in sorted(named.items(), key=lambda pair: order[pair[0].partition(".")[2]])]


def several(
    kind: type[PromptMethod], config: Any, spec: PromptSpec, init: PromptInit, names: Sequence[str]
) -> nn.ModuleDict:
    """The methods of several tasks, which share what the method shares."""
    shared = kind.share(config, spec, init, names)
    return nn.ModuleDict({name: kind(config, spec, init, shared) for name in names})


def prompts_of(methods: Any, tasks: Sequence[int], context: Context) -> Prompt:
    """The prompts of rows whose tasks are numbered as `methods` are."""
    return make_prompts(dict(enumerate(methods.values())), torch.tensor(tasks), context)


def each(prompt: Prompt) -> Tensor:
    """The prompt of each row, [B, P, D]."""
    return prompt.values[prompt.prompt_index]


def rows_of(methods: Any, tasks: Sequence[int]) -> Tensor:
    """The prompt of each row [B, P, D] of a batch whose texts do not matter."""
    ids, embeds = torch.zeros(len(tasks), 1, dtype=torch.long), torch.zeros(len(tasks), 1, 8)
    made = prompts_of(methods, tasks, Context(ids, embeds, ids, lambda: embeds))
    return made.values[made.prompt_index]


def plain(method: PromptMethod) -> Tensor:
    """The plain prompt in the method's own number format."""
    with torch.no_grad():
        return method.eval()(Context.empty()).clone()


def rates_of(model: SoftPromptModel, config: TrainConfig) -> list[dict[str, Any]]:
    """The optimizer's groups for all prompts of a model."""
    groups = methods_of(model)[0].groups
    return prompt_param_groups(groups, model.trainable(), config, model.backbone.embedding_rms)
