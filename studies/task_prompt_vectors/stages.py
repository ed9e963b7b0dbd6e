"""The questions one after the other; each part is a directory, and what is there already is not done again."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from softprompts import __version__
from softprompts.artifacts import artifact, vectors
from softprompts.artifacts.vectors import Vector
from softprompts.backbone import Backbone
from softprompts.config.sweep import sweep
from softprompts.data import load_task
from softprompts.errors import ConfigError, TrainingError
from softprompts.evaluation import page as report
from softprompts.injection import Site
from softprompts.model.setup import load_backbone
from softprompts.recipes import multitask, stages
from softprompts.recipes.evaluator import Evaluator, load_evaluator
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.run import ProgressReporter
from studies.task_prompt_vectors import independence, sums
from studies.task_prompt_vectors.plan import Study, prompt_path
from studies.task_prompt_vectors.runs import few_rows_run, rate_run, task_of, vector_run
from studies.task_prompt_vectors.summary import page_of, summarize


def execute(study: Study, screen: ProgressReporter = SILENT) -> dict[str, Any]:
    """Train the vectors, answer the questions, write results.json and report.html into study.output_dir.

    Returns what results.json holds. Interrupted, it goes on where it was when called again; parts whose settings
    changed, or the prompts they start from, are done anew.
    Raises ConfigError, DataError, ArtifactError and BackboneError before any training for what would fail on the way,
    and TrainingError where a vector could not be trained.
    """
    began = time.time()
    stages.check_output_directory("the study", study.output_dir)
    _check(study)
    rate, tried = _rate(study, screen)
    for title in study.titles:
        stages.run_complete_group(f"vectors of {title}", vector_run(study, title, rate), screen)
    at_hand = _StudyResources(study, screen)
    measured = {title: _independence(at_hand, title) for title in study.titles}
    pairs = [_pair(at_hand, pair) for pair in study.pairs]
    again = {}
    if study.sums is not None and study.sums.few is not None:
        for title in dict.fromkeys(name for pair in study.pairs for name in pair):
            run = few_rows_run(study, title, rate)
            again[title] = stages.run_group(f"{title} again, few rows", run, screen, _inputs(study, title))["runs"]
    few = {}
    for one in study.few.targets if study.few else ():
        few[one.target.title] = multitask.execute(study.few_plan(one), screen)
    found = {title: at_hand.vectors(title) for title in study.titles}
    chosen = {"rate": rate, "tried": tried}
    results = summarize(study, chosen, found, measured, pairs, again, few, time.time() - began)
    report.write_results(Path(study.output_dir) / stages.RESULTS, results)
    report.write_page(Path(study.output_dir) / "report.html", page_of(results))
    return results


def _check(study: Study) -> None:
    """Raise what would only be noticed after hours of work."""
    for title in study.titles:
        loaded = load_task(task_of(study, title))
        for role, rows in (("choose by", loaded.validation), ("judge by", loaded.test)):
            if not rows:
                raise ConfigError(f"task {title} has no rows to {role}; set its split's fractions")
        sweep(vector_run(study, title, study.vectors.learning_rates[0]))
        sweep(rate_run(study, title))
    for one in study.few.targets if study.few else ():
        loaded = load_task(one.target)
        if not loaded.validation or not loaded.test:
            raise ConfigError(
                f"target {one.target.title} has no rows to choose and judge by; set its split's fractions"
            )


def _rate(study: Study, screen: ProgressReporter) -> tuple[float, dict[str, float]]:
    """The rate with the best mean validation score over the tasks that choose, of equal ones the smaller; and all."""
    if len(study.vectors.learning_rates) == 1:
        return study.vectors.learning_rates[0], {}
    names = [name for name in study.titles if study.vectors.tune_on is None or name in study.vectors.tune_on]
    scores: dict[float, list[float]] = {rate: [] for rate in study.vectors.learning_rates}
    for title in names:
        run = rate_run(study, title)
        failed = {row["name"] for row in stages.run_group(f"rates of {title}", run, screen)["runs"] if row["failed"]}
        for rate in scores:
            if (name := f"rate{rate:g}") not in failed:
                page = stages.read_results(Path(run.output_dir) / name)
                scores[rate].append(max(point["value"] for point in page["validation"]))
    means = {rate: fmean(found) for rate, found in scores.items() if len(found) == len(names)}
    if not means:
        raise TrainingError("every rate failed on some task; give lower ones in vectors.learning_rates")
    return max(means, key=lambda rate: (means[rate], -rate)), {f"{rate:g}": mean for rate, mean in means.items()}


@dataclass(frozen=True)
class _StudyResources:
    """The study's backbone, judges and vectors, each loaded when first asked for."""

    study: Study
    screen: ProgressReporter
    judges: dict[str, Evaluator] = field(default_factory=dict)

    @functools.cached_property
    def backbone(self) -> Backbone:
        return load_backbone(self.study.model, log=self.screen.log)

    def judge(self, title: str) -> Evaluator:
        if title not in self.judges:
            prompt = self.study.prompt
            site = Site(prompt.site, prompt.mode, prompt.placement)
            task = task_of(self.study, title)
            self.judges[title] = load_evaluator(
                self.backbone, site, prompt.num_virtual_tokens, task, self.study.evaluation
            )
        return self.judges[title]

    def vectors(self, title: str) -> list[Vector]:
        places = range(len(self.study.vectors.starts))
        return [
            vectors.task_vector(artifact.load(prompt_path(self.study, title, place)), f"{title} from start {place}")
            for place in places
        ]


def _starts(found: Sequence[Vector]) -> list[Tensor]:
    starts = [one.reference.initial for one in found]
    return [start for start in starts if start is not None]


def _inputs(study: Study, *titles: str) -> list[str]:
    """The directories of the prompts that a part starts from: of `titles` and of the tasks paired with them."""
    paired = {name for pair in study.pairs if set(pair) & set(titles) for name in pair}
    return [f"{study.output_dir}/vectors/{name}" for name in sorted(paired | set(titles))]


def _told(study: Study, titles: Sequence[str], **more: Any) -> dict[str, Any]:
    """What a part's measurements hang on."""
    return {
        "version": __version__,
        "model": stages.explicit_settings(study.model),
        "tasks": [stages.explicit_settings(task_of(study, title)) for title in titles],
        "evaluation": stages.explicit_settings(study.evaluation),
        "inputs": {title: stages.artifacts_digest(f"{study.output_dir}/vectors/{title}") for title in titles},
        **more,
    }


def _independence(at_hand: _StudyResources, title: str) -> Mapping[str, Any]:
    study, screen = at_hand.study, at_hand.screen
    starts = [stages.explicit_settings(init) for init in study.vectors.starts]

    def make() -> dict[str, Any]:
        screen.log(f"independence of {title}: {len(starts)} starts, crossed")
        found = at_hand.vectors(title)
        return independence.measure(at_hand.judge(title), found, _starts(found), screen)

    out = Path(study.output_dir) / "independence" / title
    return stages.run_stage(f"independence of {title}", out, _told(study, [title], starts=starts), screen, make)


def _pair(at_hand: _StudyResources, pair: tuple[str, str]) -> Mapping[str, Any]:
    study, screen, name = at_hand.study, at_hand.screen, " + ".join(pair)
    stage_of = study.sums
    assert stage_of is not None

    def make() -> dict[str, Any]:
        screen.log(f"{name}: {stage_of.starts} starts, {len(stage_of.coefficients)} coefficients")
        one, other = (at_hand.vectors(title)[: stage_of.starts] for title in pair)
        judges = at_hand.judge(pair[0]), at_hand.judge(pair[1])
        found = list(zip(one, other, strict=True))
        return sums.measure(judges, found, _starts(one), stage_of.coefficients, screen)

    told = _told(study, pair, starts=stage_of.starts, coefficients=list(stage_of.coefficients))
    found = stages.run_stage(name, Path(study.output_dir) / "sums" / "+".join(pair), told, screen, make)
    return {**found, "related": study.related(pair)}
