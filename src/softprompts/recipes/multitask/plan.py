"""What a user writes for the recipe: sources, targets, and how each stage trains; every cap is a key."""

from pydantic import Field, field_validator, model_validator

from softprompts.config import (
    EvaluationConfig,
    ModelConfig,
    PromptConfig,
    SamplingConfig,
    Section,
    TaskConfig,
    TrainConfig,
)
from softprompts.recipes.comparison import WEIGHTS, ComparisonStage, check_known, distinct
from softprompts.recipes.multitask.arms import ARMS, VARIANTS

KEPT = ("target", "distillation", "objectives", "learning_rates")
"""Keys of a stage's training that the recipe sets itself."""


class TeacherStage(Section):
    """A prompt for each source, all in one frozen batch; `trained` names those that are there already."""

    training: TrainConfig = TrainConfig(max_steps=300, batch_size=16, warmup_steps=30, lr_scheduler_type="linear")
    trained: dict[str, str] = Field(default={})  # source -> directory of its prompt


class SourceStage(Section):
    """The shared prompt: task loss + logits · L_Logits + hidden · L_Hidden (section 3.1); batches draw their tasks."""

    training: TrainConfig = TrainConfig(
        max_steps=400, batch_size=16, warmup_steps=30, sampling=SamplingConfig(draw="some")
    )
    variants: tuple[str, ...] = tuple(VARIANTS)
    logits: float = Field(default=0.9, ge=0)
    hidden: float = Field(default=0.9, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    ranks: int = Field(default=1, ge=1)  # of the factors, here and on targets
    seed: int = Field(default=0, ge=0)


class TargetStage(ComparisonStage):
    """Every arm on every target, with all rows and with few; the rate of each arm is chosen on validation rows."""

    arms: tuple[str, ...] = tuple(name for name, arm in ARMS.items() if not arm.asked)
    few_arms: tuple[str, ...] | None = None  # with few rows; None: the same
    factor_learning_rate: float = Field(default=4 / 3, gt=0)  # rate of a task's factors over that of the shared prompt
    probe_steps: int = Field(default=30, ge=1)  # after so many steps a target's prompt is its embedding (SPoT)
    nearest: int = Field(default=3, ge=1)  # how many sources the weighted start of SPoT mixes

    @field_validator("arms", "few_arms")
    @classmethod
    def _once(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else distinct(values)


class Plan(Section):
    """The whole study; `prompt` says length, site and where teachers, shared prompts and probes start."""

    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    sources: tuple[TaskConfig, ...] = Field(min_length=1)
    targets: tuple[TaskConfig, ...] = Field(min_length=1)
    teachers: TeacherStage = TeacherStage()
    source: SourceStage = SourceStage()
    target: TargetStage = TargetStage()
    evaluation: EvaluationConfig = EvaluationConfig()
    output_dir: str = "runs/multitask"

    @field_validator("sources", "targets")
    @classmethod
    def _distinct(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        names = [task.title for task in tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"task names must differ, given {', '.join(names)}; set the name of one")
        return tasks

    @model_validator(mode="after")
    def _names(self) -> "Plan":
        sources, targets = ([task.title for task in tasks] for tasks in (self.sources, self.targets))
        if self.model.head != "lm":
            raise ValueError(f"tasks that share a prompt share a language model's head, not '{self.model.head}'")
        check_known("teachers.trained", self.teachers.trained, sources)
        check_known("source.variants", self.source.variants, list(VARIANTS))
        check_known("target.arms", (*self.target.arms, *(self.target.few_arms or ())), list(ARMS))
        check_known("target.tune_on", self.target.tune_on or (), targets)
        check_known("target.weight_targets", self.target.weight_targets or (), targets)
        check_known("target.weight_learning_rates", self.target.weight_learning_rates, list(WEIGHTS))
        few = self.target.arms if self.target.few_arms is None else self.target.few_arms
        for arm in few if 0 in self.target.shots else ():
            if arm in WEIGHTS or ARMS[arm].start in ("nearest", "weighted"):
                raise ValueError(f"arm '{arm}' needs rows of the target, and target.shots has 0; leave one of them out")
        for arm in (*self.target.arms, *(self.target.few_arms or ())):
            if ARMS[arm].start == "second" and len(self.sources) < 2:
                raise ValueError(f"arm '{arm}' needs a second source; leave it out, or give one")
            variant = ARMS[arm].variant
            if variant and variant not in self.source.variants:
                raise ValueError(f"arm '{arm}' starts from variant '{variant}'; add it to source.variants")
            if arm in WEIGHTS and not self.target.weight_learning_rates.get(arm):
                raise ValueError(f"arm '{arm}' needs rates to choose from in target.weight_learning_rates")
        for name, stage in (
            ("teachers.training", self.teachers.training),
            ("source.training", self.source.training),
            ("target.training", self.target.training),
            ("target.few", self.target.few),
        ):
            for key in KEPT:
                if getattr(stage, key) != getattr(TrainConfig(), key):
                    raise ValueError(f"{name}.{key} is set by the recipe itself; leave it out")
        for key in ("method", "options"):
            if getattr(self.prompt, key) != getattr(PromptConfig(), key):
                raise ValueError(f"prompt.{key} is set by the recipe itself, for each arm; leave it out")
        return self
