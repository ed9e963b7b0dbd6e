"""The stages one after the other; each is a directory, and a stage whose results are there is not done again."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from softprompts import artefact, report, transfer
from softprompts.config import ConfigError
from softprompts.files import read_json
from softprompts.job import Screen
from softprompts.prepare import SILENT
from softprompts.recipes import stage
from softprompts.recipes.multitask.checks import check
from softprompts.recipes.multitask.plan import Plan
from softprompts.recipes.multitask.runs import (
    TOGETHER,
    Cell,
    Origins,
    arms_of,
    probe_name,
    probe_runs,
    size_name,
    source_runs,
    target_run,
    teacher_paths,
    teacher_runs,
    weight_targets,
    weights_run,
)
from softprompts.recipes.multitask.summary import Found, page_of, summarise
from softprompts.train import TrainingError


def execute(plan: Plan, screen: Screen = SILENT) -> dict[str, Any]:
    """Teachers, shared prompts, targets; writes each stage, then results.json and report.html into plan.out.

    Returns what results.json holds. Interrupted, it goes on where it was when called again; stages whose settings
    changed, or the prompts that they start from, are done anew.
    Raises ConfigError, DataError, ArtefactError for what is wrong with tasks or teachers, before any training, and
    TrainingError where a teacher or a shared prompt could not be trained.
    """
    began = time.time()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the recipe runs in one process; start it without torchrun")
    check(plan, screen)
    teachers = teacher_paths(plan)
    run = teacher_runs(plan)
    if run.runs:
        stage.whole("teachers", run, screen)
    variants = {name: Path(plan.out) / "sources" / name for name in plan.source.variants}
    run = source_runs(plan)
    sources = stage.whole("sources", run, screen, list(teachers.values())) if variants else {"runs": []}
    similar = {name: artefact.load(path).matrix(path) for name, path in teachers.items()}
    study = _Study(plan, Origins(teachers, variants, _nearest(plan, similar, screen)), screen)
    for shots in plan.target.shots:
        _adapt(study, shots, arms_of(plan, shots, weights=False), [task.title for task in plan.targets])
        _adapt(study, shots, arms_of(plan, shots, weights=False, together=True), [TOGETHER])
    for shots in plan.target.shots:  # the slowest, one run after the other
        _adapt(study, shots, arms_of(plan, shots, weights=True), weight_targets(plan))
    seconds = time.time() - began
    results = summarise(plan, study.found, study.chosen, sources, study.origins, similar, seconds)
    report.write_results(Path(plan.out) / "results.json", results)
    report.write_page(Path(plan.out) / "report.html", page_of(results))
    return results


@dataclass(frozen=True)
class _Study:
    """What the target stage needs and fills: runs by target (or TOGETHER) and shots, and how each rate was chosen."""

    plan: Plan
    origins: Origins
    screen: Screen
    found: dict[tuple[str, int | None], list[Found]] = field(default_factory=dict)
    chosen: list[dict[str, Any]] = field(default_factory=list)


def _nearest(
    plan: Plan, teachers: Mapping[str, Tensor], screen: Screen
) -> dict[tuple[str, int | None, int], Sequence[tuple[str, float]]]:
    """For each target, size and seed the sources most like its prompt after a few steps, with their weights (SPoT)."""
    run = probe_runs(plan)
    if not run.runs:
        return {}
    stage.whole("probes", run, screen)
    found: dict[tuple[str, int | None, int], Sequence[tuple[str, float]]] = {}
    for task, shots, seed in product(plan.targets, plan.target.shots, plan.target.seeds):
        path = Path(run.out) / probe_name(task.title, shots, seed) / "prompt"
        if path.exists():
            own, count = artefact.load(path).matrix(path), min(plan.target.nearest, len(teachers))
            found[task.title, shots, seed] = [(name, w) for name, w, _ in transfer.retrieve(own, teachers, count)]
    return found


def _adapt(study: _Study, shots: int | None, arms: Sequence[str], targets: Sequence[str]) -> None:
    """All runs of some arms at one size: first the rates, with the first seed, then the other seeds at the best one."""
    if not arms or not targets:
        return
    target = study.plan.target
    if shots == 0:  # nothing is trained, so there is no rate to choose
        for name in targets:
            cells = [Cell(arm, target.rates[0], seed) for arm in arms for seed in target.seeds]
            study.found.setdefault((name, shots), []).extend(_runs(study, name, shots, cells, "seeds"))
        return
    tuned = [name for name in targets if target.tune_on is None or name in target.tune_on] or targets[:1]
    tried = [Cell(arm, rate, target.seeds[0]) for arm in arms for rate in target.weight_rates.get(arm, target.rates)]
    first = {name: _runs(study, name, shots, tried, "rates") for name in tuned}
    best = {arm: _best(study, arm, tried, first, shots) for arm in arms}
    for name in targets:
        done = [one for one in first.get(name, ()) if one.cell == best[one.cell.arm]]
        cells = [Cell(arm, best[arm].rate, seed) for arm in arms for seed in target.seeds]
        rest = [cell for cell in cells if cell not in [one.cell for one in done]]
        more = _runs(study, name, shots, rest, "seeds") if rest else []
        study.found.setdefault((name, shots), []).extend([*done, *more])


def _runs(study: _Study, target: str, shots: int | None, cells: Sequence[Cell], part: str) -> list[Found]:
    """The runs of `cells` on a target; those that failed have no pages."""
    plan, screen, title = study.plan, study.screen, f"{target} {size_name(shots)}"
    if cells[0].trains_weights:
        return [_weights(study, f"{title}, {cell.name}", target, shots, cell) for cell in cells]
    run = target_run(plan, target, shots, study.origins, cells, part)
    inputs = [*study.origins.teachers.values(), *(str(path / "prompt") for path in study.origins.variants.values())]
    try:
        rows = stage.runs(f"{title}, {part}", run, screen, inputs)["runs"]
    except TrainingError as error:
        screen.say(f"{title}, {part}: {error}")
        return [Found(cell, []) for cell in cells]
    failed = {row["name"] for row in rows if row["failed"]}
    return [
        Found(cell, [] if cell.name in failed else _pages(Path(run.out) / cell.name / "results.json")) for cell in cells
    ]


def _weights(study: _Study, title: str, target: str, shots: int | None, cell: Cell) -> Found:
    try:
        return Found(cell, [stage.runs(title, weights_run(study.plan, target, shots, cell), study.screen)])
    except TrainingError as error:
        study.screen.say(f"{title}: {error}")
        return Found(cell, [])


def _pages(file: Path) -> list[dict[str, Any]]:
    page = read_json(file)
    return page.get("tasks", [page])


def _best(
    study: _Study, arm: str, tried: Sequence[Cell], runs: Mapping[str, Sequence[Found]], shots: int | None
) -> Cell:
    """The rate with the best mean validation score over the targets it was tried on; of equal ones the smaller."""
    scores: dict[Cell, float] = {}
    for cell in (cell for cell in tried if cell.arm == arm):
        each = [one.validation for own in runs.values() for one in own if one.cell == cell]
        if all(score is not None for score in each):
            scores[cell] = fmean(score for score in each if score is not None)
    if not scores:
        raise TrainingError(f"arm '{arm}', {size_name(shots)}, failed at every rate; give lower ones")
    best = max(scores, key=lambda cell: (scores[cell], -cell.rate))
    known = {f"{cell.rate:g}": score for cell, score in scores.items()}
    study.chosen.append(
        {"arm": arm, "size": size_name(shots), "rate": best.rate, "tried": known, "targets": list(runs)}
    )
    return best
