"""The questions in order; each part is a directory, and a part with results is not done again."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from softprompts import __version__
from softprompts.artifacts import artifact, vectors
from softprompts.artifacts.vectors import Vector
from softprompts.backbone import Backbone
from softprompts.config.sweep import sweep
from softprompts.data import Task, load_task
from softprompts.errors import ConfigError, TrainingError
from softprompts.evaluation import page
from softprompts.injection import Site
from softprompts.model.setup import load_backbone
from softprompts.recipes import multitask, stages
from softprompts.recipes.evaluate_prompts import Evaluator, load_evaluator
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.results import best_validation
from softprompts.recipes.run.run import ProgressReporter
from studies.task_prompt_vectors import independence, sums
from studies.task_prompt_vectors.plan import Study, prompt_path
from studies.task_prompt_vectors.runs import few_rows_run, rate_run, task_of, vector_run
from studies.task_prompt_vectors.summary import page_of, summarize


def execute(study: Study, reporter: ProgressReporter = SILENT) -> dict[str, Any]:
    """Train the vectors, answer the questions, write results.json and report.html into study.output_dir.

    A second call continues an interrupted one. It repeats parts whose settings, or the prompts that they start from,
    have changed.

    Returns:
        The content of results.json.

    Raises:
        ConfigError, DataError, ArtifactError, BackboneError: The study would fail on its way. All are raised before any
            training.
        TrainingError: A vector could not be trained.
    """
    began = time.time()
    stages.check_output_directory("the study", study.output_dir)
    _check(study)
    rate, mean_scores = _choose_rate(study, reporter)
    for title in study.titles:
        stages.run_complete_group(f"vectors of {title}", vector_run(study, title, rate), reporter)
    resources = StudyResources(study, reporter)
    measurements = {title: _measure_independence(resources, title) for title in study.titles}
    pairs = [measure_pair(resources, pair) for pair in study.pairs]
    again = {}
    if study.sums is not None and study.sums.few is not None:
        for title in dict.fromkeys(chain.from_iterable(study.pairs)):
            run = few_rows_run(study, title, rate)
            inputs = _inputs(study, title)
            again[title] = stages.run_group(f"{title} again, few rows", run, reporter, inputs)["runs"]
    few = {}
    for unseen in study.few.targets if study.few else ():
        few[unseen.target.title] = multitask.execute(study.few_plan(unseen), reporter)
    results = summarize(
        study,
        chosen_rate={"rate": rate, "tried": mean_scores},
        task_vectors={title: resources.vectors(title) for title in study.titles},
        measurements=measurements,
        pairs=pairs,
        again=again,
        few=few,
        seconds=time.time() - began,
    )
    page.write_results(Path(study.output_dir) / stages.RESULTS, results)
    page.write_page(Path(study.output_dir) / "report.html", page_of(results))
    return results


def _check(study: Study) -> None:
    """Raise ConfigError for rows and settings that would fail after hours."""
    for title in study.titles:
        _check_rows(f"task {title}", load_task(task_of(study, title)))
        sweep(vector_run(study, title, study.vectors.learning_rates[0]))
        sweep(rate_run(study, title))
    for unseen in study.few.targets if study.few else ():
        _check_rows(f"target {unseen.target.title}", load_task(unseen.target))


def _check_rows(title: str, task: Task) -> None:
    """Raise ConfigError for a task without validation or test rows."""
    for part in ("validation", "test"):
        if not getattr(task, part):
            raise ConfigError(f"{title} has no {part} rows; set split.{part}_fraction")


def _choose_rate(study: Study, reporter: ProgressReporter) -> tuple[float, dict[str, float]]:
    """The learning rate with the best mean validation score, of equal ones the smaller; and the score of each rate."""
    rates = study.vectors.learning_rates
    if len(rates) == 1:
        return rates[0], {}
    titles = [title for title in study.titles if study.vectors.tune_on is None or title in study.vectors.tune_on]
    scores: dict[float, list[float]] = {rate: [] for rate in rates}
    for title in titles:
        run = rate_run(study, title)
        rows = stages.run_group(f"rates of {title}", run, reporter)["runs"]
        failed = {row["name"] for row in rows if row["failed"]}
        for rate in rates:
            name = f"rate{rate:g}"
            if name not in failed:
                validation = stages.read_results(Path(run.output_dir) / name)["validation"]
                scores[rate].append(best_validation(validation))
    means = {rate: fmean(scores[rate]) for rate in rates if len(scores[rate]) == len(titles)}
    if not means:
        raise TrainingError("every rate failed on some task; give lower ones in vectors.learning_rates")
    best = max(means, key=lambda rate: (means[rate], -rate))
    return best, {f"{rate:g}": mean for rate, mean in means.items()}


@dataclass(frozen=True)
class StudyResources:
    """The study's backbone, evaluators and vectors, each loaded at its first use."""

    study: Study
    reporter: ProgressReporter
    evaluators: dict[str, Evaluator] = field(default_factory=dict)

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return load_backbone(self.study.model, log=self.reporter.log)

    def evaluator(self, title: str) -> Evaluator:
        """The evaluator of a task."""
        if title not in self.evaluators:
            prompt = self.study.prompt
            site = Site(prompt.site, prompt.mode, prompt.placement)
            task = task_of(self.study, title)
            self.evaluators[title] = load_evaluator(
                self.backbone, site, prompt.num_virtual_tokens, task, self.study.evaluation
            )
        return self.evaluators[title]

    def vectors(self, title: str) -> list[Vector]:
        """The vectors of a task, one from each start."""
        task_vectors = []
        for start in range(len(self.study.vectors.starts)):
            prompt = artifact.load(prompt_path(self.study, title, start))
            task_vectors.append(vectors.task_vector(prompt, f"{title} from start {start}"))
        return task_vectors


def _starts_of(task_vectors: Sequence[Vector]) -> list[Tensor]:
    """The start [P, D] of each vector."""
    starts = [vector.reference.initial for vector in task_vectors]
    return [start for start in starts if start is not None]


def _inputs(study: Study, title: str) -> list[str]:
    """The directories of the prompts of a task and of the tasks paired with it."""
    titles = {title}
    for pair in study.pairs:
        if title in pair:
            titles.update(pair)
    return [f"{study.output_dir}/vectors/{name}" for name in sorted(titles)]


def _settings(study: Study, titles: Sequence[str], **more: Any) -> dict[str, Any]:
    """Everything that the measurements of a part depend on."""
    return {
        "version": __version__,
        "model": stages.explicit_settings(study.model),
        "tasks": [stages.explicit_settings(task_of(study, title)) for title in titles],
        "evaluation": stages.explicit_settings(study.evaluation),
        "inputs": {title: stages.artifacts_digest(f"{study.output_dir}/vectors/{title}") for title in titles},
        **more,
    }


def _measure_independence(resources: StudyResources, title: str) -> Mapping[str, Any]:
    """The measurements of question 1 on a task."""
    study = resources.study
    reporter = resources.reporter
    starts = [stages.explicit_settings(init) for init in study.vectors.starts]

    def make_results() -> dict[str, Any]:
        reporter.log(f"independence of {title}: {len(starts)} starts, crossed")
        task_vectors = resources.vectors(title)
        return independence.measure(resources.evaluator(title), task_vectors, _starts_of(task_vectors), reporter)

    out = Path(study.output_dir) / "independence" / title
    settings = _settings(study, [title], starts=starts)
    return stages.run_stage(f"independence of {title}", out, settings, reporter, make_results)


def measure_pair(resources: StudyResources, pair: tuple[str, str]) -> Mapping[str, Any]:
    """The measurements of question 2 on a pair of tasks."""
    study = resources.study
    reporter = resources.reporter
    title = " + ".join(pair)
    sum_stage = study.sums
    assert sum_stage is not None

    def make_results() -> dict[str, Any]:
        reporter.log(f"{title}: {sum_stage.starts} starts, {len(sum_stage.coefficients)} coefficients")
        first = resources.vectors(pair[0])[: sum_stage.starts]
        second = resources.vectors(pair[1])[: sum_stage.starts]
        evaluators = resources.evaluator(pair[0]), resources.evaluator(pair[1])
        vector_pairs = list(zip(first, second, strict=True))
        return sums.measure(evaluators, vector_pairs, _starts_of(first), sum_stage.coefficients, reporter)

    settings = _settings(study, pair, starts=sum_stage.starts, coefficients=list(sum_stage.coefficients))
    out = Path(study.output_dir) / "sums" / "+".join(pair)
    results = stages.run_stage(title, out, settings, reporter, make_results)
    return {**results, "related": study.related(pair)}
