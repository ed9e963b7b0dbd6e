"""Training: `fit` is a generator that yields one Report a step; resuming is `fit` with the same directory.

Every choice of a step (its rows, its rate, its random stream) is a function of the seed and the step's number, so a
checkpoint holds tensors and a few numbers, and a killed run goes on bit for bit. `fit_together` trains several runs in
the same frozen batch, `fit` is its case of one run.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from accelerate.utils.environment import get_cpu_distributed_information
from torch import Tensor, nn

from softprompts.config import TrainConfig
from softprompts.data import EncodedExample, ExampleBatches, TaskBatches
from softprompts.errors import ConfigError, TrainingError
from softprompts.injection import Site
from softprompts.model import SoftPromptModel
from softprompts.training import checkpoint, equivalence, objectives
from softprompts.training.checkpoint import CHECKPOINT, Checkpoint, CheckpointFile, Progress, check_checkpoint
from softprompts.training.distillation import TeacherOutputs
from softprompts.training.optimizer import build_optimizer, set_rates
from softprompts.training.shared_batch import check_together, joint_steps, label_count, task_batch
from softprompts.types import Objective

__all__ = [
    "CHECKPOINT",
    "Progress",
    "TrainingRun",
    "check_checkpoint",
    "fit",
    "is_main_process",
    "train_many",
]


@dataclass(frozen=True)
class TrainingRun:
    """One run: which prompts of a model are trained on which rows and how, and where its checkpoints go; see `fit`.

    prompts: in the order that the rows' task numbers count; a checkpoint knows each by what follows its last slash.
    targets: what the teachers make of the rows, for the objectives that compare with them.
    """

    name: str
    model: SoftPromptModel
    prompts: tuple[str, ...]
    rows: Sequence[EncodedExample]
    config: TrainConfig
    seed: int = 0
    validate: Callable[[], float] | None = None
    directory: str | Path | None = None
    settings: Mapping[str, Any] | None = None
    targets: TeacherOutputs | None = None

    @property
    def site(self) -> Site:
        """Where the prompts enter."""
        return self.model.registry.site_of(self.prompts)

    def label_count(self, row: EncodedExample) -> int:
        """How many labels of a row count in its loss."""
        return label_count(row, self.model.backbone, self.site)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names that it would have in a model of this run alone."""
        return self.model.trainable({name: name.rpartition("/")[2] for name in self.prompts})


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints: the first of those that a launcher started."""
    return bool(get_cpu_distributed_information().rank == 0)


def fit(
    model: SoftPromptModel,
    rows: Sequence[EncodedExample],
    config: TrainConfig,
    *,
    pad: int,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
    directory: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    targets: TeacherOutputs | None = None,
) -> Generator[Progress, None, None]:
    """Train prompts of `model` in place on `rows`, one report a step; afterwards they are the best ones.

    prompts: in the order that the rows' task numbers count; None: all. validate: a score (higher is better), asked
    every `config.eval_steps` steps, that chooses the best checkpoint and stops early; directory: where checkpoints go,
    and where training resumes if one is there; settings: what must be the same for resuming; targets: as of a
    TrainingRun. Reports of steps done before a resume come first, so a history is always whole.
    Raises TrainingError when the loss stops being a number (the last good state is saved) and when a checkpoint
    belongs to other settings; ConfigError when there is nothing to train on.
    """
    names = model.tasks if prompts is None else tuple(prompts)
    one = TrainingRun("", model, names, rows, config, seed, validate, directory, settings, targets)
    with closing(train_many([one], pad=pad)) as steps:
        for _, report in steps:
            yield report


def train_many(trainees: Sequence[TrainingRun], *, pad: int) -> Generator[tuple[str, Progress], None, None]:
    """Train several runs in the same batches of their one frozen backbone; gives (name, Report) of each step of each.

    Each run is the run it would be alone, up to rounding: its own rows, optimizer, schedule, clipping, validation,
    random stream and checkpoints. A run that is done, or stops early, leaves the batch. One whose loss stops being a
    number leaves it too, and TrainingError tells so after the others are done (`failed`: the message of each).
    Raises ConfigError for runs without rows, or that cannot share a batch; else as `fit`.
    """
    courses, accelerator = _begin(trainees)
    states = {course.trainee.name: _resumed(course) for course in courses}
    for name, state in states.items():
        for report in state.now.history:
            yield name, report
    going: Sequence[_Course] = ()
    try:
        found = {
            c.trainee.name: _compared(c, states[c.trainee.name].now.step, pad) for c in courses if c.goes_on(states)
        }
        while going := [course for course in courses if course.goes_on(states)]:
            began = time.perf_counter()
            measured = _gradients(going, [states[c.trainee.name].now.step for c in going], pad, accelerator)
            spent = time.perf_counter() - began
            # All at once, so that an interrupt finds every run at the same step.
            states = {**states, **_updated(going, states, measured, spent, accelerator, found)}
            found = {}
            ended = [course for course in going if not course.goes_on(states)]
            if ended or any(states[c.trainee.name].due(c) for c in going):
                _save(going, states, accelerator)
            for course in going:
                if not states[course.trainee.name].now.failed:
                    yield course.trainee.name, states[course.trainee.name].now.history[-1]
    except (KeyboardInterrupt, GeneratorExit):
        _save(going, states, accelerator)
        raise
    _save([c for c in courses if c.written is not None and not c.written.file.exists()], states, accelerator)
    for course in courses:
        course.keep_best(states)
    failed = {name: state.now.failed for name, state in states.items() if state.now.failed}
    if failed:
        lines = [f"run '{name}': {message}" if name else message for name, message in failed.items()]
        raise TrainingError("; ".join(lines), failed)


@dataclass(frozen=True)
class _Measured:
    """Loss, tokens and path of a step, the method's own figures, the prompts' rms; `failed` where no label was."""

    loss: float
    tokens: int
    path: str
    measures: dict[str, float]
    rms: float
    failed: str = ""


@dataclass(frozen=True)
class _State:
    """A run after its last step, and the last state whose loss is known to be a number."""

    now: Checkpoint
    good: Checkpoint

    def due(self, course: "_Course") -> bool:
        return self.now.step % course.trainee.config.save_steps == 0


@dataclass(frozen=True)
class _Course:
    """A trainee on its way: what its steps need besides its state."""

    trainee: TrainingRun
    parameters: dict[str, nn.Parameter]
    objective: Objective
    optimizer: Any
    batches: ExampleBatches | TaskBatches
    written: CheckpointFile | None

    def goes_on(self, states: Mapping[str, _State]) -> bool:
        now, config = states[self.trainee.name].now, self.trainee.config
        return not now.failed and now.step < config.max_steps and not _patience_spent(now, config)

    def keep_best(self, states: Mapping[str, _State]) -> None:
        """Leave the best parameters in place; those of a run that failed are its last good ones."""
        state = states[self.trainee.name].now
        with torch.no_grad():
            for name, parameter in self.parameters.items() if not state.failed else ():
                parameter.copy_(state.tensors.get(f"best.{name}", parameter))


def _begin(trainees: Sequence[TrainingRun]) -> tuple[list[_Course], Accelerator]:
    names = [trainee.name for trainee in trainees]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"runs that train together need names that differ, given {', '.join(names) or 'no run'}")
    for trainee in trainees:
        if not trainee.rows:
            which = f"run '{trainee.name}' has" if trainee.name else "there are"
            raise ConfigError(f"{which} no rows to train on; check the task's source and split")
    check_together([(trainee.model, trainee.prompts) for trainee in trainees], names)
    # One process has no use for accelerate's device, which is fixed by the first run and may be another one's.
    several = get_cpu_distributed_information().world_size > 1
    accelerator = Accelerator(cpu=several and trainees[0].model.device.type == "cpu")
    courses = []
    for one in trainees:
        parameters = one.parameters()
        groups = one.model.registry.method(one.prompts[0]).groups
        optimizer = build_optimizer(groups, parameters, one.config, one.model.backbone.embedding_rms)
        batches = _batches(one)
        written = checkpoint.place(one.directory, one.rows, one.seed, one.settings)
        courses.append(_Course(one, parameters, objectives.weigh(one.config.objectives), optimizer, batches, written))
    if accelerator.is_main_process:
        checkpoint.recover([course.written.file for course in courses if course.written is not None])
    accelerator.wait_for_everyone()
    return courses, accelerator


def _batches(one: TrainingRun) -> ExampleBatches | TaskBatches:
    if one.config.sampling.draw == "rows":
        return ExampleBatches(one.rows, one.config.batch_size, one.seed, one.config.batch_tokens)
    return TaskBatches(one.rows, one.config.batch_size, one.seed, one.config.sampling)


def _resumed(course: _Course) -> _State:
    """The state of the run's checkpoint, put in place, or that of a run that has not begun."""
    if course.written is not None and course.written.file.exists():
        now = checkpoint.read(course.written)
        checkpoint.restore(now, course.parameters, course.optimizer)
    else:
        now = checkpoint.capture(None, course.parameters, course.optimizer)
    return _State(now, now)


def _save(courses: Sequence[_Course], states: Mapping[str, _State], accelerator: Accelerator) -> None:
    """Write the checkpoints of all `courses` as one."""
    if accelerator.is_main_process:
        checkpoint.write([(c.written, states[c.trainee.name].now) for c in courses if c.written is not None])


def _compared(course: _Course, step: int, pad: int) -> str:
    """What the comparison of the next batch with plain concatenation found, where it is asked for.

    Raises TrainingError when the two differ by more than rounding.
    """
    one = course.trainee
    if one.config.equivalence == "off":
        return ""
    rows, device = course.batches.at(step * one.config.gradient_accumulation_steps), one.model.device
    batch, teacher = (
        task_batch(one.model, one.prompts, rows, pad).to(device),
        None if one.targets is None else one.targets.of(rows, device),
    )
    found = equivalence.compare(one.model, batch, course.objective, teacher, one.prompts)
    if not found.holds:
        raise TrainingError(
            f"the next batch does not come out as by plain concatenation: {found}. No step was made; set "
            f"model.attention to eager and model.matmul_backend to torch, and please report the model"
        )
    return str(found)


def _gradients(going: Sequence[_Course], steps: Sequence[int], pad: int, accelerator: Accelerator) -> list[_Measured]:
    """Fill each run's gradients of its mean loss over all labels of its step, with one pass a part for all runs.

    Each part counts with its share of the labels, so accumulation and several processes equal one large batch.
    """
    model = going[0].trainee.model
    backbone = model.backbone
    zero = torch.zeros((), device=backbone.device, dtype=torch.promote_types(backbone.dtype, torch.float32))
    parts, totals, losses, paths = [], [], [zero] * len(going), [""] * len(going)
    measures: list[dict[str, float]] = [{}] * len(going)
    sizes = [0.0] * len(going)
    for course, step in zip(going, steps, strict=True):
        course.optimizer.zero_grad(set_to_none=True)
        count = course.trainee.config.gradient_accumulation_steps
        parts.append([course.batches.at(step * count + i) for i in range(count)])
        totals.append(sum(course.trainee.label_count(row) for part in parts[-1] for row in part))
    for number in range(max(map(len, parts))):
        mine, labels = [], []
        for course, own in zip(going, parts, strict=True):
            part = own[number] if number < len(own) else []
            mine.append(part[accelerator.process_index :: accelerator.num_processes])
            labels.append(sum(course.trainee.label_count(row) for row in mine[-1]))
        here = [i for i, found in enumerate(labels) if found]
        if not here:
            continue
        seeds = [_stream(going[i].trainee.seed, steps[i], 2 * number) for i in here]
        trainees = [going[i].trainee for i in here]
        targets = [trainee.targets for trainee in trainees]
        found = joint_steps(model, [one.prompts for one in trainees], [mine[i] for i in here], seeds, pad, targets)
        values = []
        for i, made in zip(here, found, strict=True):
            torch.manual_seed(_stream(going[i].trainee.seed, steps[i], 2 * number + 1))
            values.append(going[i].objective(made).to(zero.dtype) * (labels[i] / totals[i]))
            losses[i], paths[i] = losses[i] + values[-1].detach(), made.output.path
            sizes[i] = float(made.prompt.values.detach()[made.prompt.mask.bool()].square().mean().sqrt())
            measures[i] = {name: float(value) for name, value in made.prompt.aux.items() if value.dim() == 0}
        torch.stack(values).sum().backward()
    tokens = [sum(len(row.input_ids) for part in own for row in part) for own in parts]
    none = "a batch holds no label to learn from; check the template and the label column"
    return [
        _Measured(_summed(course, loss, accelerator), count, path, said, size, "" if total else none)
        for course, loss, count, path, said, size, total in zip(
            going, losses, tokens, paths, measures, sizes, totals, strict=True
        )
    ]


def _stream(seed: int, step: int, draw: int) -> int:
    """The seed of a random stream: methods and objectives of each part draw from their own, whoever else trains."""
    return (seed * 1_000_003 + step + (draw << 40)) % 2**63


def _summed(course: _Course, loss: Tensor, accelerator: Accelerator) -> float:
    """Sum the gradients and the loss over all processes; what has no gradient in any of them keeps none."""
    if accelerator.num_processes > 1:
        every = list(course.parameters.values())
        there = loss.new_tensor([parameter.grad is not None for parameter in every])
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in every]
        loss, there, *gradients = accelerator.reduce([loss, there, *own], "sum")
        for parameter, count, gradient in zip(every, there.tolist(), gradients, strict=True):
            parameter.grad = gradient if count else None
    return float(loss)


def _updated(
    going: Sequence[_Course],
    states: Mapping[str, _State],
    measured: Sequence[_Measured],
    spent: float,
    accelerator: Accelerator,
    compared: Mapping[str, str],
) -> dict[str, _State]:
    """The states after each run has made its step with its gradients."""
    found = {}
    for course, one in zip(going, measured, strict=True):
        name = course.trainee.name
        found[name] = _update(course, states[name], one, spent, accelerator, compared.get(name, ""))
    return found


def _update(
    course: _Course, state: _State, measured: _Measured, spent: float, accelerator: Accelerator, compared: str
) -> _State:
    """The run's state after one optimizer step, or its last good one, put back, where the loss was not a number."""
    began, one, now = time.perf_counter(), course.trainee, state.now
    config, parameters, optimizer = one.config, course.parameters, course.optimizer
    norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), config.max_grad_norm or math.inf))
    if measured.failed or not math.isfinite(measured.loss + norm):
        checkpoint.restore(state.good, parameters, optimizer)
        optimizer.zero_grad(set_to_none=True)
        failed = measured.failed or _diverged(now.step + 1, state.good.step, config, course.written)
        return _State(replace(state.good, failed=failed), state.good)
    rate = set_rates(optimizer, config, now.step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    score = None
    if one.validate is not None and config.eval_steps and (now.step + 1) % config.eval_steps == 0:
        score = _agreed(one.validate(), accelerator)
    ratio = one.model.rms_ratio(one.prompts)
    if ratio is None:
        ratio = measured.rms / one.model.backbone.embedding_rms
    seconds = spent + time.perf_counter() - began
    loss, tokens, path = measured.loss, measured.tokens, measured.path
    machine = _machine_if_new(one.model, now)
    done, own = (now.step + 1, config.max_steps, loss, rate, ratio, tokens, seconds), measured.measures
    report = Progress(*done, score, path, compared, machine, own)
    # The state before this step is good: its loss is a number, which the values made by this step have yet to show.
    return _State(checkpoint.capture(now, parameters, optimizer, report), now)


def _machine_if_new(model: SoftPromptModel, now: Checkpoint) -> str:
    """What this step is computed with, where the last one was computed with something else; else an empty string."""
    before = next((report.machine for report in reversed(now.history) if report.machine), "")
    machine = checkpoint.machine_line(model.backbone)
    return "" if machine == before else machine


def _agreed(score: float, accelerator: Accelerator) -> float:
    """The first process's score, so that all choose and stop alike."""
    if accelerator.num_processes == 1:
        return score
    return float(broadcast(torch.tensor(score, dtype=torch.float64, device=accelerator.device), from_process=0))


def _patience_spent(now: Checkpoint, config: TrainConfig) -> bool:
    if config.early_stopping_patience is None or config.eval_steps is None or now.best is None:
        return False
    return now.step - now.best_step >= config.early_stopping_patience * config.eval_steps


def _diverged(step: int, good: int, config: TrainConfig, written: CheckpointFile | None) -> str:
    kept = (
        f"the state after step {good} is kept in {written.file}" if written else f"the state after step {good} is kept"
    )
    return (
        f"the loss of step {step} is not a number; {kept}. Try a lower rate (training.learning_rate was "
        f"{config.learning_rate:g} {config.learning_rate_unit}) or gradient clipping (training.max_grad_norm), in "
        "another output directory or with that file deleted"
    )
