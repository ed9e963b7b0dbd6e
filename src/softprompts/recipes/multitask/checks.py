"""Checks before any training of everything that would fail after hours."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

from softprompts import injection
from softprompts.artifacts import artifact
from softprompts.backbone import Backbone, fingerprint
from softprompts.config import InitConfig
from softprompts.config.sweep import sweep
from softprompts.data import Task, load_task
from softprompts.errors import ArtifactError, ConfigError
from softprompts.injection import Site
from softprompts.model import initialization
from softprompts.model.setup import load_backbone
from softprompts.recipes.comparison import ArmRun
from softprompts.recipes.multitask.plan import Plan
from softprompts.recipes.multitask.runs import (
    probe_runs,
    select_arms,
    source_runs,
    teacher_runs,
    weight_targets,
    weights_run,
)
from softprompts.recipes.run.run import ProgressReporter
from softprompts.training import backbone_weights


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
        artifact.check_fingerprint(teacher.fingerprint, weights, False)
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
