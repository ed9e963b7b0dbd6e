"""`softprompts.train`: all prompts of a call learn, whatever their names, each at the rates of its own method."""

from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import softprompts
import tiny
from softprompts import SoftPromptModel
from softprompts.config import InitConfig, PromptConfig, TrainConfig
from softprompts.data import EncodedExample
from softprompts.errors import ConfigError
from softprompts.training.optimizer import prompt_param_groups
from softprompts.training.trainables import TrainablePrompts
from softprompts.types import IGNORE, ParamGroup


def prompted_model(methods: dict[str, str], *, backbone: str = "llama", seed: int = 0) -> SoftPromptModel:
    """A tiny model with prompts of these methods, by the prompts' names."""
    model = SoftPromptModel(tiny.backbone(backbone))
    for name, method in methods.items():
        config = PromptConfig(num_virtual_tokens=4, method=method, init=InitConfig(kind="random"))
        model.add_prompt(name, config, seed=seed)
    return model


def encoded(seed: int, count: int = 6) -> list[EncodedExample]:
    """Rows of seven tokens, of which the last two are the answer."""
    examples = []
    for index in range(count):
        ids = rows.ids(seed * 100 + index, 7).tolist()
        examples.append(EncodedExample(input_ids=ids, labels=[IGNORE] * 5 + ids[5:], text_tokens=5))
    return examples


def train_config(**changes: Any) -> TrainConfig:
    """A few steps at a high rate."""
    return TrainConfig(**{"max_steps": 3, "batch_size": 12, "learning_rate": 0.5, **changes})


def copies(model: SoftPromptModel) -> dict[str, Tensor]:
    """What a model trains, as it is now."""
    return {name: parameter.detach().clone() for name, parameter in model.trainable().items()}


def unmoved(model: SoftPromptModel, before: dict[str, Tensor]) -> list[str]:
    """The names of the parameters that training did not change."""
    return [name for name, parameter in model.trainable().items() if torch.equal(parameter, before[name])]


def test_prompts_whose_names_end_alike_all_learn() -> None:
    names = ("glue/rte", "super_glue/rte", "rte")
    model = prompted_model(dict.fromkeys(names, "prompt-tuning"))
    before = copies(model)
    list(softprompts.train(model, {name: encoded(index) for index, name in enumerate(names)}, train_config()))
    assert unmoved(model, before) == []


def test_two_prompts_cannot_have_one_name_in_the_result() -> None:
    model = prompted_model({"a": "prompt-tuning", "b": "prompt-tuning"})
    with pytest.raises(ConfigError, match="prompts need different names in the result, given c, c"):
        model.trainable({"a": "c", "b": "c"})


@pytest.mark.parametrize("other", ["multitask-prompt-tuning", "low-rank"])
@pytest.mark.parametrize("order", ["mp", "pm"])
def test_each_prompt_learns_at_the_rates_of_its_method(other: str, order: str) -> None:
    model = prompted_model({name: {"m": other, "p": "prompt-tuning"}[name] for name in order})
    before = copies(model)
    trainable, config = TrainablePrompts(model, {"": tuple(order)}), train_config(learning_rates={"factors": 0.25})
    rates = {}
    for group in trainable.param_groups("", config):
        for parameter in group["params"]:
            rates[id(parameter)] = group["rate"]
    rms_rate = 0.5 * model.backbone.embedding_rms
    plain_rate = 0.25 if other == "multitask-prompt-tuning" else 0.5
    for name, parameter in model.trainable().items():
        is_factor = name.endswith(".columns") or (other == "multitask-prompt-tuning" and name.endswith(".rows"))
        assert rates[id(parameter)] == pytest.approx(plain_rate if is_factor else rms_rate), name
    list(softprompts.train(model, {name: encoded(index) for index, name in enumerate(order)}, train_config()))
    assert unmoved(model, before) == []


def test_prompts_of_one_method_share_their_groups() -> None:
    """The optimizer of several prompts of one method has one group for each of the method's groups, in its order."""
    model = prompted_model({"a": "low-rank", "b": "low-rank"})
    groups = TrainablePrompts(model, {"": ("a", "b")}).param_groups("", train_config())
    names = {id(parameter): name for name, parameter in model.trainable().items()}
    assert [[names[id(parameter)] for parameter in group["params"]] for group in groups] == [
        ["prompts.a.rows", "prompts.b.rows"],
        ["prompts.a.columns", "prompts.b.columns"],
    ]


def test_a_parameter_in_no_group_is_refused() -> None:
    model = prompted_model({"a": "prompt-tuning"})
    with pytest.raises(ConfigError, match=r"groups \(rows\) hold no parameter prompts\.a\.prompt"):
        prompt_param_groups({"rows": ParamGroup(("rows",))}, model.trainable(), train_config(), 1.0)
