"""From the study to runs: what each arm trains on a task, at which rates and with which seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompts.config import Run, TaskConfig, TrainConfig, parse
from softprompts.recipes import stages
from softprompts.recipes.comparison import ArmRun, size_name
from studies.instance_prompts.plan import Arm, Study


def arm_run(
    study: Study, task: TaskConfig, shots: int | None, cells: Sequence[ArmRun], part: str, begun: bool = True
) -> Run:
    """The runs of one arm's `cells` on a task, in one frozen batch; begun: as of `prompt_of`."""
    name = cells[0].arm
    entries = [
        {
            "name": cell.name,
            "seed": cell.seed,
            "task": study.compare.draw_rows(task, shots, cell.seed).model_dump(mode="json"),
            **_rates(study.known[name], cell.rate),
        }
        for cell in cells
    ]
    out = Path(study.output_dir) / "tasks" / f"{task.title}-{size_name(shots)}" / part / name
    return stages.build_run(
        study, (task,), study.compare.training_for(shots), out, prompt=prompt_of(study, name, begun), runs=entries
    )


def weights_run(study: Study, task: TaskConfig, shots: int | None, cell: ArmRun) -> Run:
    """A run that trains weights of a copy of the backbone."""
    out = Path(study.output_dir) / "tasks" / f"{task.title}-{size_name(shots)}" / "weights" / cell.name
    train = parse(study.compare.weight_training(cell, shots), TrainConfig)
    return stages.build_run(study, (study.compare.draw_rows(task, shots, cell.seed),), train, out, seed=cell.seed)


def pretrain_run(study: Study, name: str) -> Run:
    """What `softprompts pretrain` does for an arm."""
    assert study.pretrain is not None
    prompt = prompt_of(study, name, begun=False)
    return stages.build_run(
        study, (study.pretrain.task,), study.pretrain.training, pretrained(study, name), prompt=prompt
    )


def speed_run(study: Study, name: str, turn: int) -> Run:
    """A few steps of an arm alone on the first task, of which few rows are judged."""
    assert study.speed is not None
    task, out = study.tasks[0], Path(study.output_dir) / "speed" / f"{name}-{turn}"
    limit = {**task.split.limit, "validation": 1, "test": 1}
    task = task.model_copy(update={"split": task.split.model_copy(update={"limit": limit})})
    changes = {"max_steps": study.speed.steps, "eval_steps": None, "early_stopping_patience": None, "warmup_steps": 0}
    if name not in study.known:
        cell = ArmRun(name, study.compare.weight_learning_rates[name][0], 0)
        weights = study.compare.weight_training(cell, None)
        return stages.build_run(study, (task,), parse({**weights, **changes}, TrainConfig), out)
    train = study.compare.training.model_copy(update=changes)
    return stages.build_run(study, (task,), train, out, prompt=prompt_of(study, name))


def prompt_of(study: Study, name: str, begun: bool = True) -> dict[str, Any]:
    """What an arm sets of the section `prompt`; begun: with the trained state that it begins at, where it has one."""
    arm = study.known[name]
    if not (arm.pretrain and begun):
        return dict(arm.prompt)
    init = {**study.prompt.init.model_dump(mode="json"), **arm.prompt.get("init", {})}
    return {**arm.prompt, "init": {**init, "state": str(pretrained(study, name) / "prompt")}}


def pretrained(study: Study, name: str) -> Path:
    """The directory of an arm's pretraining."""
    return Path(study.output_dir) / "pretrain" / name


def _rates(arm: Arm, rate: float) -> Mapping[str, Any]:
    return {
        "training.learning_rate": rate,
        "training.learning_rates": {group: rate * share for group, share in arm.follow.items()},
    }
