"""What would only be noticed after hours of work is found before any of it."""

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


def check(plan: Plan, screen: ProgressReporter) -> None:
    """Raise ConfigError, DataError, ArtifactError or BackboneError for a plan that would fail on its way.

    Tasks must be there and targets have rows to choose and to judge by; given teachers must be plain prompts of this
    model, length and site; layers, class labels and trained weights must be possible for the model.
    """
    targets = {}
    for task in (*plan.sources, *plan.targets):
        loaded = load_task(task)
        if task in plan.targets:
            targets[task.title] = loaded
            for role, rows in (("choose a rate", loaded.validation), ("judge", loaded.test)):
                if not rows:
                    raise ConfigError(f"target {task.title} has no rows to {role} by; set its split's fractions")
    for run in (teacher_runs(plan), source_runs(plan), probe_runs(plan)):
        if run.runs:
            sweep(run)
    backbone = load_backbone(plan.model, log=screen.log)
    injection.check_layers(backbone, plan.source.layers)
    _check_labels(plan, backbone, targets)
    _check_teachers(plan, backbone)
    for shots in plan.target.shots:
        for arm, target in product(select_arms(plan, shots, weights=True), weight_targets(plan)):
            for rate in plan.target.weight_learning_rates[arm]:
                backbone_weights.check_installed(weights_run(plan, target, shots, ArmRun(arm, rate, 0)).training)
            backbone_weights.check_trainable(backbone)


def _check_labels(plan: Plan, backbone: Backbone, targets: Mapping[str, Task]) -> None:
    """A start from class labels, where an arm has one, must be possible for every target."""
    if not any("labels" in select_arms(plan, shots, weights=False) for shots in plan.target.shots):
        return
    site = Site(plan.prompt.site, plan.prompt.mode, plan.prompt.placement)
    for name, task in targets.items():
        words = tuple(f"{task.template.separator}{word}" for word in (task.template.verbalizer or {}).values())
        slot = injection.prompt_spec(backbone, site, plan.prompt.num_virtual_tokens)
        try:
            initialization.initialize(InitConfig(kind="labels"), backbone, site, slot, labels=words)
        except ValueError as error:
            raise ConfigError(f"arm 'labels' is not possible for target {name}: {error}; leave the arm out") from None


def _check_teachers(plan: Plan, backbone: Backbone) -> None:
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
        one = artifact.load(path)
        assert weights is not None
        artifact.check_fingerprint(one.fingerprint, weights, False)
        one.require_prompt(Path(path))
        found = {"length": one.shape[0], **{key: getattr(one, key) for key in ("site", "mode", "placement", "head")}}
        slotted = plan.prompt.placement == "auto" and one.placement == "template"  # as the source's own template says
        for key, value in wanted.items():
            if found[key] != value and not (key == "placement" and slotted):
                raise ArtifactError(
                    f"the teacher of {name}, {path}, has {key} {found[key]} and the plan wants {value}: change the "
                    f"plan's prompt, or leave the teacher out so that it is trained"
                )
