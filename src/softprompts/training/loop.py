"""The training loop: batch, loss, backward, step, progress.

`train_many` is the loop, `train_run` its case of one run, and `train` the door for people who have a model and rows.

The rows, the learning rate and the random stream of a step are functions of the seed and the step's number. So a
checkpoint needs only tensors and a few numbers, and a killed run continues bit for bit.
"""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from accelerate.utils.environment import get_cpu_distributed_information
from torch import Tensor, nn

from softprompts.config import TrainConfig
from softprompts.data.encoding import EncodedExample
from softprompts.data.sampling import ExampleBatches, TaskBatches
from softprompts.errors import ConfigError, TrainingError
from softprompts.model import SoftPromptModel
from softprompts.training import checkpoint, objectives
from softprompts.training.checkpoint import Checkpoint, CheckpointFile
from softprompts.training.optimizer import build_optimizer, set_rates
from softprompts.training.trainables import Loss, RunBatch, Trainable, TrainablePrompts, TrainableState
from softprompts.types import Objective, Progress, Row

NO_LABEL = "a batch holds no label to learn from; check the template and the label column"


@dataclass(frozen=True)
class TrainingRun:
    """One run: its examples, its settings, and the place of its checkpoints.

    Attributes:
        name: The name by which the trainable knows the run.
        examples: The examples to learn from.
        config: How to train.
        seed: The seed of the order of the examples and of every random stream.
        validate: Gives a score, higher is better. The loop asks for it every `config.eval_steps` steps, keeps the
            parameters with the best one, and stops early.
        directory: Where checkpoints are written, and where a run continues from one; None writes none.
        settings: What must be the same when a run is continued.
    """

    name: str
    examples: Sequence[EncodedExample]
    config: TrainConfig
    seed: int = 0
    validate: Callable[[], float] | None = None
    directory: str | Path | None = None
    settings: Mapping[str, Any] | None = None

    @cached_property
    def objective(self) -> Objective:
        """The weighted sum of the run's objectives."""
        return objectives.weigh(self.config.objectives)

    @cached_property
    def batches(self) -> ExampleBatches | TaskBatches:
        """The examples of every micro-batch."""
        if self.config.sampling.draw == "rows":
            return ExampleBatches(self.examples, self.config.batch_size, self.seed, self.config.batch_tokens)
        return TaskBatches(self.examples, self.config.batch_size, self.seed, self.config.sampling)

    @cached_property
    def checkpoint_file(self) -> CheckpointFile | None:
        """The run's checkpoint file; None without a directory."""
        return CheckpointFile.of(self.directory, self.examples, self.seed, self.settings)

    def check_checkpoint(self) -> None:
        """Raise TrainingError where the directory holds the checkpoint of a run with other settings."""
        if self.checkpoint_file is not None and self.checkpoint_file.path.exists():
            self.checkpoint_file.read()

    def micro_batches(self, step: int) -> list[list[EncodedExample]]:
        """The examples of each micro-batch of a step, counted from 0."""
        count = self.config.gradient_accumulation_steps
        return [self.batches.at(step * count + part) for part in range(count)]

    def batch(self, step: int, part: int, examples: Sequence[EncodedExample], share: float = 1.0) -> RunBatch:
        """Examples of micro-batch `part` of a step, with separate random streams, whatever other runs draw."""
        prompt_seed = (self.seed * 1_000_003 + step + (2 * part << 40)) % 2**63
        objective_seed = (prompt_seed + (1 << 40)) % 2**63
        return RunBatch(self.name, examples, self.objective, prompt_seed, objective_seed, share)


def train(
    model: SoftPromptModel,
    examples: Mapping[str, Sequence[Row | EncodedExample]],
    config: TrainConfig,
    *,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
    directory: str | Path | None = None,
) -> Generator[Progress, None, None]:
    """Train prompts of a model in place; afterwards they are the best ones.

    Args:
        model: The model with the prompts.
        examples: The rows of each prompt's task, by the name of the prompt. Rows of a data set need the prompt's
            template; tokenized examples do not.
        config: How to train.
        seed: The seed of the order of the examples and of every random stream.
        validate: Gives a score, higher is better, every `config.eval_steps` steps. NaN is never the best; where all
            are NaN, a line of the log says so, and the prompts stay as the last step made them.
        directory: Where checkpoints are written, and where training continues from one. It then must have the same
            backbone, prompts, examples, seed and settings, and `validate` where it had one.

    Yields:
        The progress of every step.

    Raises:
        ConfigError: There are no examples, or a prompt does not exist or has no template.
        TrainingError: The loss was not finite, or the checkpoint belongs to another training.
    """
    if not examples:
        raise ConfigError("there is no prompt to train; name prompts with their rows")
    encoded: list[EncodedExample] = []
    for task_id, (prompt, rows) in enumerate(examples.items()):
        model.index(prompt)
        for row in rows:
            example = row if isinstance(row, EncodedExample) else model.example_tokenizer(prompt).example(row)
            encoded.append(replace(example, task_id=task_id))
    settings = None if directory is None else _fixed_settings(model, tuple(examples), config, validate)
    run = TrainingRun("", encoded, config, seed, validate=validate, directory=directory, settings=settings)
    yield from train_run(TrainablePrompts(model, {"": tuple(examples)}), run)


def train_run(trainable: Trainable, run: TrainingRun) -> Generator[Progress, None, None]:
    """Train one run in place, and yield the progress of every step; see `train_many`."""
    with closing(train_many(trainable, [run])) as steps:
        for _, progress in steps:
            yield progress


def train_many(trainable: Trainable, runs: Sequence[TrainingRun]) -> Generator[tuple[str, Progress], None, None]:
    """Train runs that share every batch, in place; afterwards each has its best parameters.

    Each run is the run that it would be alone, up to rounding: it has its own examples, optimizer, schedule, clipping,
    validation, random streams and checkpoints. A run that is done or stops early leaves the batch. So does a run whose
    loss is not finite, after its last good parameters are put back. A run with a checkpoint continues from it.

    Args:
        trainable: What is trained. It knows the runs by their names.
        runs: The runs.

    Yields:
        The name of a run and the progress of one of its steps. The steps before a resume come first.

    Raises:
        ConfigError: A run has no examples, or two runs have one name.
        TrainingError: A checkpoint belongs to other settings, or the first batch differs from plain concatenation. For
            a loss that was not finite it comes after the other runs are done; `failed` holds the message of each run.
    """
    accelerator = _start(trainable, runs)
    states = {run.name: _initial_state(trainable, run) for run in runs}
    for name, state in states.items():
        for progress in state.current.history:
            yield name, progress
    active: list[RunState] = []
    try:
        with _gradients_enabled(states.values()):
            comparisons = {name: _compare(trainable, state) for name, state in states.items() if state.is_active}
            while active := [state for state in states.values() if state.is_active]:
                started = time.perf_counter()
                steps = {state.run.name: RunStep.of(trainable, state) for state in active}
                for batches in _micro_batches(trainable, steps, accelerator):
                    losses = trainable.loss(batches)
                    weighted = [loss.value * batch.share for loss, batch in zip(losses, batches, strict=True)]
                    torch.stack(weighted).sum().backward()
                    for batch, loss in zip(batches, losses, strict=True):
                        steps[batch.run].record(batch, loss)
                for step in steps.values():
                    step.sum_over_processes(accelerator)
                shared_seconds = time.perf_counter() - started
                updated: dict[str, RunState] = {}
                for name, step in steps.items():
                    started = time.perf_counter() - shared_seconds
                    state, config = step.state, step.state.run.config
                    norm = nn.utils.clip_grad_norm_(list(state.parameters.values()), config.max_grad_norm or math.inf)
                    if not step.labels:
                        updated[name] = state.after_failure(NO_LABEL)
                    elif not math.isfinite(float(step.loss) + float(norm)):
                        updated[name] = state.after_failure(state.divergence())
                    else:
                        rate = set_rates(state.optimizer, config, state.current.step)
                        state.optimizer.step()
                        state.optimizer.zero_grad(set_to_none=True)
                        score = _validate(state, accelerator)
                        comparison = comparisons.pop(name, "")
                        updated[name] = state.after_step(
                            step.progress(rate, score, comparison, trainable.state(name), started)
                        )
                # One assignment, so that an interrupt finds all runs at the same step.
                states = {**states, **updated}
                if any(state.is_checkpoint_due or not state.is_active for state in updated.values()):
                    _save(updated.values(), accelerator)
                for name, state in updated.items():
                    if not state.current.failed:
                        yield name, state.current.history[-1]
    except (KeyboardInterrupt, GeneratorExit):
        _save([states[state.run.name] for state in active], accelerator)
        raise
    _save([state for state in states.values() if state.is_unwritten], accelerator)
    for state in states.values():
        if not state.current.failed:
            checkpoint.restore_best(state.current, state.parameters)
    if accelerator.is_main_process:
        _log_undefined_scores(states)
    _raise_failures(states)


@dataclass(frozen=True)
class RunState:
    """A run after its last step.

    Attributes:
        run: The run.
        parameters: What is trained, by name.
        optimizer: The optimizer of the parameters.
        current: The state after the last step.
        good: The last state whose loss is known to be finite: the one before the last step.
        resumable: Whether the states hold the parameters and the optimizer's state.
    """

    run: TrainingRun
    parameters: dict[str, nn.Parameter] = field(repr=False)
    optimizer: Any = field(repr=False)
    current: Checkpoint
    good: Checkpoint
    resumable: bool = True

    @property
    def is_active(self) -> bool:
        """Whether the run makes another step."""
        state, config = self.current, self.run.config
        if state.failed or state.step >= config.max_steps:
            return False
        if config.early_stopping_patience is None or config.eval_steps is None or state.best is None:
            return True
        return state.step - state.best_step < config.early_stopping_patience * config.eval_steps

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the settings ask for a checkpoint after the last step."""
        return self.current.step % self.run.config.save_steps == 0

    @property
    def is_unwritten(self) -> bool:
        """Whether the run has no checkpoint and could have one."""
        return self.run.checkpoint_file is not None and not self.run.checkpoint_file.path.exists()

    def after_step(self, progress: Progress) -> "RunState":
        """The state after a step that the optimizer has made."""
        current = checkpoint.capture(self.current, progress, self.parameters, self.optimizer, self.resumable)
        # The loss of the next step shows whether the parameters that this step made are good.
        return replace(self, current=current, good=self.current)

    def after_failure(self, reason: str) -> "RunState":
        """The last good state, put back into the parameters, from which the run makes no further step."""
        if self.resumable:
            checkpoint.restore(self.good, self.parameters, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return replace(self, current=replace(self.good, failed=reason))

    def divergence(self) -> str:
        """The message for a loss that is not finite in the next step."""
        config, file = self.run.config, self.run.checkpoint_file
        problem = f"the loss of step {self.current.step + 1} is not a number"
        rate = f"training.learning_rate was {config.learning_rate:g} {config.learning_rate_unit}"
        remedy = f"Try a lower rate ({rate}) or gradient clipping (training.max_grad_norm)"
        if not self.resumable:
            return f"{problem}, and nothing was written. {remedy}"
        where = f" in {file.path}" if file else ""
        return (
            f"{problem}; the state after step {self.good.step} is kept{where}. {remedy}, in another output directory "
            f"or with that file deleted"
        )


@dataclass
class RunStep:
    """The step of one run while it is made.

    Attributes:
        state: The run before the step.
        examples: The examples of each micro-batch, in all processes.
        labels: The number of labels in the step.
        loss: The mean loss over the labels, summed up micro-batch by micro-batch [].
        path: How the prompt was computed.
        measures: The numbers that the method reports.
    """

    state: RunState
    examples: list[list[EncodedExample]]
    labels: int
    loss: Tensor
    path: str = ""
    measures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trainable: Trainable, state: RunState) -> "RunStep":
        """The next step of a run, whose parameters have no gradient."""
        run = state.run
        examples = run.micro_batches(state.current.step)
        labels = sum(_count_labels(trainable, run.name, part) for part in examples)
        return cls(state, examples, labels, torch.zeros((), device=trainable.device, dtype=trainable.dtype))

    def batch(self, trainable: Trainable, part: int, accelerator: Accelerator) -> RunBatch | None:
        """This process's share of a micro-batch; None where that holds no label."""
        if part >= len(self.examples):
            return None
        run = self.state.run
        examples = self.examples[part][accelerator.process_index :: accelerator.num_processes]
        labels = _count_labels(trainable, run.name, examples)
        return run.batch(self.state.current.step, part, examples, labels / self.labels) if labels else None

    def record(self, batch: RunBatch, loss: Loss) -> None:
        """Add the loss of a micro-batch."""
        self.loss = self.loss + loss.value.detach() * batch.share
        self.path, self.measures = loss.path, loss.measures

    def sum_over_processes(self, accelerator: Accelerator) -> None:
        """Sum loss and gradients over all processes; a parameter without gradient in all of them keeps none."""
        if accelerator.num_processes == 1:
            return
        parameters = list(self.state.parameters.values())
        has_gradient = self.loss.new_tensor([parameter.grad is not None for parameter in parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.loss, has_gradient, *gradients = accelerator.reduce([self.loss, has_gradient, *gradients], "sum")
        for parameter, count, gradient in zip(parameters, has_gradient.tolist(), gradients, strict=True):
            parameter.grad = gradient if count else None

    def progress(
        self, rate: float, score: float | None, comparison: str, facts: TrainableState, started: float
    ) -> Progress:
        """The progress report of the step, which took the time since `started`."""
        current, config = self.state.current, self.state.run.config
        machine = next((progress.machine for progress in reversed(current.history) if progress.machine), "")
        return Progress(
            step=current.step + 1,
            steps=config.max_steps,
            loss=float(self.loss),
            rate=rate,
            rms_ratio=facts.rms_ratio,
            tokens=sum(len(example.input_ids) for example in itertools.chain(*self.examples)),
            seconds=time.perf_counter() - started,
            score=score,
            path=self.path,
            equivalence=comparison,
            machine="" if facts.machine == machine else facts.machine,
            measures=self.measures,
        )


def is_main_process() -> bool:
    """Whether this process writes and prints: the first of those that a launcher started."""
    return bool(get_cpu_distributed_information().rank == 0)


def _fixed_settings(
    model: SoftPromptModel, prompts: Sequence[str], config: TrainConfig, validate: Callable[[], float] | None
) -> dict[str, Any]:
    """What must be the same when training of prompts is continued from its checkpoint, beside seed and examples."""
    settings_of_prompts = {}
    for name in prompts:
        record = model.registry.records[name]
        artifact = None if record.artifact is None else record.artifact.digest
        start = {"seed": record.seed, "init": record.init_digest, "artifact": artifact, "parents": record.parents}
        settings_of_prompts[name] = {**record.config.model_dump(mode="json"), "start": start}
    return {
        "backbone": checkpoint.backbone_settings(model.backbone),
        "prompts": settings_of_prompts,
        "training": checkpoint.training_settings(config),
        "validated": validate is not None and config.eval_steps is not None,
    }


def _start(trainable: Trainable, runs: Sequence[TrainingRun]) -> Accelerator:
    """Check the runs, and finish or undo a write of their checkpoints that was cut."""
    names = [run.name for run in runs]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"runs that train together need names that differ, given {', '.join(names) or 'no run'}")
    for run in runs:
        if not run.examples:
            subject = f"run '{run.name}' has" if run.name else "there are"
            raise ConfigError(f"{subject} no rows to train on; check the task's source and split")
    # One process does not need accelerate's device: the first run of the process fixes it for all later ones.
    several = get_cpu_distributed_information().world_size > 1
    accelerator = Accelerator(cpu=several and trainable.device.type == "cpu")
    if trainable.resumable and accelerator.is_main_process:
        checkpoint.recover([run.checkpoint_file.path for run in runs if run.checkpoint_file is not None])
    accelerator.wait_for_everyone()
    return accelerator


def _initial_state(trainable: Trainable, run: TrainingRun) -> RunState:
    """The state of the run's checkpoint, put into the parameters, or that of a run without a step."""
    parameters = trainable.parameters(run.name)
    optimizer = build_optimizer(trainable.param_groups(run.name, run.config), run.config)
    state = Checkpoint(0, {})
    if trainable.resumable:
        state = checkpoint.initial(parameters)
        if run.checkpoint_file is not None and run.checkpoint_file.path.exists():
            state = run.checkpoint_file.read(parameters)
            checkpoint.restore(state, parameters, optimizer)
    return RunState(run, parameters, optimizer, state, state, trainable.resumable)


@contextlib.contextmanager
def _gradients_enabled(states: Iterable[RunState]) -> Iterator[None]:
    """Let the trained parameters have gradients inside; afterwards they are as frozen as before, without gradients."""
    parameters = list(itertools.chain(*(state.parameters.values() for state in states)))
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(False)


def _compare(trainable: Trainable, state: RunState) -> str:
    """The comparison of the next batch with the plainest way to compute it, where the settings ask for it."""
    run, step = state.run, state.current.step
    if run.config.equivalence == "off":
        return ""
    return trainable.check(run.batch(step, 0, run.micro_batches(step)[0]))


def _micro_batches(
    trainable: Trainable, steps: Mapping[str, RunStep], accelerator: Accelerator
) -> Iterator[list[RunBatch]]:
    """The batches of each forward pass of a step, one for each run that has a label in it."""
    for part in range(max(len(step.examples) for step in steps.values())):
        batches = [step.batch(trainable, part, accelerator) for step in steps.values()]
        with_labels = [batch for batch in batches if batch is not None]
        if with_labels:
            yield with_labels


def _count_labels(trainable: Trainable, run: str, examples: Sequence[EncodedExample]) -> int:
    return sum(trainable.label_count(run, example) for example in examples)


def _validate(state: RunState, accelerator: Accelerator) -> float | None:
    """The validation score after a step, where one is due: the first process's, so that all choose and stop alike."""
    run, step = state.run, state.current.step + 1
    if run.validate is None or not run.config.eval_steps or step % run.config.eval_steps:
        return None
    score = run.validate()
    if accelerator.num_processes == 1:
        return score
    return float(broadcast(torch.tensor(score, dtype=torch.float64, device=accelerator.device), from_process=0))


def _save(states: Iterable[RunState], accelerator: Accelerator) -> None:
    """Write the checkpoints of all runs as one."""
    if not accelerator.is_main_process:
        return
    checkpoints = []
    for state in states:
        if state.resumable and state.run.checkpoint_file is not None:
            checkpoints.append((state.run.checkpoint_file, state.current))
    checkpoint.write(checkpoints)


def _log_undefined_scores(states: Mapping[str, RunState]) -> None:
    """Show, through Python's logging, which runs have no best state."""
    for name, state in states.items():
        note = "" if state.current.failed else checkpoint.undefined_scores(state.current.history)
        if note:
            logging.getLogger("softprompts").warning(f"run '{name}': {note}" if name else note)


def _raise_failures(states: Mapping[str, RunState]) -> None:
    """Raise TrainingError with the messages of the runs whose loss was not finite."""
    failed = {name: state.current.failed for name, state in states.items() if state.current.failed}
    lines = [f"run '{name}': {message}" if name else message for name, message in failed.items()]
    if failed:
        raise TrainingError("; ".join(lines), failed)
