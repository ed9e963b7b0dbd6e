"""The plan of the recipe: its arms, its configuration, and the runs of each stage that follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from softprompts.config import (
    EvaluationConfig,
    ModelConfig,
    PromptConfig,
    Run,
    SamplingConfig,
    Section,
    TaskConfig,
    TrainConfig,
    parse,
)
from softprompts.config.schema import Count, Seed
from softprompts.recipes import stages
from softprompts.recipes.comparison import (
    ALL_TARGETS,
    WEIGHTS,
    ArmRun,
    ComparisonStage,
    check_distinct,
    check_known,
    size_name,
)
from softprompts.recipes.run.results import prompt_directory

Start = Literal[
    "random", "vocabulary", "labels", "prompt", "factors", "first", "second", "nearest", "weighted", "sources",
    "vectors", "none",
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A line of the table.

    Attributes:
        about: What the arm is, in a few words.
        method: The method of the target's prompt, or the weights that are trained.
        start: The start of the prompt. `random`, `vocabulary` and `labels` are kinds of prompt.init. `prompt` is the
            variant's shared prompt, and `factors` the same with the average of the sources' factors. `first` and
            `second` are the prompts of these sources of the plan. `nearest` and `weighted` are the source prompts most
            similar to the target's own (SPoT). `sources` is vocabulary, beside the source prompts that ATTEMPT mixes.
            `vectors` is vocabulary plus the sum of the sources' task prompt vectors.
        variant: The variant of the source stage that the arm starts from.
        all_targets: Whether one run trains on all targets.
        only_if_named: Whether the arm runs only where a plan names it.
    """

    about: str
    method: str
    start: Start
    variant: str = ""
    all_targets: bool = False
    only_if_named: bool = False


ARMS: dict[str, Arm] = {
    "random": Arm("prompt tuning from random vectors", "prompt-tuning", "random"),
    "prompt-tuning": Arm("prompt tuning from vocabulary", "prompt-tuning", "vocabulary"),
    "labels": Arm("prompt tuning from class labels", "prompt-tuning", "labels"),
    "spot-mixture": Arm("SPoT, one prompt of all sources", "prompt-tuning", "prompt", "mixture"),
    "spot-first": Arm("SPoT, the first source", "prompt-tuning", "first", only_if_named=True),
    "spot-second": Arm("SPoT, the second source", "prompt-tuning", "second", only_if_named=True),
    "spot-nearest": Arm("SPoT, the nearest source", "prompt-tuning", "nearest"),
    "spot-weighted": Arm("SPoT, the nearest sources weighted", "prompt-tuning", "weighted"),
    "attempt": Arm("ATTEMPT", "attempt", "sources"),
    "vectors": Arm("sum of task prompt vectors", "prompt-tuning", "vectors", only_if_named=True),
    "mpt": Arm("multitask prompt tuning", "multitask-prompt-tuning", "factors", "mpt"),
    "mpt-no-distillation": Arm("without distillation", "multitask-prompt-tuning", "factors", "no-distillation"),
    "mpt-no-decomposition": Arm("without decomposition", "prompt-tuning", "prompt", "no-decomposition"),
    "mpt-together": Arm("one shared prompt for all targets", "multitask-prompt-tuning", "factors", "mpt", True),
    "fine-tuning": Arm("all weights", "backbone", "none"),
    "lora": Arm("low-rank updates of the weights", "lora", "none"),
}


@dataclass(frozen=True)
class Variant:
    """A way to train the shared prompt: with or without teachers, with factors for each source or one prompt."""

    distill: bool
    decompose: bool


VARIANTS: dict[str, Variant] = {
    "mpt": Variant(distill=True, decompose=True),
    "no-distillation": Variant(distill=False, decompose=True),
    "no-decomposition": Variant(distill=True, decompose=False),
    "mixture": Variant(distill=False, decompose=False),
}

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


@dataclass(frozen=True)
class Origins:
    """The prompts that targets start from.

    Attributes:
        teachers: The directory of each source's prompt.
        variants: The directory of each variant of the shared prompt.
        nearest: For each (target, shots, seed) the most similar sources as (name, weight), the nearest first.
    """

    teachers: Mapping[str, str]
    variants: Mapping[str, Path]
    nearest: Mapping[tuple[str, int | None, int], Sequence[tuple[str, float]]]


def teacher_runs(plan: Plan) -> Run:
    """Prompt tuning of each source that has no teacher yet, all in one frozen batch."""
    entries = []
    for task in plan.sources:
        if task.title not in plan.teachers.trained:
            entries.append({"name": task.title, "task": task.model_dump(mode="json")})
    return stages.build_run(
        plan, plan.sources[:1], plan.teachers.training, Path(plan.output_dir) / "teachers", runs=entries
    )


def teacher_paths(plan: Plan) -> dict[str, str]:
    """The directory of each source's prompt."""
    folder = Path(plan.output_dir) / "teachers"
    paths = {task.title: str(folder / task.title / "prompt") for task in plan.sources}
    return paths | dict(plan.teachers.trained)


def source_runs(plan: Plan) -> Run:
    """Each variant of the shared prompt on all sources, all in one frozen batch; they share the teachers' outputs."""
    stage = plan.source
    out = Path(plan.output_dir) / "sources"
    distillation = {
        "teachers": teacher_paths(plan),
        "temperature": stage.temperature,
        "layers": list(stage.layers),
        "cache": str(out / "teacher-states.safetensors"),
    }
    weights = {"distill-logits": stage.logits, "distill-hidden": stage.hidden}
    entries = []
    for name in stage.variants:
        variant = VARIANTS[name]
        objectives = {key: weight for key, weight in weights.items() if weight and variant.distill}
        entries.append(
            {
                "name": name,
                "prompt.options": {"ranks": stage.ranks, "factors": "trained" if variant.decompose else "fixed"},
                "training.objectives": {"task": 1.0, **objectives},
                "training.distillation": distillation if objectives else None,
            }
        )
    prompt = {"method": "multitask-prompt-tuning"}
    return stages.build_run(plan, plan.sources, stage.training, out, prompt=prompt, runs=entries, seed=stage.seed)


def probe_runs(plan: Plan) -> Run:
    """A short prompt tuning of each target for each size and seed, whose prompt is the target's embedding (SPoT).

    There are no runs where no arm needs it.
    """
    entries = []
    for shots in plan.target.shots:
        starts = {ARMS[arm].start for arm in select_arms(plan, shots, weights=False)}
        if not starts & {"nearest", "weighted"}:
            continue
        for task, seed in product(plan.targets, plan.target.seeds):
            drawn = plan.target.draw_rows(task, shots, seed).model_dump(mode="json")
            entries.append({"name": probe_name(task.title, shots, seed), "seed": seed, "task": drawn})
    train = plan.target.few.model_copy(
        update={"max_steps": plan.target.probe_steps, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    )
    return stages.build_run(plan, plan.targets[:1], train, Path(plan.output_dir) / "probes", runs=entries)


def probe_name(target: str, shots: int | None, seed: int) -> str:
    """The folder of a probe."""
    return f"{target}-{size_name(shots)}-seed{seed}"


def target_run(
    plan: Plan, target: str, shots: int | None, origins: Origins, arm_runs: Sequence[ArmRun], part: str
) -> Run:
    """The runs of arms on one target, or on all of them, in one frozen batch; `part` is their folder."""
    tasks = plan.targets if target == ALL_TARGETS else tuple(task for task in plan.targets if task.title == target)
    entries = [_entry(plan, tasks, shots, origins, arm_run) for arm_run in arm_runs]
    out = Path(plan.output_dir) / "targets" / f"{target}-{size_name(shots)}" / part
    return stages.build_run(plan, tasks, _training(plan, shots, len(tasks)), out, runs=entries)


def weights_run(plan: Plan, target: str, shots: int | None, arm_run: ArmRun) -> Run:
    """A run that trains weights of the backbone; it shares no batch with others."""
    task = next(task for task in plan.targets if task.title == target)
    out = Path(plan.output_dir) / "targets" / f"{target}-{size_name(shots)}" / "weights" / arm_run.name
    train = parse(plan.target.weight_training(arm_run, shots), TrainConfig)
    return stages.build_run(plan, (plan.target.draw_rows(task, shots, arm_run.seed),), train, out, seed=arm_run.seed)


def select_arms(plan: Plan, shots: int | None, weights: bool, all_targets: bool = False) -> list[str]:
    """The arms of a size.

    Args:
        plan: The plan.
        shots: The size.
        weights: Whether they train weights of the backbone, or prompts.
        all_targets: Whether they train one prompt for all targets, or one for each.
    """
    arms = plan.target.arms if shots is None or plan.target.few_arms is None else plan.target.few_arms
    return [arm for arm in arms if (arm in WEIGHTS) == weights and ARMS[arm].all_targets == all_targets]


def weight_targets(plan: Plan) -> list[str]:
    """The targets of the arms that train weights."""
    titles = [task.title for task in plan.targets]
    return [title for title in titles if plan.target.weight_targets is None or title in plan.target.weight_targets]


def _training(plan: Plan, shots: int | None, tasks: int) -> TrainConfig:
    """How targets are trained: every batch has rows of all `tasks`, as many of each as it has by itself."""
    train = plan.target.training_for(shots)
    if tasks == 1:
        return train
    return train.model_copy(update={"batch_size": train.batch_size * tasks, "sampling": SamplingConfig(draw="all")})


def _entry(
    plan: Plan, tasks: Sequence[TaskConfig], shots: int | None, origins: Origins, arm_run: ArmRun
) -> dict[str, Any]:
    """An arm's run as an entry of a configuration's `runs`."""
    arm = ARMS[arm_run.arm]
    factors = arm.start == "factors"
    rates = {"factors": arm_run.rate * plan.target.factor_learning_rate} if factors else {}
    target = ALL_TARGETS if len(tasks) > 1 else tasks[0].title
    nearest = origins.nearest.get((target, shots, arm_run.seed), ())
    return {
        "name": arm_run.name,
        "seed": arm_run.seed,
        "tasks": [plan.target.draw_rows(task, shots, arm_run.seed).model_dump(mode="json") for task in tasks],
        "prompt.method": arm.method,
        "prompt.options": {"ranks": plan.source.ranks} if factors else {},
        "prompt.init": _init(arm_run.arm, plan, origins, nearest),
        "training.learning_rate": arm_run.rate,
        "training.learning_rates": rates,
    }


def _init(name: str, plan: Plan, origins: Origins, nearest: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The section `prompt.init` of an arm; `nearest` are the most similar sources with their weights."""
    arm = ARMS[name]
    if arm.start == "factors":
        return {"kind": "multitask", "path": str(origins.variants[arm.variant] / "prompt")}
    if arm.start == "prompt":
        # With factors fixed at one, every source's prompt equals the shared one.
        first = plan.sources[0].title
        path = prompt_directory(origins.variants[arm.variant], first, len(plan.sources))
        return {"kind": "artifact", "path": str(path)}
    if arm.start in ("first", "second"):
        return {"kind": "artifact", "path": origins.teachers[plan.sources[arm.start == "second"].title]}
    if arm.start == "vectors":
        total = " + ".join(f'"{origins.teachers[task.title]}"' for task in plan.sources)
        return {"kind": "vector", "vector": total, "start": {"kind": "vocabulary"}}
    if arm.start == "nearest":
        return {"kind": "artifact", "path": origins.teachers[nearest[0][0]]}
    if arm.start == "weighted":
        paths = [origins.teachers[source] for source, _ in nearest]
        return {"kind": "mean", "paths": paths, "weights": [weight for _, weight in nearest]}
    if arm.start == "sources":
        return {"kind": "vocabulary", "sources": list(origins.teachers.values())}
    return {"kind": arm.start}
