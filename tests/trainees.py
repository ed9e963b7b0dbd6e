"""Runs of learners: what the tests train, alone or with others in one batch."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompts.config import TrainConfig
from softprompts.data import EncodedExample
from softprompts.model.learner import Learner
from softprompts.training import loop
from softprompts.training.distillation import TeacherOutputs
from softprompts.training.loop import TrainingRun
from softprompts.training.optimizer import build_optimizer
from softprompts.training.trainables import TrainablePrompts
from softprompts.types import Progress


@dataclass(frozen=True)
class Trainee:
    """A learner and the run that trains it."""

    name: str
    learner: Learner
    examples: Sequence[EncodedExample]
    config: TrainConfig
    seed: int = 0
    validate: Callable[[], float] | None = None
    directory: str | Path | None = None
    settings: Mapping[str, Any] | None = None
    teacher: TeacherOutputs | None = None


def train_many(trainees: Sequence[Trainee]) -> Generator[tuple[str, Progress], None, None]:
    """Train all in the same batches."""
    learners = {trainee.name: trainee.learner for trainee in trainees}
    teachers = {trainee.name: trainee.teacher for trainee in trainees if trainee.teacher is not None}
    runs = [
        TrainingRun(one.name, one.examples, one.config, one.seed, one.validate, one.directory, one.settings)
        for one in trainees
    ]
    return loop.train_many(TrainablePrompts(learners, teachers), runs)


def train(
    learner: Learner,
    examples: Sequence[EncodedExample],
    config: TrainConfig,
    teacher: TeacherOutputs | None = None,
    **more: Any,
) -> Generator[Progress, None, None]:
    """Train one learner; `more` goes to its TrainingRun."""
    trainable = TrainablePrompts({"": learner}, {} if teacher is None else {"": teacher})
    return loop.train(trainable, TrainingRun("", examples, config, **more))


def optimizer_of(learner: Learner, config: TrainConfig) -> Any:
    """The optimizer that trains a learner."""
    return build_optimizer(TrainablePrompts({"": learner}).param_groups("", config), config)
