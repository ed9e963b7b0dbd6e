"""The configuration of the study: tasks, the methods that are compared, and how."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from softprompts.config import EvaluationConfig, ModelConfig, PromptConfig, Section, TaskConfig, TrainConfig
from softprompts.config.schema import Count
from softprompts.recipes.comparison import NO_PROMPT, WEIGHTS, ComparisonStage, Rate, check_distinct, check_known


class Arm(Section):
    """A line of the table: a method as it is used."""

    about: str = ""
    """What the arm is, in a few words."""

    prompt: dict[str, Any] = Field(default={})
    """Keys of the section `prompt` in which the arm differs from the study."""

    learning_rates: tuple[Rate, ...] = ()
    """Learning rates that are tried, of which the best is taken; empty: the study's."""

    follow: dict[str, Rate] = Field(default={})
    """Learning rates of parameter groups, as multiples of the rate that is tried."""

    pretrain: bool = False
    """Whether the arm starts from what the stage `pretrain` taught its method."""

    @field_validator("learning_rates")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return check_distinct(values)


TABLE = {"table": "low-rank", "rank": 16}
"""A table of 0.6 % of SmolLM2-135M's size, within the 0.5-1.5 % that the paper of IPT speaks of."""

GENERATOR = {"output": 0.1, "hidden": 0.01}

ARMS: dict[str, Arm] = {
    "prompt-tuning": Arm(about="one prompt for all texts"),
    "prefix": Arm(about="keys and values at every layer", prompt={"method": "prefix-tuning", "site": "kv"}),
    "p-tuning": Arm(
        about="a prompt from an LSTM", prompt={"method": "p-tuning"}, follow={"network": 0.01, "output": 0.02}
    ),
    "ipt-lookup": Arm(
        about="looked up for the text's words", prompt={"method": "ipt", "options": {**TABLE, "base": "start"}}
    ),
    "ipt-pretrained": Arm(
        about="the same, table taught topics",
        prompt={"method": "ipt", "options": {**TABLE, "base": "start"}},
        pretrain=True,
    ),
    "ipt-encoder": Arm(
        about="from the text's words by a CNN",
        prompt={"method": "ipt", "options": {**TABLE, "strategy": "cnn"}},
        follow={"encoder": 0.01},
    ),
    "idpg-s": Arm(
        about="generated, at the input",
        prompt={"method": "idpg", "options": {"hidden": 64, "encoder": "backbone"}},
        follow=GENERATOR,
    ),
    "idpg-m": Arm(
        about="generated, at every layer",
        prompt={"method": "idpg", "site": "layers", "mode": "add", "options": {"encoder": "backbone"}},
        follow=GENERATOR,
    ),
    "spt": Arm(about="with rows of a memory (reconstruction)", prompt={"method": "spt-reconstruction"}),
    "prefix-network": Arm(
        about="keys and values from a network",
        prompt={"method": "prefix-tuning", "site": "kv", "options": {"reparametrize": True, "hidden": 128}},
        follow={"network": 0.01},
    ),
    "p-tuning-v2": Arm(
        about="keys and values, a tenth dropped",
        prompt={"method": "p-tuning-v2", "site": "kv", "options": {"dropout": 0.1}},
    ),
    "residual": Arm(about="a prompt and a network of it", prompt={"method": "residual"}, follow={"network": 0.01}),
    "dept": Arm(
        about="a shorter prompt, and texts changed",
        prompt={"method": "dept", "num_virtual_tokens": 12, "options": {"rank": 7, "positions": 48}},
        follow={"matrices": 0.01},
    ),
    "low-rank": Arm(about="a product of two matrices", prompt={"method": "low-rank", "options": {"rank": 5}}),
}
"""The arms that a plan can name."""

COMPARED = (
    *("prompt-tuning", "prefix", "p-tuning", "ipt-lookup", "ipt-pretrained", "ipt-encoder"),
    *("idpg-s", "idpg-m", "spt"),
)
"""The arms of a plan that names none."""


class PretrainStage(Section):
    """What `softprompts pretrain` teaches the methods of arms that ask for it."""

    task: TaskConfig
    """A task of classes."""

    training: TrainConfig = TrainConfig(max_steps=200, batch_size=32, learning_rate=0.03, head_learning_rate=0.01)
    """How the classes are taught."""


class SpeedStage(Section):
    """Steps that are timed, of each arm alone on the first task, the arms in turns; run it on a quiet machine."""

    steps: Count = 6
    """Steps of one measurement."""

    repeats: Count = 2
    """Measurements of each arm."""


class Study(Section):
    """The whole study."""

    model: ModelConfig = ModelConfig()
    """The frozen backbone."""

    prompt: PromptConfig = PromptConfig()
    """Length and start of the prompts, and their site where an arm has none; each arm sets its method."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """The tasks."""

    arms: tuple[str, ...] = Field(default=COMPARED, min_length=1)
    """The arms that are compared."""

    own: dict[str, Arm] = Field(default={})
    """Your own arms, and keys in which an arm of a known name differs."""

    upper: tuple[str, ...] = tuple(WEIGHTS)
    """The arms that train weights, the upper lines of the table."""

    compare: ComparisonStage = ComparisonStage()
    """How the arms are compared."""

    pretrain: PretrainStage | None = None
    """What is taught to the methods of arms that start from it."""

    speed: SpeedStage | None = SpeedStage()
    """The measurement of step times; null: none."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How rows are answered and answers scored."""

    output_dir: str = "runs/instance"
    """The directory of all stages, results.json and report.html."""

    @property
    def known(self) -> Mapping[str, Arm]:
        """Every arm by its name."""
        return {**ARMS, **self.own}

    @property
    def titles(self) -> list[str]:
        """The names of the tasks."""
        return [task.title for task in self.tasks]

    @field_validator("own")
    @classmethod
    def _complete(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        """Complete an arm of a known name with the keys that it does not set."""
        complete_arms = {}
        for name, arm in arms.items():
            changes = {key: getattr(arm, key) for key in arm.model_fields_set}
            complete_arms[name] = ARMS.get(name, arm).model_copy(update=changes)
        return complete_arms

    @field_validator("arms", "upper")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return check_distinct(values)

    @model_validator(mode="after")
    def _names(self) -> "Study":
        if len(set(self.titles)) != len(self.titles):
            raise ValueError(f"task names must differ, given {', '.join(self.titles)}; set the name of one")
        if self.model.head != "lm":
            raise ValueError(f"runs that train together share a language model's head, not '{self.model.head}'")
        for key in ("method", "options"):
            if getattr(self.prompt, key) != getattr(PromptConfig(), key):
                raise ValueError(f"prompt.{key} is set by each arm; leave it out (see own)")
        for name in self.own:
            if name in (*WEIGHTS, NO_PROMPT):
                raise ValueError(f"own: '{name}' is another line of the table; call the arm otherwise")
        for stage in ("training", "few"):
            for key in ("learning_rate", "learning_rates"):
                if getattr(getattr(self.compare, stage), key) != getattr(TrainConfig(), key):
                    raise ValueError(
                        f"compare.{stage}.{key}: arms try the rates of compare.learning_rates, or their own rates, "
                        f"and those of their groups follow (own: learning_rates, follow); leave it out"
                    )
        lists = {
            "arms": (self.arms, list(self.known)),
            "upper": (self.upper, list(WEIGHTS)),
            "compare.tune_on": (self.compare.tune_on or (), self.titles),
            "compare.weight_targets": (self.compare.weight_targets or (), self.titles),
            "compare.weight_learning_rates": (self.compare.weight_learning_rates, list(WEIGHTS)),
        }
        for key, (names, known) in lists.items():
            check_known(key, names, known)
        for name in self.arms:
            if self.known[name].pretrain and self.pretrain is None:
                raise ValueError(f"arm '{name}' begins at what was pretrained; give the section pretrain, with a task")
        for name in self.upper:
            if not self.compare.weight_learning_rates.get(name):
                raise ValueError(f"arm '{name}' needs rates to choose from in compare.weight_learning_rates")
        if 0 in self.compare.shots:
            raise ValueError("compare.shots: methods are compared by what they learn; leave 0 out")
        return self
