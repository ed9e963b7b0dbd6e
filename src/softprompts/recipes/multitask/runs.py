"""The runs of each stage of a plan: what they train, from which start, and where they write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
