"""The stages one after the other; each is a directory, and a stage whose results are there is not done again."""

import os
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from softprompts import artefact, job, report, transfer
from softprompts.backbone import fingerprint
from softprompts.config import ConfigError, Run
from softprompts.data import load
from softprompts.files import read_json
from softprompts.job import Screen, load_backbone
from softprompts.prepare import SILENT
from softprompts.recipes.multitask.plan import Plan
from softprompts.recipes.multitask.runs import (
    TOGETHER,
    Cell,
    Origins,
    arms_of,
    probe_runs,
    size_name,
    source_runs,
    target_run,
    teacher_paths,
    teacher_runs,
    weights_run,
)
from softprompts.recipes.multitask.summary import Found, page_of, summarise

Place = tuple[str, int | None]
"""A target, or TOGETHER, and its shots."""


def execute(plan: Plan, screen: Screen = SILENT) -> dict[str, Any]:
    """Teachers, shared prompts, targets; writes each stage, then results.json and report.html into plan.out.

    Returns what results.json holds. Interrupted, it goes on where it was when called again; a changed plan does those
    stages again whose settings changed.
    Raises ConfigError, DataError, ArtefactError for what is wrong with tasks or teachers, before any training.
    """
    began = time.time()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the recipe runs in one process; start it without torchrun")
    _check(plan, screen)
    teachers = teacher_paths(plan)
    run = teacher_runs(plan)
    if run.runs:
        _all("teachers", run, screen)
    variants = {name: Path(plan.out) / "sources" / name for name in plan.source.variants}
    sources = _all("sources", source_runs(plan), screen) if variants else {"runs": []}
    similar = {name: artefact.load(path).matrix(path) for name, path in teachers.items()}
    origins = Origins(teachers, variants, _nearest(plan, similar, screen))
    found: dict[Place, list[Found]] = {}
    chosen: list[dict[str, Any]] = []
    for shots in plan.target.shots:
        for together, weights in ((False, False), (True, False), (False, True)):
            _adapt(plan, shots, origins, together, weights, found, chosen, screen)
    results = summarise(plan, found, chosen, sources, origins, similar, time.time() - began)
    report.write_results(Path(plan.out) / "results.json", results)
    report.write_page(Path(plan.out) / "report.html", page_of(results))
    return results


def _check(plan: Plan, screen: Screen) -> None:
    """Raise what would only be noticed after hours: tasks that cannot be read, teachers that do not fit."""
    for task in (*plan.sources, *plan.targets):
        load(task)
    if not plan.teachers.trained:
        return
    backbone = load_backbone(plan.model, say=screen.say)
    weights = fingerprint(backbone)
    for name, path in plan.teachers.trained.items():
        one = artefact.load(path)
        artefact.check_fingerprint(one.fingerprint, weights, False)
        wanted = (plan.prompt.length, plan.prompt.site)
        if (one.shape[0], one.site) != wanted:
            raise artefact.ArtefactError(
                f"the teacher of {name}, {path}, has {one.shape[0]} tokens at site {one.site}; the plan wants "
                f"{wanted[0]} at site {wanted[1]}: change prompt.length and prompt.site, or train it again"
            )


def _all(title: str, run: Run, screen: Screen) -> dict[str, Any]:
    """The results of a group of runs, from its directory where it was done with the same settings."""
    done = _done(run)
    if done is not None:
        screen.say(f"{title}: done before, in {run.out}")
        return done
    screen.say(f"{title}: {len(run.runs) or 1} runs, {max(1, run.train.steps)} steps")
    return job.execute(run, screen)


def _done(run: Run) -> dict[str, Any] | None:
    file = Path(run.out) / "results.json"
    if not file.exists():
        return None
    found: dict[str, Any] = read_json(file)
    wanted = run.model_dump(mode="json") if run.runs else run.model_dump(mode="json", exclude={"runs"})
    return found if found.get("config") == wanted else None


def _nearest(
    plan: Plan, teachers: Mapping[str, torch.Tensor], screen: Screen
) -> dict[Place, Sequence[tuple[str, float]]]:
    """For each target and size the sources most like its prompt after a few steps, with their weights (SPoT)."""
    wanted = {"spot-nearest", "spot-weighted"} & {*plan.target.arms, *(plan.target.few_arms or ())}
    if not wanted:
        return {}
    run = probe_runs(plan)
    _all("probes", run, screen)
    found: dict[Place, Sequence[tuple[str, float]]] = {}
    for task, shots in product(plan.targets, plan.target.shots):
        path = Path(run.out) / f"{task.title}-{size_name(shots)}" / "prompt"
        near = transfer.retrieve(artefact.load(path).matrix(path), teachers, min(plan.target.nearest, len(teachers)))
        found[task.title, shots] = [(name, weight) for name, weight, _ in near]
    return found


def _adapt(
    plan: Plan,
    shots: int | None,
    origins: Origins,
    together: bool,
    weights: bool,
    found: dict[Place, list[Found]],
    chosen: list[dict[str, Any]],
    screen: Screen,
) -> None:
    """All runs of some arms at one size: first the rates, with the first seed, then the other seeds at the best one."""
    arms = arms_of(plan, shots, weights, together)
    if not arms:
        return
    every = [TOGETHER] if together else [task.title for task in plan.targets]
    if weights and plan.target.weight_targets is not None:
        every = [name for name in every if name in plan.target.weight_targets]
    tuned = [name for name in every if plan.target.tune_on is None or name in plan.target.tune_on] or every[:1]
    first = plan.target.seeds[0]
    tried = [
        Cell(arm, rate, first)
        for arm in arms
        for rate in (plan.target.weight_rates[arm] if weights else plan.target.rates)
    ]
    first_runs = {name: _runs(plan, name, shots, origins, tried, "rates", weights, screen) for name in tuned}
    best = {arm: _best(arm, tried, first_runs, shots, chosen) for arm in arms}
    for name in every:
        done = [one for one in first_runs.get(name, ()) if one.cell == best[one.cell.arm]]
        cells = [Cell(arm, best[arm].rate, seed) for arm in arms for seed in plan.target.seeds]
        rest = [cell for cell in cells if cell not in [one.cell for one in done]]
        more = _runs(plan, name, shots, origins, rest, "seeds", weights, screen) if rest else []
        found.setdefault((name, shots), []).extend([*done, *more])


def _runs(
    plan: Plan,
    target: str,
    shots: int | None,
    origins: Origins,
    cells: Sequence[Cell],
    part: str,
    weights: bool,
    screen: Screen,
) -> list[Found]:
    """The runs of `cells` on a target; those that failed have no scores."""
    title = f"{target} {size_name(shots)}, {part}"
    if weights:
        runs = [weights_run(plan, target, shots, cell) for cell in cells]
        pages = [
            _all(f"{target} {size_name(shots)}, {cell.name}", run, screen)
            for cell, run in zip(cells, runs, strict=True)
        ]
        return [Found(cell, [page]) for cell, page in zip(cells, pages, strict=True)]
    run = target_run(plan, target, shots, origins, cells, part)
    rows = _all(title, run, screen)["runs"]
    failed = {row["name"] for row in rows if row["failed"]}
    return [
        Found(cell, [] if cell.name in failed else _pages(Path(run.out) / cell.name / "results.json")) for cell in cells
    ]


def _pages(file: Path) -> list[dict[str, Any]]:
    page = read_json(file)
    return page.get("tasks", [page])


def _best(
    arm: str,
    tried: Sequence[Cell],
    runs: Mapping[str, Sequence[Found]],
    shots: int | None,
    chosen: list[dict[str, Any]],
) -> Cell:
    """The rate with the best mean validation score over the targets it was tried on; of equal ones the smaller."""
    scores: dict[Cell, float] = {}
    for cell in (cell for cell in tried if cell.arm == arm):
        each = [one.validation for own in runs.values() for one in own if one.cell == cell]
        if all(score is not None for score in each):
            scores[cell] = fmean(score for score in each if score is not None)
    if not scores:
        raise ConfigError(f"arm '{arm}' failed at every rate; give lower ones in target.rates")
    best = max(scores, key=lambda cell: (scores[cell], -cell.rate))
    chosen.append(
        {
            "arm": arm,
            "size": size_name(shots),
            "rate": best.rate,
            "tried": {f"{cell.rate:g}": score for cell, score in scores.items()},
            "targets": list(runs),
        }
    )
    return best
