"""The stages in order, their checks and their summary; each is a directory, and a finished stage is not repeated."""

import functools
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, product
from pathlib import Path
from typing import Any

from torch import Tensor

from softprompts import injection
from softprompts.artifacts import artifact
from softprompts.artifacts.fingerprint import check_fingerprint
from softprompts.artifacts.vectors import similarity
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import InitConfig
from softprompts.config.sweep import sweep
from softprompts.data import Task, load_task
from softprompts.errors import ArtifactError, ConfigError
from softprompts.evaluation import page
from softprompts.injection import Site
from softprompts.model import initialization
from softprompts.model.setup import load_backbone
from softprompts.recipes import comparison, stages
from softprompts.recipes.comparison import ALL_TARGETS, ArmResult, ArmRun, Comparison, format_scores, size_name
from softprompts.recipes.multitask.plan import (
    ARMS,
    VARIANTS,
    Origins,
    Plan,
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
from softprompts.recipes.run.prepare import SILENT
from softprompts.recipes.run.results import versions
from softprompts.recipes.run.run import ProgressReporter
from softprompts.training import backbone_weights


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


def check(plan: Plan, reporter: ProgressReporter) -> None:
    """Check a plan before any training.

    Tasks must have rows, and targets validation and test rows. Trained teachers must be plain prompts of this model,
    length and site. The model must support the distilled layers, starts from class labels and trained weights.

    Raises:
        ConfigError, DataError, ArtifactError, BackboneError: The plan would fail on its way.
    """
    targets = {}
    for task in (*plan.sources, *plan.targets):
        loaded = load_task(task)
        if task in plan.targets:
            targets[task.title] = loaded
            for part, rows in (("validation", loaded.validation), ("test", loaded.test)):
                if not rows:
                    raise ConfigError(f"target {task.title} has no {part} rows; set split.{part}_fraction")
    for run in (teacher_runs(plan), source_runs(plan), probe_runs(plan)):
        if run.runs:
            sweep(run)
    backbone = load_backbone(plan.model, log=reporter.log)
    injection.check_layers(backbone, plan.source.layers)
    _check_labels(plan, backbone, targets)
    _check_teachers(plan, backbone)
    for shots in plan.target.shots:
        for arm, target in product(select_arms(plan, shots, weights=True), weight_targets(plan)):
            for rate in plan.target.weight_learning_rates[arm]:
                backbone_weights.check_installed(weights_run(plan, target, shots, ArmRun(arm, rate, 0)).training)
            backbone_weights.check_trainable(backbone)


def _check_labels(plan: Plan, backbone: Backbone, targets: Mapping[str, Task]) -> None:
    """Raise ConfigError where an arm starts from class labels, and that is not possible for a target."""
    if not any("labels" in select_arms(plan, shots, weights=False) for shots in plan.target.shots):
        return
    site = Site(plan.prompt.site, plan.prompt.mode, plan.prompt.placement)
    for name, task in targets.items():
        words = tuple(f"{task.template.separator}{word}" for word in (task.template.verbalizer or {}).values())
        spec = injection.prompt_spec(backbone, site, plan.prompt.num_virtual_tokens)
        try:
            initialization.initialize(InitConfig(kind="labels"), backbone, site, spec, labels=words)
        except ValueError as error:
            raise ConfigError(f"arm 'labels' is not possible for target {name}: {error}; leave the arm out") from None


def _check_teachers(plan: Plan, backbone: Backbone) -> None:
    """Raise ArtifactError for a trained teacher of other weights, or of another length or site than the plan's."""
    weights = fingerprint(backbone) if plan.teachers.trained else None
    site = Site(plan.prompt.site, plan.prompt.mode, plan.prompt.placement)
    wanted = {
        "length": plan.prompt.num_virtual_tokens,
        "site": site.name,
        "mode": site.mode,
        "placement": injection.resolve_placement(backbone, site),
        "head": backbone.head,
    }
    for name, path in plan.teachers.trained.items():
        teacher = artifact.load(path)
        assert weights is not None
        check_fingerprint(teacher.fingerprint, weights, False)
        teacher.require_prompt(Path(path))
        # With placement auto, the source's own template decides.
        placed_by_template = plan.prompt.placement == "auto" and teacher.placement == "template"
        for key, value in wanted.items():
            actual = teacher.shape[0] if key == "length" else getattr(teacher, key)
            if actual != value and not (key == "placement" and placed_by_template):
                raise ArtifactError(
                    f"the teacher of {name}, {path}, has {key} {actual} and the plan wants {value}: change the "
                    f"plan's prompt, or leave the teacher out so that it is trained"
                )


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


def summarize(
    plan: Plan,
    targets: Comparison,
    sources: Mapping[str, Any],
    origins: Origins,
    teachers: Mapping[str, Tensor],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and of the page.

    Args:
        plan: The plan.
        targets: The runs of all arms on the targets.
        sources: The results of the shared prompts.
        origins: The prompts that targets start from.
        teachers: The prompt of each source [P, D].
        seconds: The duration of the whole recipe.
    """
    titles = [task.title for task in plan.targets]
    about = {name: arm.about for name, arm in ARMS.items()}
    nearest = []
    for (target, shots, seed), weights in origins.nearest.items():
        nearest.append({"target": target, "size": size_name(shots), "seed": seed, "sources": dict(weights)})
    matrix = similarity.similarity_matrix(list(teachers.values())).tolist()
    return {
        "format": 1,
        "title": f"Multitask prompt tuning with {plan.model.name}",
        "task": ", ".join(titles),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "arms": [comparison.scores(targets.results, shots, titles, about) for shots in plan.target.shots],
        "sources": _source_scores(sources),
        "curves": comparison.curves(targets.results),
        "similarity": {"labels": list(teachers), "matrix": matrix},
        "nearest": nearest,
        "rates": list(targets.chosen_rates),
        "config": plan.model_dump(mode="json"),
        "versions": versions(),
        "machine": comparison.machine(targets.results),
        "warnings": comparison.failures(targets.results),
        "next": [f"softprompts inspect {path}" for path in list(origins.teachers.values())[:1]],
    }


def _source_scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores of each variant's prompts on the sources."""
    variants: dict[str, dict[str, Any]] = {}
    for row in results["runs"]:
        variant = variants.setdefault(row["name"], {"variant": row["name"], "loss": row["loss"], "scores": {}})
        if row["after"]:
            variant["scores"][row["task"]] = row["after"]["value"]
    return [variants[name] for name in VARIANTS if name in variants]


def page_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables and plots of their page."""
    tables = [comparison.score_table(size, "Targets") for size in results["arms"]]
    tables += [_source_table(results["sources"]), comparison.rate_table(results["rates"])]
    tables.append(_nearest_table(results["nearest"]))
    heatmap = {"title": "Similarity of the sources' prompts (cosine of their mean tokens)", **results["similarity"]}
    plots = [_loss_plot(curve) for curve in results["curves"]]
    return {**results, "tables": tables, "heatmaps": [heatmap], "plots": plots}


def _source_table(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(chain.from_iterable(source["scores"] for source in sources)))
    rows = []
    for source in sources:
        rows.append([source["variant"], source["loss"], *map(source["scores"].get, tasks)])
    columns = ["variant", "last loss", *tasks]
    return {"title": "Shared prompts on their sources", "columns": columns, "rows": rows}


def _nearest_table(nearest: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for line in nearest:
        rows.append([line["target"], line["size"], str(line["seed"]), format_scores(line["sources"])])
    columns = ["target", "size", "seed", "source, weight"]
    return {"title": "Nearest sources (SPoT)", "columns": columns, "rows": rows}


def _loss_plot(curve: Mapping[str, Any]) -> dict[str, Any]:
    """The loss of prompt tuning and of multitask prompt tuning on a target."""
    lines = []
    for arm, look in (("mpt", "after"), ("prompt-tuning", "before")):
        if arm in curve["lines"]:
            lines.append({"name": arm, "points": curve["lines"][arm], "look": look})
    return {"title": f"Loss on {curve['target']}, {curve['size']}", "lines": lines}
