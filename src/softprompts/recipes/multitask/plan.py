"""The configuration of the recipe: sources, targets, and how each stage trains."""

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
from softprompts.config.schema import Count, Seed
from softprompts.recipes.comparison import WEIGHTS, ComparisonStage, check_distinct, check_known
from softprompts.recipes.multitask.arms import ARMS, VARIANTS

RECIPE_KEYS = ("target", "distillation", "objectives", "learning_rates")
"""Keys of a stage's training that the recipe sets itself."""


class TeacherStage(Section):
    """A prompt for each source, all trained in the same batches."""

    training: TrainConfig = TrainConfig(max_steps=300, batch_size=16, warmup_steps=30, lr_scheduler_type="linear")
    """How the teachers are trained."""

    trained: dict[str, str] = Field(default={})
    """Directories of trained prompts, by source."""


class SourceStage(Section):
    """The shared prompt: task loss + logits · L_Logits + hidden · L_Hidden (section 3.1)."""

    training: TrainConfig = TrainConfig(
        max_steps=400, batch_size=16, warmup_steps=30, sampling=SamplingConfig(draw="some")
    )
    """How the shared prompt is trained; by default each batch draws its tasks."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """The shared prompts to train: with and without distillation and decomposition."""

    logits: float = Field(default=0.9, ge=0)
    """Weight of the distillation of logits."""

    hidden: float = Field(default=0.9, ge=0)
    """Weight of the distillation of hidden states."""

    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both softmaxes in the distillation of logits."""

    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    """The states that are distilled: those behind layer 1, 2, ...; -1: what the head reads."""

    ranks: Count = 1
    """Rank of the factors, here and on targets."""

    seed: Seed = 0
    """Seed of the shared prompt."""


class TargetStage(ComparisonStage):
    """Every arm on every target, with all rows and with few."""

    arms: tuple[str, ...] = tuple(name for name, arm in ARMS.items() if not arm.only_if_named)
    """The arms with all rows."""

    few_arms: tuple[str, ...] | None = None
    """The arms with few rows; null: the same."""

    factor_learning_rate: float = Field(default=4 / 3, gt=0)
    """Learning rate of a task's factors, as a multiple of that of the shared prompt."""

    probe_steps: Count = 30
    """Steps after which a target's prompt is its embedding (SPoT)."""

    nearest: Count = 3
    """How many sources the weighted start of SPoT mixes."""

    @field_validator("arms", "few_arms")
    @classmethod
    def _once(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else check_distinct(values)


class Plan(Section):
    """The whole recipe."""

    model: ModelConfig = ModelConfig()
    """The frozen backbone."""

    prompt: PromptConfig = PromptConfig()
    """Length, site and start of teachers, shared prompts and probes; each arm sets its method."""

    sources: tuple[TaskConfig, ...] = Field(min_length=1)
    """The tasks that share a prompt."""

    targets: tuple[TaskConfig, ...] = Field(min_length=1)
    """The tasks that the shared prompt is adapted to."""

    teachers: TeacherStage = TeacherStage()
    """A prompt for each source."""

    source: SourceStage = SourceStage()
    """The shared prompt."""

    target: TargetStage = TargetStage()
    """The arms on the targets."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How rows are answered and answers scored."""

    output_dir: str = "runs/multitask"
    """The directory of all stages, results.json and report.html."""

    @field_validator("sources", "targets")
    @classmethod
    def _distinct(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        names = [task.title for task in tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"task names must differ, given {', '.join(names)}; set the name of one")
        return tasks

    @model_validator(mode="after")
    def _names(self) -> "Plan":
        sources = [task.title for task in self.sources]
        targets = [task.title for task in self.targets]
        if self.model.head != "lm":
            raise ValueError(f"tasks that share a prompt share a language model's head, not '{self.model.head}'")
        check_known("teachers.trained", self.teachers.trained, sources)
        check_known("source.variants", self.source.variants, list(VARIANTS))
        check_known("target.arms", (*self.target.arms, *(self.target.few_arms or ())), list(ARMS))
        check_known("target.tune_on", self.target.tune_on or (), targets)
        check_known("target.weight_targets", self.target.weight_targets or (), targets)
        check_known("target.weight_learning_rates", self.target.weight_learning_rates, list(WEIGHTS))
        few_arms = self.target.arms if self.target.few_arms is None else self.target.few_arms
        for arm in few_arms if 0 in self.target.shots else ():
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
            for key in RECIPE_KEYS:
                if getattr(stage, key) != getattr(TrainConfig(), key):
                    raise ValueError(f"{name}.{key} is set by the recipe itself; leave it out")
        for key in ("method", "options"):
            if getattr(self.prompt, key) != getattr(PromptConfig(), key):
                raise ValueError(f"prompt.{key} is set by the recipe itself, for each arm; leave it out")
        return self
