"""What training goes on from: the state of a run after a step, in a file that is always whole.

Runs that train together also write together: after a crash either all of them stand at the new state or all at the
old one, so that going on has the same rows in the same batches.
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from softprompts.artifacts.io import read_tensors, write_tensors
from softprompts.backbone import Backbone
from softprompts.backbone.devices import chip_name
from softprompts.data import EncodedExample
from softprompts.errors import TrainingError

CHECKPOINT = "checkpoint.safetensors"
STAGED = "checkpoint.next.safetensors"
"""A checkpoint that waits until those of all runs of the batch are written."""


@dataclass(frozen=True)
class Progress:
    """One step: mean loss over its labels, the prompt's rate, rms(P)/rms(E), tokens read and seconds taken.

    rate: of the weights, and no rms_ratio, where weights are trained and no prompt; tokens: of this run's own rows;
    seconds: of the step, which runs that train together share; score: the validation score, where one was due; path:
    how the prompt was computed (packed, shared, or why not); parity: what comparing the first batch with plain
    concatenation found, where that was asked for; machine: what it was computed with, at the first step and wherever
    that changed; measures: the single numbers that the method's prompts of the last part carry (`Prompt.aux`).
    """

    step: int
    steps: int
    loss: float
    rate: float
    rms_ratio: float | None
    tokens: int
    seconds: float
    score: float | None = None
    path: str = ""
    parity: str = ""
    machine: str = ""
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """All that changes during training: parameters, optimizer state and best parameters by name, and the history.

    failed: why the run cannot go on from here; empty where it can.
    """

    step: int
    tensors: dict[str, Tensor] = field(repr=False)
    best: float | None = None
    best_step: int = 0
    history: tuple[Progress, ...] = ()
    failed: str = ""


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint's place, and what must be the same for going on from it."""

    file: Path
    fixed: Mapping[str, Any]


def machine_of(backbone: Backbone) -> dict[str, Any]:
    """What steps are computed with: device, number format, threads, kernels.

    Other kernels give other rounding, so only steps with the same of all these are repeatable to the bit.
    """
    dtype = str(backbone.dtype).removeprefix("torch.")
    facts = {"device": str(backbone.device), "chip": chip_name(backbone.device), "dtype": dtype}
    return {**facts, "threads": torch.get_num_threads(), "kernels": asdict(backbone.kernels)}


def machine_line(backbone: Backbone) -> str:
    """The same in one line, as reports have it."""
    facts = machine_of(backbone)
    flat = {**{name: value for name, value in facts.items() if name != "kernels"}, **facts["kernels"]}
    return ", ".join(f"{name} {value}" for name, value in flat.items())


def place(
    directory: str | Path | None, rows: Sequence[EncodedExample], seed: int, settings: Mapping[str, Any] | None
) -> CheckpointFile | None:
    """Where the checkpoint of a run with these rows, seed and settings lies; None without a directory."""
    if directory is None:
        return None
    # Through JSON, because that is how the values come back.
    fixed = json.loads(json.dumps({"seed": seed, "rows": len(rows), **(settings or {})}))
    return CheckpointFile(Path(directory) / CHECKPOINT, fixed)


def capture(
    before: Checkpoint | None, parameters: Mapping[str, nn.Parameter], optimizer: Any, report: Progress | None = None
) -> Checkpoint:
    """The state after a step, as copies."""
    tensors = {name: value.detach().clone() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, part in optimizer.state.get(value, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(part).detach().clone()
    if before is None or report is None:
        return Checkpoint(0, tensors)
    best, best_step = before.best, before.best_step
    if report.score is not None and (best is None or report.score > best):
        best, best_step = report.score, report.step
        tensors |= {f"best.{name}": value.detach().clone() for name, value in parameters.items()}
    else:
        tensors |= {name: value for name, value in before.tensors.items() if name.startswith("best.")}
    return Checkpoint(report.step, tensors, best, best_step, (*before.history, report))


def restore(state: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Put a checkpoint's values into the parameters and the optimizer."""
    optimizer.state.clear()
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(state.tensors[name])
        prefix = f"optimizer.{name}."
        for key, value in state.tensors.items():
            if key.startswith(prefix):
                kept = value.clone().to(parameter.device if value.dim() else value.device)
                # AdamW counts steps in a tensor, Adafactor in plain numbers.
                plain = isinstance(optimizer, Adafactor) and value.dim() == 0
                optimizer.state[parameter][key.removeprefix(prefix)] = kept.item() if plain else kept


def check_checkpoint(
    directory: str | Path, rows: Sequence[EncodedExample], seed: int, settings: Mapping[str, Any] | None = None
) -> None:
    """Raise TrainingError when a checkpoint in `directory` belongs to other settings than those given to `fit`."""
    found = place(directory, rows, seed, settings)
    if found is not None and found.file.exists():
        read(found)


def write(states: Sequence[tuple[CheckpointFile, Checkpoint]]) -> None:
    """Write the checkpoints as one: none takes its place before all are safely on the disk."""
    token = secrets.token_hex(8)
    for where, state in states:
        facts: dict[str, Any] = {
            "step": state.step,
            "best": state.best,
            "best_step": state.best_step,
            "settings": where.fixed,
        }
        facts |= {"failed": state.failed, "token": token}
        history = json.dumps([asdict(report) for report in state.history])
        where.file.parent.mkdir(parents=True, exist_ok=True)
        file = where.file if len(states) == 1 else where.file.with_name(STAGED)
        write_tensors(file, state.tensors, {"facts": json.dumps(facts), "history": history})
    for where, _ in states if len(states) > 1 else ():
        _put(where.file.with_name(STAGED), where.file)


def recover(files: Sequence[Path]) -> None:
    """Finish, or undo, a joint write that was cut: staged checkpoints count once one of them has taken its place."""
    staged = [file.with_name(STAGED) for file in files]
    if not any(file.exists() for file in staged):
        return
    done = {_facts(file).get("token") for file in files if file.exists()}
    for file, waiting in zip(files, staged, strict=True):
        if waiting.exists() and _facts(waiting).get("token") in done:
            _put(waiting, file)
        else:
            waiting.unlink(missing_ok=True)


def read(where: CheckpointFile) -> Checkpoint:
    """The checkpoint that lies there.

    Raises TrainingError, naming what differs, when it belongs to a run with other settings.
    """
    tensors, metadata = read_tensors(where.file)
    facts = json.loads(metadata["facts"])
    changed = _differences(facts["settings"], where.fixed)
    if changed:
        raise TrainingError(
            f"{where.file} belongs to a run with other settings ({'; '.join(changed[:4])}); "
            f"choose another output directory, or delete the file to start anew"
        )
    history = tuple(Progress(**report) for report in json.loads(metadata["history"]))
    failed = facts.get("failed", "")
    return Checkpoint(facts["step"], tensors, facts["best"], facts["best_step"], history, failed)


def _put(staged: Path, file: Path) -> None:
    os.replace(staged, file)


def _facts(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_tensors(file)[1]["facts"])
    return found


def _differences(saved: Any, given: Any, where: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(given, dict):
        keys = sorted(saved.keys() | given.keys())
        return [d for key in keys for d in _differences(saved.get(key), given.get(key), f"{where}.{key}".strip("."))]
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        return [
            d for i, (a, b) in enumerate(zip(saved, given, strict=True)) for d in _differences(a, b, f"{where}.{i}")
        ]
    return [] if saved == given else [f"{where} was {saved}, is now {given}"]
