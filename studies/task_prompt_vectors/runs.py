"""The runs of the study: learning rates, vectors, and training from sums with few rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompts.config import Run, TaskConfig, TrainConfig
from softprompts.recipes import stages
from studies.task_prompt_vectors.plan import Study, prompt_path


def task_of(study: Study, title: str) -> TaskConfig:
    """The task called `title`, with its name."""
    task = next(task for task in study.tasks if task.title == title)
    return task.model_copy(update={"name": title})


def rate_run(study: Study, title: str) -> Run:
    """A task from the first start at every rate."""
    entries = [{"name": f"rate{rate:g}", "training.learning_rate": rate} for rate in study.vectors.learning_rates]
    train = _with_validation(study.vectors.training)
    return _build_run(study, task_of(study, title), train, f"rates/{title}", entries)


def vector_run(study: Study, title: str, rate: float) -> Run:
    """A task from every start: the same rows in the same order, so that nothing but the start differs."""
    entries = []
    for index, init in enumerate(study.vectors.starts):
        entries.append({"name": f"start{index}", "prompt.init": init.model_dump(mode="json")})
    train = study.vectors.training.model_copy(update={"learning_rate": rate})
    return _build_run(study, task_of(study, title), train, f"vectors/{title}", entries)


def few_rows_run(study: Study, title: str, rate: float) -> Run:
    """A task with few rows, from the sums that contain its vector, and from the starts that they were added to."""
    assert study.sums is not None
    assert study.sums.few is not None
    entries = []
    for seed in range(study.sums.starts):
        task = _with_few_rows(task_of(study, title), study.sums.shots, seed).model_dump(mode="json")
        inits: dict[str, Any] = {"start": study.vectors.starts[seed].model_dump(mode="json")}
        for pair in study.pairs:
            if title in pair:
                paths = [f'"{prompt_path(study, name, seed)}"' for name in pair]
                inits["+".join(pair)] = {"vector": " + ".join(paths)}
        for name, init in inits.items():
            entries.append({"name": f"{name}-seed{seed}", "seed": seed, "prompt.init": init, "task": task})
    train = study.sums.few.model_copy(update={"learning_rate": rate})
    return _build_run(study, task_of(study, title), train, f"again/{title}", entries)


def _with_few_rows(task: TaskConfig, shots: int, seed: int) -> TaskConfig:
    return task.model_copy(update={"split": task.split.model_copy(update={"shots": shots, "shots_seed": seed})})


def _with_validation(train: TrainConfig) -> TrainConfig:
    """The same training with at least one validation, at its end, which chooses the rate."""
    return train.model_copy(update={"eval_steps": train.eval_steps or max(1, train.max_steps)})


def _build_run(
    study: Study, task: TaskConfig, train: TrainConfig, folder: str, entries: Sequence[Mapping[str, Any]]
) -> Run:
    prompt = {"init": study.vectors.starts[0].model_dump(mode="json")}
    out = Path(study.output_dir) / folder
    return stages.build_run(study, (task,), train, out, prompt=prompt, runs=entries, seed=study.vectors.seed)
