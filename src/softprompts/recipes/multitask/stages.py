"""The stages one after the other; each is a directory, and a stage whose results are there is not done again."""

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


def execute(plan: Plan, screen: ProgressReporter = SILENT) -> dict[str, Any]:
    """Teachers, shared prompts, targets; writes each stage, then results.json and report.html into plan.output_dir.

    Returns what results.json holds. Interrupted, it goes on where it was when called again; stages whose settings
    changed, or the prompts that they start from, are done anew.
    Raises ConfigError, DataError, ArtifactError for what is wrong with tasks or teachers, before any training, and
    TrainingError where a teacher or a shared prompt could not be trained.
    """
    began = time.time()
    stages.check_output_directory("the recipe", plan.output_dir)
    check(plan, screen)
    teachers = teacher_paths(plan)
    run = teacher_runs(plan)
    if run.runs:
        stages.run_complete_group("teachers", run, screen)
    variants = {name: Path(plan.output_dir) / "sources" / name for name in plan.source.variants}
    run = source_runs(plan)
    sources = stages.run_complete_group("sources", run, screen, list(teachers.values())) if variants else {"runs": []}
    similar = {name: artifact.load(path).require_prompt(path) for name, path in teachers.items()}
    origins = Origins(teachers, variants, _nearest(plan, similar, screen))
    filled = Comparison(plan.target, functools.partial(_runs, plan, origins, screen))
    for shots in plan.target.shots:
        filled.run_arms(shots, select_arms(plan, shots, weights=False), [task.title for task in plan.targets])
        filled.run_arms(shots, select_arms(plan, shots, weights=False, all_targets=True), [ALL_TARGETS])
    for shots in plan.target.shots:  # the slowest, one run after the other
        filled.run_arms(shots, select_arms(plan, shots, weights=True), weight_targets(plan))
    results = summarize(plan, filled, sources, origins, similar, time.time() - began)
    page.write_results(Path(plan.output_dir) / "results.json", results)
    page.write_page(Path(plan.output_dir) / "report.html", page_of(results))
    return results


def _nearest(
    plan: Plan, teachers: Mapping[str, Tensor], screen: ProgressReporter
) -> dict[tuple[str, int | None, int], Sequence[tuple[str, float]]]:
    """For each target, size and seed the sources most like its prompt after a few steps, with their weights (SPoT)."""
    run = probe_runs(plan)
    if not run.runs:
        return {}
    stages.run_complete_group("probes", run, screen)
    found: dict[tuple[str, int | None, int], Sequence[tuple[str, float]]] = {}
    for task, shots, seed in product(plan.targets, plan.target.shots, plan.target.seeds):
        path = Path(run.output_dir) / probe_name(task.title, shots, seed) / "prompt"
        if path.exists():
            own, count = artifact.load(path).require_prompt(path), min(plan.target.nearest, len(teachers))
            found[task.title, shots, seed] = [(name, w) for name, w, _ in similarity.retrieve(own, teachers, count)]
    return found


def _runs(
    plan: Plan,
    origins: Origins,
    screen: ProgressReporter,
    target: str,
    shots: int | None,
    cells: Sequence[ArmRun],
    part: str,
) -> list[ArmResult]:
    """The runs of `cells` on a target; those that failed have no pages."""
    title = f"{target} {size_name(shots)}"
    if cells[0].trains_weights:
        return [
            comparison.run_single(f"{title}, {one.name}", weights_run(plan, target, shots, one), one, screen)
            for one in cells
        ]
    run = target_run(plan, target, shots, origins, cells, part)
    inputs = [*origins.teachers.values(), *(str(path / "prompt") for path in origins.variants.values())]
    return comparison.run_shared_batch(f"{title}, {part}", run, cells, screen, inputs)
