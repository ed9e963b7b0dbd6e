"""The stages in order; each is a directory, and a stage with results is not done again."""

import functools
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompts.artifacts import artifact
from softprompts.artifacts.vectors import similarity
from softprompts.evaluation import page
from softprompts.recipes import comparison, stages
from softprompts.recipes.comparison import ALL_TARGETS, ArmResult, ArmRun, Comparison, size_name
from softprompts.recipes.multitask.checks import check
from softprompts.recipes.multitask.plan import Plan
from softprompts.recipes.multitask.runs import (
    Origins,
    probe_name,
    probe_runs,
    select_arms,
    source_runs,
    target_run,
    teacher_paths,
    teacher_runs,
    weight_targets,
    weights_run,
)
from softprompts.recipes.multitask.summary import page_of, summarize
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.run import ProgressReporter


def execute(plan: Plan, reporter: ProgressReporter = SILENT) -> dict[str, Any]:
    """Train teachers, shared prompts and targets; write results.json and report.html into plan.output_dir.

    A second call continues an interrupted one. It repeats stages whose settings, or the prompts that they start from,
    have changed.

    Returns:
        The content of results.json.

    Raises:
        ConfigError, DataError, ArtifactError: A task or a teacher is wrong. Both are checked before any training.
        TrainingError: A teacher or a shared prompt could not be trained.
    """
    began = time.time()
    stages.check_output_directory("the recipe", plan.output_dir)
    check(plan, reporter)
    teachers = teacher_paths(plan)
    run = teacher_runs(plan)
    if run.runs:
        stages.run_complete_group("teachers", run, reporter)
    variants = {name: Path(plan.output_dir) / "sources" / name for name in plan.source.variants}
    sources: dict[str, Any] = {"runs": []}
    if variants:
        sources = stages.run_complete_group("sources", source_runs(plan), reporter, list(teachers.values()))
    teacher_prompts = {name: artifact.load(path).require_prompt(path) for name, path in teachers.items()}
    origins = Origins(teachers, variants, _nearest_sources(plan, teacher_prompts, reporter))
    targets = Comparison(plan.target, functools.partial(_run_arms, plan, origins, reporter))
    for shots in plan.target.shots:
        targets.run_arms(shots, select_arms(plan, shots, weights=False), [task.title for task in plan.targets])
        targets.run_arms(shots, select_arms(plan, shots, weights=False, all_targets=True), [ALL_TARGETS])
    for shots in plan.target.shots:  # the slowest, one run after the other
        targets.run_arms(shots, select_arms(plan, shots, weights=True), weight_targets(plan))
    results = summarize(plan, targets, sources, origins, teacher_prompts, time.time() - began)
    page.write_results(Path(plan.output_dir) / stages.RESULTS, results)
    page.write_page(Path(plan.output_dir) / "report.html", page_of(results))
    return results


def _nearest_sources(
    plan: Plan, teachers: Mapping[str, Tensor], reporter: ProgressReporter
) -> dict[tuple[str, int | None, int], Sequence[tuple[str, float]]]:
    """For each target, size and seed the sources most similar to its prompt after a few steps, with weights (SPoT)."""
    run = probe_runs(plan)
    if not run.runs:
        return {}
    stages.run_complete_group("probes", run, reporter)
    count = min(plan.target.nearest, len(teachers))
    nearest: dict[tuple[str, int | None, int], Sequence[tuple[str, float]]] = {}
    for task, shots, seed in product(plan.targets, plan.target.shots, plan.target.seeds):
        path = Path(run.output_dir) / probe_name(task.title, shots, seed) / "prompt"
        if path.exists():
            prompt = artifact.load(path).require_prompt(path)
            retrieved = similarity.retrieve(prompt, teachers, count)
            nearest[task.title, shots, seed] = [(source, weight) for source, weight, _ in retrieved]
    return nearest


def _run_arms(
    plan: Plan,
    origins: Origins,
    reporter: ProgressReporter,
    target: str,
    shots: int | None,
    arm_runs: Sequence[ArmRun],
    part: str,
) -> list[ArmResult]:
    """Do the runs of arms on a target; those that failed have no pages."""
    title = f"{target} {size_name(shots)}"
    if arm_runs[0].trains_weights:
        results = []
        for arm_run in arm_runs:
            run = weights_run(plan, target, shots, arm_run)
            results.append(comparison.run_single(f"{title}, {arm_run.name}", run, arm_run, reporter))
        return results
    run = target_run(plan, target, shots, origins, arm_runs, part)
    inputs = [*origins.teachers.values(), *(str(path / "prompt") for path in origins.variants.values())]
    return comparison.run_shared_batch(f"{title}, {part}", run, arm_runs, reporter, inputs)
