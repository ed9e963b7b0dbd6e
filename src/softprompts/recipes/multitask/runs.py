"""From the plan to the runs of each stage: what is trained from which start, and where it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompts.config import Run, SamplingConfig, TaskConfig, TrainConfig, parse
from softprompts.recipes import stages
from softprompts.recipes.comparison import ALL_TARGETS, WEIGHTS, ArmRun, size_name
from softprompts.recipes.multitask.arms import ARMS, VARIANTS
from softprompts.recipes.multitask.plan import Plan
from softprompts.recipes.run.results import prompt_directory


@dataclass(frozen=True)
class Origins:
    """What targets start from: each source's prompt, each variant's directory, and for each (target, shots, seed) the
    sources most like it, as (name, weight), the nearest first."""

    teachers: Mapping[str, str]
    variants: Mapping[str, Path]
    nearest: Mapping[tuple[str, int | None, int], Sequence[tuple[str, float]]]


def teacher_runs(plan: Plan) -> Run:
    """Prompt tuning of each source that has no teacher yet, all in one frozen batch."""
    entries = [
        {"name": task.title, "task": task.model_dump(mode="json")}
        for task in plan.sources
        if task.title not in plan.teachers.trained
    ]
    return stages.build_run(
        plan, plan.sources[:1], plan.teachers.training, Path(plan.output_dir) / "teachers", runs=entries
    )


def teacher_paths(plan: Plan) -> dict[str, str]:
    """Where the prompt of each source lies."""
    own = {task.title: str(Path(plan.output_dir) / "teachers" / task.title / "prompt") for task in plan.sources}
    return own | dict(plan.teachers.trained)


def source_runs(plan: Plan) -> Run:
    """Each variant of the shared prompt on all sources, all in one frozen batch; the teachers' states are shared."""
    own, out = plan.source, Path(plan.output_dir) / "sources"
    distil = {
        "teachers": teacher_paths(plan),
        "temperature": own.temperature,
        "layers": list(own.layers),
        "cache": str(out / "teacher-states.safetensors"),
    }
    taught = {"distil-logits": own.logits, "distil-hidden": own.hidden}
    entries = []
    for name in own.variants:
        variant = VARIANTS[name]
        used = {key: weight for key, weight in taught.items() if weight and variant.distil}
        entries.append(
            {
                "name": name,
                "prompt.options": {"ranks": own.ranks, "factors": "trained" if variant.decompose else "fixed"},
                "training.objectives": {"task": 1.0, **used},
                "training.distillation": distil if used else None,
            }
        )
    shared = {"method": "multitask-prompt-tuning"}
    return stages.build_run(plan, plan.sources, own.training, out, prompt=shared, runs=entries, seed=own.seed)


def probe_runs(plan: Plan) -> Run:
    """A short prompt tuning of each target, with what each seed has: where it has come to is its embedding (SPoT).

    Without runs where no arm asks for it.
    """
    entries = [
        {
            "name": probe_name(task.title, shots, seed),
            "seed": seed,
            "task": plan.target.draw_rows(task, shots, seed).model_dump(mode="json"),
        }
        for shots in plan.target.shots
        if {"nearest", "weighted"} & {ARMS[arm].start for arm in select_arms(plan, shots, weights=False)}
        for task in plan.targets
        for seed in plan.target.seeds
    ]
    train = plan.target.few.model_copy(
        update={"max_steps": plan.target.probe_steps, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    )
    return stages.build_run(plan, plan.targets[:1], train, Path(plan.output_dir) / "probes", runs=entries)


def probe_name(target: str, shots: int | None, seed: int) -> str:
    """The folder of a probe."""
    return f"{target}-{size_name(shots)}-seed{seed}"


def target_run(plan: Plan, target: str, shots: int | None, origins: Origins, cells: Sequence[ArmRun], part: str) -> Run:
    """The runs of `cells` on one target, or on all of them, in one frozen batch; `part` is their folder."""
    tasks = plan.targets if target == ALL_TARGETS else tuple(t for t in plan.targets if t.title == target)
    entries = [_entry(plan, tasks, shots, origins, cell) for cell in cells]
    out = Path(plan.output_dir) / "targets" / f"{target}-{size_name(shots)}" / part
    return stages.build_run(plan, tasks, _training(plan, shots, len(tasks)), out, runs=entries)


def weights_run(plan: Plan, target: str, shots: int | None, cell: ArmRun) -> Run:
    """A run that trains weights of the backbone: by itself, because nothing of it is shared."""
    task = next(task for task in plan.targets if task.title == target)
    out = Path(plan.output_dir) / "targets" / f"{target}-{size_name(shots)}" / "weights" / cell.name
    train = parse(plan.target.weight_training(cell, shots), TrainConfig)
    return stages.build_run(plan, (plan.target.draw_rows(task, shots, cell.seed),), train, out, seed=cell.seed)


def select_arms(plan: Plan, shots: int | None, weights: bool, all_targets: bool = False) -> list[str]:
    """The arms at a size that train weights, or prompts for each target, or one prompt for all."""
    chosen = plan.target.arms if shots is None or plan.target.few_arms is None else plan.target.few_arms
    return [arm for arm in chosen if (arm in WEIGHTS) == weights and ARMS[arm].all_targets == all_targets]


def weight_targets(plan: Plan) -> list[str]:
    """The targets of the arms that train weights."""
    every = [task.title for task in plan.targets]
    return [name for name in every if plan.target.weight_targets is None or name in plan.target.weight_targets]


def _training(plan: Plan, shots: int | None, tasks: int) -> TrainConfig:
    """How targets are trained: every batch has rows of all `tasks`, of each as many as it would have alone."""
    train = plan.target.training_for(shots)
    if tasks == 1:
        return train
    return train.model_copy(update={"batch_size": train.batch_size * tasks, "sampling": SamplingConfig(draw="all")})


def _entry(
    plan: Plan, tasks: Sequence[TaskConfig], shots: int | None, origins: Origins, cell: ArmRun
) -> dict[str, Any]:
    arm = ARMS[cell.arm]
    factors = arm.start == "factors"
    rates = {"factors": cell.rate * plan.target.factor_learning_rate} if factors else {}
    target = ALL_TARGETS if len(tasks) > 1 else tasks[0].title
    return {
        "name": cell.name,
        "seed": cell.seed,
        "tasks": [plan.target.draw_rows(task, shots, cell.seed).model_dump(mode="json") for task in tasks],
        "prompt.method": arm.method,
        "prompt.options": {"ranks": plan.source.ranks} if factors else {},
        "prompt.init": _init(cell.arm, plan, origins, origins.nearest.get((target, shots, cell.seed), ())),
        "training.learning_rate": cell.rate,
        "training.learning_rates": rates,
    }


def _init(name: str, plan: Plan, origins: Origins, nearest: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """`prompt.init` of an arm."""
    arm = ARMS[name]
    if arm.start == "factors":
        return {"kind": "multitask", "path": str(origins.variants[arm.variant] / "prompt")}
    if arm.start == "prompt":
        # With factors fixed at one every source's prompt is the shared one.
        first, count = plan.sources[0].title, len(plan.sources)
        return {"kind": "artifact", "path": str(prompt_directory(origins.variants[arm.variant], first, count))}
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
