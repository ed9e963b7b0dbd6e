"""From the study to runs: rates, vectors, and sums that are trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompts.config import Run, TaskConfig, TrainConfig
from softprompts.recipes import stages
from studies.task_prompt_vectors.plan import Study, prompt_path


def task_of(study: Study, title: str) -> TaskConfig:
    """The task called `title`, with its name."""
    found = next(task for task in study.tasks if task.title == title)
    return found.model_copy(update={"name": title})


def rate_run(study: Study, title: str) -> Run:
    """A task from the first start at every rate."""
    entries = [{"name": f"rate{rate:g}", "training.learning_rate": rate} for rate in study.vectors.learning_rates]
    return _run(study, task_of(study, title), _judged(study.vectors.training), f"rates/{title}", entries)


def vector_run(study: Study, title: str, rate: float) -> Run:
    """A task from every start: the same rows in the same order, so that nothing but the start differs."""
    entries = [
        {"name": f"start{place}", "prompt.init": init.model_dump(mode="json")}
        for place, init in enumerate(study.vectors.starts)
    ]
    train = study.vectors.training.model_copy(update={"learning_rate": rate})
    return _run(study, task_of(study, title), train, f"vectors/{title}", entries)


def few_rows_run(study: Study, title: str, rate: float) -> Run:
    """A task with few rows, from the sums that its vector is part of, and from the starts that they were added to."""
    assert study.sums is not None
    assert study.sums.few is not None
    entries = []
    for place in range(study.sums.starts):
        task = _few(task_of(study, title), study.sums.shots, place)
        begins: dict[str, Any] = {"start": study.vectors.starts[place].model_dump(mode="json")}
        for pair in study.pairs:
            if title in pair:
                begins["+".join(pair)] = {"vector": " + ".join(f'"{prompt_path(study, name, place)}"' for name in pair)}
        entries += [
            {"name": f"{name}-seed{place}", "seed": place, "prompt.init": init, "task": task.model_dump(mode="json")}
            for name, init in begins.items()
        ]
    train = study.sums.few.model_copy(update={"learning_rate": rate})
    return _run(study, task_of(study, title), train, f"again/{title}", entries)


def _few(task: TaskConfig, shots: int, seed: int) -> TaskConfig:
    return task.model_copy(update={"split": task.split.model_copy(update={"shots": shots, "shots_seed": seed})})


def _judged(train: TrainConfig) -> TrainConfig:
    """With one validation at the end, which chooses the rate."""
    return train.model_copy(update={"eval_steps": train.eval_steps or max(1, train.max_steps)})


def _run(study: Study, task: TaskConfig, train: TrainConfig, folder: str, entries: Sequence[Mapping[str, Any]]) -> Run:
    prompt = {"init": study.vectors.starts[0].model_dump(mode="json")}
    out = Path(study.output_dir) / folder
    return stages.build_run(study, (task,), train, out, prompt=prompt, runs=entries, seed=study.vectors.seed)
