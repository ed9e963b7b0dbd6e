"""The runs of the study: what each arm trains on a task, at which rates and with which seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompts.config import Run, TaskConfig, TrainConfig, parse
from softprompts.recipes import stages
from softprompts.recipes.comparison import ArmRun, size_name
from studies.instance_prompts.plan import Arm, Study


def arm_run(
    study: Study, task: TaskConfig, shots: int | None, arm_runs: Sequence[ArmRun], part: str, pretrained: bool = True
) -> Run:
    """The runs of one arm on a task, in one frozen batch, in the folder `part`; pretrained: as in `prompt_of`."""
    name = arm_runs[0].arm
    entries = []
    for arm_run in arm_runs:
        drawn = study.compare.draw_rows(task, shots, arm_run.seed).model_dump(mode="json")
        rates = _rates(study.known[name], arm_run.rate)
        entries.append({"name": arm_run.name, "seed": arm_run.seed, "task": drawn, **rates})
    out = Path(study.output_dir) / "tasks" / f"{task.title}-{size_name(shots)}" / part / name
    prompt = prompt_of(study, name, pretrained)
    return stages.build_run(study, (task,), study.compare.training_for(shots), out, prompt=prompt, runs=entries)


def weights_run(study: Study, task: TaskConfig, shots: int | None, arm_run: ArmRun) -> Run:
    """A run that trains weights of a copy of the backbone."""
    out = Path(study.output_dir) / "tasks" / f"{task.title}-{size_name(shots)}" / "weights" / arm_run.name
    train = parse(study.compare.weight_training(arm_run, shots), TrainConfig)
    drawn = study.compare.draw_rows(task, shots, arm_run.seed)
    return stages.build_run(study, (drawn,), train, out, seed=arm_run.seed)


def pretrain_run(study: Study, name: str) -> Run:
    """The run of `softprompts pretrain` for an arm."""
    assert study.pretrain is not None
    prompt = prompt_of(study, name, pretrained=False)
    out = pretrain_directory(study, name)
    return stages.build_run(study, (study.pretrain.task,), study.pretrain.training, out, prompt=prompt)


def speed_run(study: Study, name: str, turn: int) -> Run:
    """A few steps of an arm alone on the first task, with one validation row and one test row."""
    assert study.speed is not None
    task = study.tasks[0]
    out = Path(study.output_dir) / "speed" / f"{name}-{turn}"
    limit = {**task.split.limit, "validation": 1, "test": 1}
    task = task.model_copy(update={"split": task.split.model_copy(update={"limit": limit})})
    changes = {"max_steps": study.speed.steps, "eval_steps": None, "early_stopping_patience": None, "warmup_steps": 0}
    if name not in study.known:
        arm_run = ArmRun(name, study.compare.weight_learning_rates[name][0], 0)
        weights = study.compare.weight_training(arm_run, None)
        return stages.build_run(study, (task,), parse({**weights, **changes}, TrainConfig), out)
    train = study.compare.training.model_copy(update=changes)
    return stages.build_run(study, (task,), train, out, prompt=prompt_of(study, name))


def prompt_of(study: Study, name: str, pretrained: bool = True) -> dict[str, Any]:
    """The keys that an arm sets in the section `prompt`; pretrained: with the pretrained state, where it has one."""
    arm = study.known[name]
    if not (arm.pretrain and pretrained):
        return dict(arm.prompt)
    init = {**study.prompt.init.model_dump(mode="json"), **arm.prompt.get("init", {})}
    return {**arm.prompt, "init": {**init, "state": str(pretrain_directory(study, name) / "prompt")}}


def pretrain_directory(study: Study, name: str) -> Path:
    """The directory of an arm's pretraining."""
    return Path(study.output_dir) / "pretrain" / name


def _rates(arm: Arm, rate: float) -> Mapping[str, Any]:
    """The keys of an arm's learning rates, of which those of parameter groups are multiples of `rate`."""
    return {
        "training.learning_rate": rate,
        "training.learning_rates": {group: rate * share for group, share in arm.follow.items()},
    }
