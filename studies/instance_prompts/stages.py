"""The parts of the study in order; each run is a directory, and a run with results is not done again."""

import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softprompts.config.sweep import sweep
from softprompts.data import Task
from softprompts.errors import ConfigError
from softprompts.evaluation import page
from softprompts.recipes import comparison, stages
from softprompts.recipes.comparison import ArmResult, ArmRun, Comparison, size_name
from softprompts.recipes.pretrain import pretrain
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.run import ProgressReporter, prepare
from softprompts.training import backbone_weights
from studies.instance_prompts.plan import Study
from studies.instance_prompts.runs import arm_run, pretrain_directory, pretrain_run, speed_run, weights_run
from studies.instance_prompts.summary import page_of, summarize


def execute(study: Study, reporter: ProgressReporter = SILENT) -> dict[str, Any]:
    """Pretrain, train every arm on every task, time steps; write results.json and report.html into study.output_dir.

    A second call continues an interrupted one. It repeats runs whose settings, or the states that they start from, have
    changed.

    Returns:
        The content of results.json.

    Raises:
        ConfigError, DataError, BackboneError, AssetError: The study would fail on its way. All are raised before any
            training.
        TrainingError: An arm fails at every rate.
    """
    began = time.time()
    stages.check_output_directory("the study", study.output_dir)
    _check(study, reporter)
    pretrained = _pretrain(study, reporter)
    speed = _measure_speed(study, reporter)
    rates = {name: arm.learning_rates for name, arm in study.known.items()}
    arms = Comparison(study.compare, functools.partial(_run_arms, study, reporter), rates)
    for shots in study.compare.shots:
        arms.run_arms(shots, study.arms, study.titles)
    weight_targets = study.compare.weight_targets
    weight_titles = [title for title in study.titles if weight_targets is None or title in weight_targets]
    for shots in study.compare.shots:  # the slowest, one run after the other
        arms.run_arms(shots, study.upper, weight_titles)
    results = summarize(study, arms, speed, pretrained, time.time() - began)
    page.write_results(Path(study.output_dir) / stages.RESULTS, results)
    page.write_page(Path(study.output_dir) / "report.html", page_of(results))
    return results


def _pretrain(study: Study, reporter: ProgressReporter) -> dict[str, dict[str, Any]]:
    """The results of pretraining, of each arm that asks for it."""
    results = {}
    for name in study.arms:
        if study.known[name].pretrain:
            run = pretrain_run(study, name)
            settings = {"run": stages.explicit_settings(run)}
            make_results = functools.partial(pretrain, run, reporter)
            title = f"pretraining of {name}"
            results[name] = stages.run_stage(title, Path(run.output_dir), settings, reporter, make_results)
    return results


def _check(study: Study, reporter: ProgressReporter) -> None:
    """Prepare a run of every arm, and every task, so that no error is found after hours.

    Pretraining comes first and checks its own inputs.
    """
    seed = study.compare.seeds[0]
    for name in study.arms:
        arm_runs = [ArmRun(name, study.compare.learning_rates[0], seed)]
        for task in study.tasks if name == study.arms[0] else study.tasks[:1]:
            (run,) = sweep(arm_run(study, task, None, arm_runs, "rates", pretrained=False)).values()
            reporter.log(f"checking {name}, {task.title}")
            prepared = prepare(run)
            _check_rows(prepared.tasks)
    for name in study.upper:
        rate = study.compare.weight_learning_rates[name][0]
        run = weights_run(study, study.tasks[0], None, ArmRun(name, rate, seed))
        backbone_weights.check_installed(run.training)
        backbone_weights.check_trainable(prepared.model.backbone)


def _check_rows(tasks: Sequence[Task]) -> None:
    """Raise ConfigError for a task without validation rows, which choose rates, or test rows, which compare arms."""
    for task in tasks:
        for part in ("validation", "test"):
            if not getattr(task, part):
                raise ConfigError(
                    f"{task.name} has no {part} rows, and rates are chosen and arms compared by them; "
                    f"set split.{part}_fraction"
                )


def _run_arms(
    study: Study, reporter: ProgressReporter, title: str, shots: int | None, arm_runs: Sequence[ArmRun], part: str
) -> list[ArmResult]:
    """Do runs on a task, those of an arm in one frozen batch; those that failed have no pages."""
    task = next(task for task in study.tasks if task.title == title)
    results = []
    for arm in dict.fromkeys(run.arm for run in arm_runs):
        runs_of_arm = [run for run in arm_runs if run.arm == arm]
        label = f"{title} {size_name(shots)}"
        if runs_of_arm[0].trains_weights:
            for single_run in runs_of_arm:
                config = weights_run(study, task, shots, single_run)
                results.append(comparison.run_single(f"{label}, {single_run.name}", config, single_run, reporter))
        else:
            config = arm_run(study, task, shots, runs_of_arm, part)
            inputs = _inputs(study, arm)
            results += comparison.run_shared_batch(f"{label}, {arm}, {part}", config, runs_of_arm, reporter, inputs)
    return results


def _measure_speed(study: Study, reporter: ProgressReporter) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step of each arm, the median over all timed steps but each run's first."""
    if study.speed is None:
        return {}
    seconds_of_arms: dict[str, list[float]] = {}
    for turn in range(study.speed.repeats):
        for name in (*study.arms, *study.upper):
            title = f"step time of {name}, turn {turn + 1}"
            results = stages.run_group(title, speed_run(study, name, turn), reporter, _inputs(study, name))
            seconds = [step["seconds"] for step in results["curve"]]
            seconds_of_arms.setdefault(name, []).extend(seconds[1:] or seconds)
    speed = {}
    for name, seconds in seconds_of_arms.items():
        speed[name] = {"ms": 1000 * statistics.median(seconds), "n": len(seconds)}
    return speed


def _inputs(study: Study, name: str) -> list[str]:
    """The directories with the states that an arm starts from."""
    if name not in study.known or not study.known[name].pretrain:
        return []
    return [str(pretrain_directory(study, name) / "prompt")]
