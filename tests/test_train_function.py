"""`softprompts.train`: all prompts of a call learn, whatever their names, each at the rates of its own method."""

import copy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rows
import softprompts
import tiny
from softprompts import SoftPromptModel
from softprompts.backbone import wrap
from softprompts.config import InitConfig, PromptConfig, TrainConfig
from softprompts.data import EncodedExample
from softprompts.errors import ConfigError, TrainingError
from softprompts.training.checkpoint import CHECKPOINT
from softprompts.training.optimizer import prompt_param_groups
from softprompts.training.trainables import TrainablePrompts
from softprompts.types import IGNORE, ParamGroup, PromptInit
from trainees import fit


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


def other_weights(model: SoftPromptModel) -> SoftPromptModel:
    """The model with the same prompts over weights of which one norm differs."""
    stock_model = copy.deepcopy(model.backbone.model)
    with torch.no_grad():
        next(value for name, value in stock_model.named_parameters() if "norm" in name).mul_(1.01)
    other = SoftPromptModel(wrap(stock_model, name="llama"))
    for name in model.tasks:
        other.add_prompt(name, model.registry.records[name].config, seed=0)
    return other


def with_given_start(value: float) -> SoftPromptModel:
    """A tiny model with a prompt that starts from a constant."""
    model = SoftPromptModel(tiny.backbone("llama"))
    model.add_prompt("a", PromptConfig(num_virtual_tokens=4), init=PromptInit(torch.full((4, 32), value)))
    return model


OTHER_MODELS: dict[str, tuple[Callable[[], SoftPromptModel], str]] = {
    "weights": (lambda: other_weights(prompted_model({"a": "prompt-tuning"})), r"backbone\.weights was \w+, is now"),
    "method": (lambda: prompted_model({"a": "low-rank"}), r"prompts\.a\.method was prompt-tuning, is now low-rank"),
    "start": (lambda: prompted_model({"a": "prompt-tuning"}, seed=1), r"prompts\.a\.start\.seed was 0, is now 1"),
    "given": (lambda: with_given_start(0.5), r"prompts\.a\.start\.init was None, is now \w+"),
    "name": (lambda: prompted_model({"b": "prompt-tuning"}), r"prompts\.a was {.*, is now None; prompts\.b was None"),
}


@pytest.mark.parametrize(
    ("seed", "learning_rate", "message"),
    [
        (1, 0.5, r"examples was \w+, is now \w+"),
        (0, 0.25, r"training\.learning_rate was 0\.5, is now 0\.25"),
    ],
)
def test_a_checkpoint_of_other_rows_or_settings_is_refused(
    tmp_path: Path, seed: int, learning_rate: float, message: str
) -> None:
    model = prompted_model({"a": "prompt-tuning"})
    list(softprompts.train(model, {"a": encoded(0)}, train_config(), directory=tmp_path))
    config = train_config(learning_rate=learning_rate)
    with pytest.raises(TrainingError, match=message):
        list(softprompts.train(model, {"a": encoded(seed)}, config, directory=tmp_path))


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, name: str) -> None:
    make_other, message = OTHER_MODELS[name]
    model = prompted_model({"a": "prompt-tuning"})
    list(softprompts.train(model, {"a": encoded(0)}, train_config(), directory=tmp_path))
    checkpoint = (tmp_path / CHECKPOINT).read_bytes()
    other = make_other()
    before = copies(other)
    steps = softprompts.train(other, {other.task: encoded(0)}, train_config(), directory=tmp_path)
    with pytest.raises(TrainingError, match=message) as caught:
        list(steps)
    assert str(tmp_path / CHECKPOINT) in str(caught.value)
    assert len(str(caught.value)) < 1200
    assert len(unmoved(other, before)) == len(before)
    assert (tmp_path / CHECKPOINT).read_bytes() == checkpoint


def test_the_start_that_a_caller_gives_counts(tmp_path: Path) -> None:
    rows_of_prompts = {"a": encoded(0)}
    list(softprompts.train(with_given_start(0.5), rows_of_prompts, train_config(), directory=tmp_path))
    again = list(softprompts.train(with_given_start(0.5), rows_of_prompts, train_config(), directory=tmp_path))
    assert len(again) == 3
    with pytest.raises(TrainingError, match=r"prompts\.a\.start\.init was \w+, is now \w+"):
        list(softprompts.train(with_given_start(0.25), rows_of_prompts, train_config(), directory=tmp_path))


@pytest.mark.parametrize("fresh", [True, False])
def test_training_continues_bit_for_bit_in_a_new_model_and_in_the_same(tmp_path: Path, fresh: bool) -> None:
    methods = {"a/x": "prompt-tuning", "b/x": "low-rank"}
    rows_of_prompts = {"a/x": encoded(0), "b/x": encoded(1)}
    whole = prompted_model(methods)
    losses = [progress.loss for progress in softprompts.train(whole, rows_of_prompts, train_config())]
    model = prompted_model(methods)
    with closing(softprompts.train(model, rows_of_prompts, train_config(), directory=tmp_path)) as steps:
        next(steps)
        next(steps)
    model = prompted_model(methods) if fresh else model
    resumed = softprompts.train(model, rows_of_prompts, train_config(save_steps=1), directory=tmp_path)
    assert [progress.loss for progress in resumed] == losses
    assert len(unmoved(model, copies(whole))) == len(copies(whole))


def test_a_checkpoint_with_other_parameters_is_refused(tmp_path: Path) -> None:
    """Recipes name their own settings; whatever these say, the names and shapes of the parameters must fit."""
    model = prompted_model({"a": "prompt-tuning", "b": "prompt-tuning"})
    list(fit(model, encoded(0), train_config(), prompts=("a",), directory=tmp_path))
    message = r"prompts\.a\.prompt was \[4, 32\], is now None; prompts\.b\.prompt was None, is now \[4, 32\]"
    with pytest.raises(TrainingError, match=message):
        list(fit(model, encoded(0), train_config(), prompts=("b",), directory=tmp_path))


def test_unknown_prompts_and_none_are_refused() -> None:
    model = prompted_model({"colors": "prompt-tuning"})
    with pytest.raises(ConfigError, match="no prompt 'colours'; did you mean 'colors'"):
        list(softprompts.train(model, {"colours": encoded(0)}, train_config()))
    with pytest.raises(ConfigError, match="there is no prompt to train"):
        list(softprompts.train(model, {}, train_config()))


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "best_step"), [((NAN, 0.25, 0.5, 0.25), 3), ((0.5, NAN, NAN, 0.25), 1), ((NAN, NAN, 0.25, NAN), 3)]
)
def test_a_score_that_is_no_number_is_never_the_best(scores: tuple[float, ...], best_step: int) -> None:
    model = prompted_model({"a": "prompt-tuning"})
    states = [copies(model)]
    remaining = iter(scores)

    def validate() -> float:
        states.append(copies(model))
        return next(remaining)

    config = train_config(max_steps=4, eval_steps=1)
    list(softprompts.train(model, {"a": encoded(0)}, config, validate=validate))
    assert len(unmoved(model, states[best_step])) == 1


def test_patience_counts_from_the_best_number() -> None:
    scores = iter([NAN, NAN, NAN, 0.5, NAN, 0.25, 0.75])
    config = train_config(max_steps=9, eval_steps=1, early_stopping_patience=2)
    steps = softprompts.train(
        prompted_model({"a": "prompt-tuning"}), {"a": encoded(0)}, config, validate=lambda: next(scores)
    )
    assert len(list(steps)) == 6


def test_without_any_number_the_last_state_remains_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    states, models = [], [prompted_model({"a": "prompt-tuning"}) for _ in range(2)]
    config = train_config(max_steps=4, eval_steps=1, early_stopping_patience=2)
    for model, score in zip(models, (NAN, 0.5), strict=True):
        caplog.clear()
        steps = softprompts.train(model, {"a": encoded(0)}, config, validate=lambda score=score: score)
        states.append((len(list(steps)), caplog.messages))
    note = "no validation score is a number, so none is the best; the state after step 4 is kept"
    assert states == [(4, [note]), (3, [])]
    plain = prompted_model({"a": "prompt-tuning"})
    list(softprompts.train(plain, {"a": encoded(0)}, train_config(max_steps=4)))
    assert len(unmoved(plain, copies(models[0]))) == 1
