"""Training: `fit` is a generator that yields one Report a step; resuming is `fit` with the same directory.

Every choice of a step (its rows, its rate, its random stream) is a function of the seed and the step's number, so a
checkpoint holds tensors and a few numbers, and a killed run goes on bit for bit.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.optimization import Adafactor

from softprompts import objectives
from softprompts.config import ConfigError, TrainConfig
from softprompts.data import Encoded, collate, order
from softprompts.files import read_tensors, write_tensors
from softprompts.learner import Learner
from softprompts.prompt import IGNORE, Objective

CHECKPOINT = "checkpoint.safetensors"


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says what was kept and what to change."""


@dataclass(frozen=True)
class Report:
    """One step: mean loss over its labels, the prompt's rate, rms(P)/rms(E), tokens read and seconds taken.

    score: the validation score, where one was due; path: how the prompt was computed (shared, or why not).
    """

    step: int
    steps: int
    loss: float
    rate: float
    rms_ratio: float
    tokens: int
    seconds: float
    score: float | None = None
    path: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """All that changes during training: parameters, optimiser state and best parameters by name, and the history."""

    step: int
    tensors: dict[str, Tensor]
    best: float | None = None
    best_step: int = 0
    history: tuple[Report, ...] = ()


class _UnfactoredAdafactor(Adafactor):
    """Adafactor that keeps the full second moment, as the code of Lester et al. does for prompts."""

    @staticmethod
    def _get_options(param_group: Mapping[str, Any], param_shape: Sequence[int]) -> tuple[bool, bool]:
        return False, param_group["beta1"] is not None


def fit(
    learner: Learner,
    rows: Sequence[Encoded],
    config: TrainConfig,
    *,
    pad: int,
    seed: int = 0,
    validate: Callable[[], float] | None = None,
    directory: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Generator[Report, None, None]:
    """Train the learner's parameters in place on `rows`, one Report a step; afterwards they are the best ones.

    validate: a score (higher is better), asked every `config.evaluate_every` steps, that chooses the best checkpoint
    and stops early; directory: where checkpoints go, and where training goes on from if one is there; settings: what
    must be the same for going on. Reports of steps done before a resume come first, so a history is always whole.
    Raises TrainingError when the loss stops being a number (the last good state is saved) and when a checkpoint
    belongs to other settings; ConfigError when there is nothing to train on.
    """
    if not rows:
        raise ConfigError("there are no rows to train on; check the task's source and split")
    accelerator = Accelerator(cpu=learner.backbone.device.type == "cpu")
    parameters, objective = learner.parameters(), objectives.weigh(config.objectives)
    optimiser = _optimiser(learner, parameters, config)
    batches = _Batches(rows, config.batch_size, seed)
    file = None if directory is None else Path(directory) / CHECKPOINT
    fixed = _fixed(rows, seed, settings)
    if file is not None and file.exists():
        now = _read(file, fixed)
        _apply(now, parameters, optimiser)
        yield from now.history
    else:
        now = _capture(None, parameters, optimiser)
    good = now
    try:
        while now.step < config.steps and not _patience_spent(now, config):
            began = time.perf_counter()
            torch.manual_seed(seed * 1_000_003 + now.step)
            parts = [batches.at(now.step * config.accumulate + i) for i in range(config.accumulate)]
            loss, tokens, path = _gradients(learner, objective, parts, parameters, pad, accelerator)
            norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), config.clip or math.inf))
            if not math.isfinite(loss + norm):
                _apply(good, parameters, optimiser)
                _write(file, good, fixed, accelerator)
                raise TrainingError(_diverged(now.step + 1, good.step, config, file))
            good = now  # its loss is a number, which the values made by this step have yet to show
            rate = _set_rates(optimiser, config, now.step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            due = validate is not None and config.evaluate_every and (now.step + 1) % config.evaluate_every == 0
            score = validate() if validate is not None and due else None
            seconds = time.perf_counter() - began
            ratio = _rms_ratio(learner)
            report = Report(now.step + 1, config.steps, loss, rate, ratio, tokens, seconds, score, path)
            now = _capture(now, parameters, optimiser, report)
            if now.step % config.checkpoint_every == 0 or now.step == config.steps:
                _write(file, now, fixed, accelerator)
            yield report
    except (KeyboardInterrupt, GeneratorExit):
        _write(file, now, fixed, accelerator)
        raise
    _write(file, now, fixed, accelerator)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(now.tensors.get(f"best.{name}", parameter))


def check_checkpoint(
    directory: str | Path, rows: Sequence[Encoded], seed: int, settings: Mapping[str, Any] | None = None
) -> None:
    """Raise TrainingError when a checkpoint in `directory` belongs to other settings than those given to `fit`."""
    file = Path(directory) / CHECKPOINT
    if file.exists():
        _read(file, _fixed(rows, seed, settings))


def _fixed(rows: Sequence[Encoded], seed: int, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """What must be the same for going on, as JSON would give it back."""
    fixed: dict[str, Any] = json.loads(json.dumps({"seed": seed, "rows": len(rows), **(settings or {})}))
    return fixed


class _Batches:
    """The rows of every micro-batch, as a pure function of its number."""

    def __init__(self, rows: Sequence[Encoded], size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, size, seed
        self.lengths = [len(row.ids) for row in rows]
        self.count = -(-len(rows) // size)
        self.epoch, self.order = -1, [[0]]

    def at(self, number: int) -> list[Encoded]:
        epoch, index = divmod(number, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, order(self.lengths, self.size, self.seed, epoch)
        return [self.rows[i] for i in self.order[index]]


def _gradients(
    learner: Learner,
    objective: Objective,
    parts: Sequence[Sequence[Encoded]],
    parameters: Mapping[str, nn.Parameter],
    pad: int,
    accelerator: Accelerator,
) -> tuple[float, int, str]:
    """Fill the gradients of the mean loss over all labels of `parts`; returns the loss, tokens read and the path.

    Each part counts with its share of the labels, so accumulation and several processes equal one large batch.
    """
    total = sum(_labels(row) for part in parts for row in part)
    if total == 0:
        raise TrainingError("a batch holds no label to learn from; check the template and the label column")
    loss, tokens, path = torch.zeros((), device=learner.backbone.device), 0, ""
    for part in parts:
        mine = list(part)[accelerator.process_index :: accelerator.num_processes]
        tokens += sum(len(row.ids) for row in part)
        share = sum(_labels(row) for row in mine) / total
        if share == 0:
            continue
        step = learner.step(collate(mine, pad).to(learner.backbone.device))
        value = objective(step) * share
        value.backward()
        loss, path = loss + value.detach(), step.output.path
    for parameter in parameters.values():
        if parameter.grad is not None and accelerator.num_processes > 1:
            parameter.grad = accelerator.reduce(parameter.grad, "sum")
    return float(accelerator.reduce(loss, "sum")), tokens, path


def _labels(row: Encoded) -> int:
    """How many labels of a row count: its scored tokens, or one where the row has a single label."""
    if not isinstance(row.labels, list | tuple) or not all(isinstance(x, int) for x in row.labels):
        return 1
    return sum(label != IGNORE for label in row.labels)


def _optimiser(learner: Learner, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> Any:
    unit = learner.backbone.rms if config.rate_unit == "rms" else 1.0
    groups = []
    for prefix, rate in (("method.", config.rate * unit), ("head.", config.head_rate)):
        chosen = [p for name, p in parameters.items() if name.startswith(prefix)]
        if chosen:
            groups.append({"params": chosen, "lr": rate, "rate": rate})
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return _UnfactoredAdafactor(
        groups, lr=config.rate, weight_decay=config.weight_decay, scale_parameter=False, relative_step=False
    )


def _set_rates(optimiser: Any, config: TrainConfig, step: int) -> float:
    """Set every group's rate for `step` (counted from 0) and return the first, the prompt's."""
    factor = 1.0
    if step < config.warmup:
        factor = (step + 1) / config.warmup
    elif config.schedule != "constant":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        factor = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    for group in optimiser.param_groups:
        group["lr"] = group["rate"] * factor
    return float(optimiser.param_groups[0]["lr"])


def _rms_ratio(learner: Learner) -> float:
    """rms(P)/rms(E) over the prompts of all tasks."""
    prompts = torch.stack([learner.method.fold(task) for task in learner.slot.tasks])
    return float(prompts.square().mean().sqrt()) / learner.backbone.rms


def _patience_spent(now: Checkpoint, config: TrainConfig) -> bool:
    if config.patience is None or config.evaluate_every is None or now.best is None:
        return False
    return now.step - now.best_step >= config.patience * config.evaluate_every


def _capture(
    before: Checkpoint | None, parameters: Mapping[str, nn.Parameter], optimiser: Any, report: Report | None = None
) -> Checkpoint:
    """The state after a step, as copies."""
    tensors = {name: value.detach().clone() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, part in optimiser.state.get(value, {}).items():
            tensors[f"optimiser.{name}.{key}"] = torch.as_tensor(part).detach().clone()
    if before is None or report is None:
        return Checkpoint(0, tensors)
    best, best_step = before.best, before.best_step
    if report.score is not None and (best is None or report.score > best):
        best, best_step = report.score, report.step
        tensors |= {f"best.{name}": value.detach().clone() for name, value in parameters.items()}
    else:
        tensors |= {name: value for name, value in before.tensors.items() if name.startswith("best.")}
    return Checkpoint(report.step, tensors, best, best_step, (*before.history, report))


def _apply(state: Checkpoint, parameters: Mapping[str, nn.Parameter], optimiser: Any) -> None:
    """Put a checkpoint's values into the parameters and the optimiser."""
    optimiser.state.clear()
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(state.tensors[name])
        prefix = f"optimiser.{name}."
        for key, value in state.tensors.items():
            if key.startswith(prefix):
                kept = value.clone().to(parameter.device if value.dim() else value.device)
                # AdamW counts steps in a tensor, Adafactor in plain numbers.
                plain = isinstance(optimiser, Adafactor) and value.dim() == 0
                optimiser.state[parameter][key.removeprefix(prefix)] = kept.item() if plain else kept


def _write(file: Path | None, state: Checkpoint, fixed: Mapping[str, Any], accelerator: Accelerator) -> None:
    if file is None or not accelerator.is_main_process:
        return
    facts = {"step": state.step, "best": state.best, "best_step": state.best_step, "settings": fixed}
    history = json.dumps([asdict(report) for report in state.history])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, state.tensors, {"facts": json.dumps(facts), "history": history})


def _read(file: Path, fixed: Mapping[str, Any]) -> Checkpoint:
    tensors, metadata = read_tensors(file)
    facts = json.loads(metadata["facts"])
    changed = _differences(facts["settings"], fixed)
    if changed:
        raise TrainingError(
            f"{file} belongs to a run with other settings ({'; '.join(changed[:4])}); "
            f"choose another output directory, or delete the file to start anew"
        )
    history = tuple(Report(**report) for report in json.loads(metadata["history"]))
    return Checkpoint(facts["step"], tensors, facts["best"], facts["best_step"], history)


def _differences(saved: Any, given: Any, where: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(given, dict):
        keys = sorted(saved.keys() | given.keys())
        return [d for key in keys for d in _differences(saved.get(key), given.get(key), f"{where}.{key}".strip("."))]
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        return [
            d for i, (a, b) in enumerate(zip(saved, given, strict=True)) for d in _differences(a, b, f"{where}.{i}")
        ]
    return [] if saved == given else [f"{where} was {saved}, is now {given}"]


def _diverged(step: int, good: int, config: TrainConfig, file: Path | None) -> str:
    kept = f"the state after step {good} is kept in {file}" if file else f"the state after step {good} is kept"
    return (
        f"the loss of step {step} is not a number; {kept}. Try a lower rate (train.rate was {config.rate:g} "
        f"{config.rate_unit}) or gradient clipping (train.clip), in another output directory or with that file deleted"
    )
