"""The parts one after the other; each run is a directory, and what is there already is not done again."""

import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompts.config.sweep import sweep
from softprompts.data import Task
from softprompts.errors import ConfigError
from softprompts.evaluation import page as report
from softprompts.recipes import comparison, pretrain, stages
from softprompts.recipes.comparison import ArmResult, ArmRun, Comparison, size_name
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.run import ProgressReporter, prepare
from softprompts.training import backbone_weights
from studies.instance_prompts.plan import Study
from studies.instance_prompts.runs import arm_run, pretrain_run, pretrained, speed_run, weights_run
from studies.instance_prompts.summary import page_of, summarize


def execute(study: Study, screen: ProgressReporter = SILENT) -> dict[str, Any]:
    """Pretrain, train every arm on every task, time steps; write results.json and report.html into study.output_dir.

    Returns what results.json holds. Interrupted, it goes on where it was when called again; runs whose settings
    changed, or the states they start from, are done anew.
    Raises ConfigError, DataError, BackboneError and AssetError before any training for what would fail on the way, and
    TrainingError for an arm that fails at every rate.
    """
    began = time.time()
    stages.check_output_directory("the study", study.output_dir)
    _check(study, screen)
    taught = {}
    for name in (name for name in study.arms if study.known[name].pretrain):
        run = pretrain_run(study, name)
        told = {"run": stages.explicit_settings(run)}
        make = functools.partial(pretrain.run, run, screen)
        taught[name] = stages.run_stage(f"pretraining of {name}", Path(run.output_dir), told, screen, make)
    speed = _speed(study, screen)

    def runs(task: str, shots: int | None, cells: Sequence[ArmRun], part: str) -> list[ArmResult]:
        return _runs(study, screen, task, shots, cells, part)

    rates = {name: arm.learning_rates for name, arm in study.known.items()}
    filled = Comparison(study.compare, runs, rates)
    for shots in study.compare.shots:
        filled.run_arms(shots, study.arms, study.titles)
    chosen = study.compare.weight_targets
    for shots in study.compare.shots:  # the slowest, one run after the other
        filled.run_arms(shots, study.upper, [title for title in study.titles if chosen is None or title in chosen])
    results = summarize(study, filled, speed, taught, time.time() - began)
    report.write_results(Path(study.output_dir) / stages.RESULTS, results)
    report.write_page(Path(study.output_dir) / "report.html", page_of(results))
    return results


def _check(study: Study, screen: ProgressReporter) -> None:
    """Make every arm ready once, and every task, so that nothing is found wrong after hours.

    What pretraining needs it finds out itself: it comes first.
    """
    first = study.compare.seeds[0]
    for name in study.arms:
        cells = [ArmRun(name, study.compare.learning_rates[0], first)]
        for task in study.tasks if name == study.arms[0] else study.tasks[:1]:
            (run,) = sweep(arm_run(study, task, None, cells, "rates", begun=False)).values()
            screen.log(f"checking {name}, {task.title}")
            job = prepare(run)
            _check_rows(job.tasks)
    for name in study.upper:
        run = weights_run(
            study, study.tasks[0], None, ArmRun(name, study.compare.weight_learning_rates[name][0], first)
        )
        backbone_weights.check_installed(run.training)
        backbone_weights.check_trainable(job.model.backbone)


def _check_rows(tasks: Sequence[Task]) -> None:
    for task in tasks:
        for part in ("validation", "test"):
            if not getattr(task, part):
                raise ConfigError(f"{task.name} has no {part} rows, and rates are chosen and arms judged by them; "
                                  f"set split.{part}_fraction")  # fmt: skip


def _runs(
    study: Study, screen: ProgressReporter, title: str, shots: int | None, cells: Sequence[ArmRun], part: str
) -> list[ArmResult]:
    """The runs of `cells` on a task, those of an arm in one frozen batch; those that failed have no pages."""
    task = next(task for task in study.tasks if task.title == title)
    found = []
    for arm in dict.fromkeys(cell.arm for cell in cells):
        own = [cell for cell in cells if cell.arm == arm]
        said = f"{title} {size_name(shots)}"
        if own[0].trains_weights:
            for one in own:
                run = weights_run(study, task, shots, one)
                found.append(comparison.run_single(f"{said}, {one.name}", run, one, screen))
            continue
        run = arm_run(study, task, shots, own, part)
        found += comparison.run_shared_batch(f"{said}, {arm}, {part}", run, own, screen, _inputs(study, arm))
    return found


def _speed(study: Study, screen: ProgressReporter) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step of each arm, the median over all timed steps but each run's first."""
    if study.speed is None:
        return {}
    turns: dict[str, list[float]] = {}
    for turn in range(study.speed.repeats):
        for name in (*study.arms, *study.upper):
            title = f"step time of {name}, turn {turn + 1}"
            page = stages.run_group(title, speed_run(study, name, turn), screen, _inputs(study, name))
            seconds = [step["seconds"] for step in page["curve"]]
            turns.setdefault(name, []).extend(seconds[1:] or seconds)
    return {name: {"ms": 1000 * statistics.median(each), "n": len(each)} for name, each in turns.items()}


def _inputs(study: Study, name: str) -> list[str]:
    """The directories with the states that an arm starts from."""
    return [str(pretrained(study, name) / "prompt")] if name in study.known and study.known[name].pretrain else []
