"""Runs of prompts: what the tests train, alone or with others in one batch."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompts.config import TrainConfig
from softprompts.data import EncodedExample
from softprompts.model import SoftPromptModel
from softprompts.training import loop
from softprompts.training.distillation import TeacherOutputs
from softprompts.training.loop import TrainingRun
from softprompts.training.trainables import TrainablePrompts
from softprompts.types import Progress


@dataclass(frozen=True)
class Trainee:
    """Prompts of a model and the run that trains them."""

    name: str
    model: SoftPromptModel
    prompts: Sequence[str]
    rows: Sequence[EncodedExample]
    config: TrainConfig
    seed: int = 0
    validate: Callable[[], float] | None = None
    directory: str | Path | None = None
    settings: Mapping[str, Any] | None = None
    targets: TeacherOutputs | None = None


def train_many(trainees: Sequence[Trainee]) -> Generator[tuple[str, Progress], None, None]:
    """Train the prompts of all, which are of one model, in the same batches."""
    (model,) = {trainee.model for trainee in trainees}
    prompts = {trainee.name: trainee.prompts for trainee in trainees}
    teachers = {trainee.name: trainee.targets for trainee in trainees if trainee.targets is not None}
    runs = [
        TrainingRun(one.name, one.rows, one.config, one.seed, one.validate, one.directory, one.settings)
        for one in trainees
    ]
    return loop.train_many(TrainablePrompts(model, prompts, teachers), runs)


def fit(
    model: SoftPromptModel,
    rows: Sequence[EncodedExample],
    config: TrainConfig,
    *,
    prompts: Sequence[str] | None = None,
    targets: TeacherOutputs | None = None,
    **options: Any,
) -> Generator[Progress, None, None]:
    """Train prompts of a model, None: all; `options` go to the TrainingRun."""
    teachers = {} if targets is None else {"": targets}
    trainable = TrainablePrompts(model, {"": model.tasks if prompts is None else prompts}, teachers)
    return loop.train_run(trainable, TrainingRun("", rows, config, **options))
