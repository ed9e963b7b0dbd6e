"""Models with prompts for tests: methods that a test made, as prompts of a shared tiny backbone."""

from collections.abc import Mapping

from torch import Tensor, nn

from softprompts.backbone import Backbone
from softprompts.config import PromptConfig
from softprompts.injection import Site
from softprompts.methods import PromptMethod, make_prompts
from softprompts.model import SoftPromptModel, persistence
from softprompts.model.registry import NewPrompt, PromptRecord
from softprompts.types import Context, Prompt, PromptSpec


def prompted(
    backbone: Backbone, site: Site, methods: Mapping[str, PromptMethod] | PromptMethod, heads: bool = False
) -> SoftPromptModel:
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


def prompts(methods: Mapping[str, PromptMethod], task_ids: Tensor, context: Context) -> Prompt:
    """The prompts of rows whose tasks are numbered as `methods` are."""
    return make_prompts(dict(enumerate(methods.values())), task_ids, context)
