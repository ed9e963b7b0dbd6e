"""Checkpoints: the state of a run after a step, in a file that is always whole.

Runs that share a batch write their checkpoints as one. After a crash all of them are at the same step, so a resumed
batch holds the same rows.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from softprompts.artifacts.fingerprint import tensor_bytes
from softprompts.artifacts.io import read_tensors, write_tensors
from softprompts.backbone import Backbone
from softprompts.backbone.devices import chip_name
from softprompts.config import TrainConfig
from softprompts.data.encoding import EncodedExample
from softprompts.errors import TrainingError
from softprompts.types import Progress

CHECKPOINT = "checkpoint.safetensors"

STAGED = "checkpoint.next.safetensors"
"""A checkpoint that waits until the checkpoints of all runs of the batch are on the disk."""

CHANGEABLE = {"save_steps", "lora", "save_model"}
"""Keys of `training` that may differ when a run is continued: runs that train weights write no checkpoints."""

SAMPLES = 256
"""The most numbers of each tensor of the backbone that its digest covers."""

SHOWN_CHARACTERS = 80
"""The longest value in a message about settings that differ."""

BEST = "best."
"""The prefix of the best parameters' names."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything of a run that training changes, as copies.

    Attributes:
        step: The number of steps that were made.
        tensors: Parameters by name, their optimizer state as `optimizer.NAME.KEY`, the best parameters as `best.NAME`.
        best: The best validation score so far; None without one that is a number.
        best_step: The step with that score.
        history: The progress of every step.
        failed: The reason why the run cannot be continued; empty where it can.
    """

    step: int
    tensors: dict[str, Tensor] = field(repr=False)
    best: float | None = None
    best_step: int = 0
    history: tuple[Progress, ...] = ()
    failed: str = ""


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint's file, and the settings that must be the same when a run is continued from it."""

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        directory: str | Path | None,
        examples: Sequence[EncodedExample],
        seed: int,
        settings: Mapping[str, Any] | None,
    ) -> "CheckpointFile | None":
        """The checkpoint file of a run with these examples, seed and settings; None without directory."""
        if directory is None:
            return None
        facts = {"seed": seed, "rows": len(examples), "examples": examples_digest(examples), **(settings or {})}
        # The settings come back from the file through JSON, so they go through JSON here too.
        return cls(Path(directory) / CHECKPOINT, json.loads(json.dumps(facts)))

    def read(self, parameters: Mapping[str, nn.Parameter] | None = None) -> Checkpoint:
        """Read the checkpoint.

        Args:
            parameters: The trained parameters by name, whose names and shapes those of the file must equal; None: they
                are not compared.

        Raises:
            TrainingError: The checkpoint belongs to a run with other settings or parameters; the message names them.
        """
        tensors, metadata = read_tensors(self.path)
        facts = json.loads(metadata["facts"])
        differences = _differences(facts["settings"], self.settings)
        if parameters is not None:
            differences += _differences(_shapes(tensors), _shapes(parameters))
        if differences:
            raise TrainingError(
                f"{self.path} belongs to a run with other settings ({'; '.join(differences[:4])}); "
                f"choose another output directory, or delete the file to start anew"
            )
        history = tuple(Progress(**progress) for progress in json.loads(metadata["history"]))
        failed = facts.get("failed", "")
        return Checkpoint(facts["step"], tensors, facts["best"], facts["best_step"], history, failed)


def training_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of training that must be the same when a run is continued."""
    settings: dict[str, Any] = config.model_dump(mode="json", exclude=CHANGEABLE)
    return settings


def examples_digest(examples: Sequence[EncodedExample]) -> str:
    """A digest of all fields of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(vars(example), default=str).encode())
    return digest.hexdigest()


def backbone_settings(backbone: Backbone) -> dict[str, Any]:
    """Name, dtype and a digest of a backbone's weights: up to `SAMPLES` numbers of each tensor, evenly spread."""
    digest = hashlib.sha256()
    for name, parameter in backbone.model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        if not parameter.is_meta:  # weights that accelerate keeps on the disk
            flat = parameter.detach().reshape(-1)
            digest.update(tensor_bytes(flat[:: max(1, len(flat) // SAMPLES)]))
    dtype = backbone.quantization or str(backbone.dtype).removeprefix("torch.")
    return {"name": backbone.name, "dtype": dtype, "weights": digest.hexdigest()}


def machine_of(backbone: Backbone) -> dict[str, Any]:
    """Device, dtype, threads and kernels of a backbone.

    Other kernels round otherwise, so only steps with equal facts are repeatable to the bit.
    """
    dtype = str(backbone.dtype).removeprefix("torch.")
    facts = {"device": str(backbone.device), "chip": chip_name(backbone.device), "dtype": dtype}
    return {**facts, "threads": torch.get_num_threads(), "kernels": asdict(backbone.kernels)}


def machine_line(backbone: Backbone) -> str:
    """The facts of `machine_of` in one line."""
    facts = machine_of(backbone)
    facts |= facts.pop("kernels")
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def initial(parameters: Mapping[str, nn.Parameter]) -> Checkpoint:
    """The state of a run that has not made a step."""
    return Checkpoint(0, copies(parameters))


def capture(
    previous: Checkpoint,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Any,
    resumable: bool = True,
) -> Checkpoint:
    """Copy the state of a run after a step.

    Args:
        previous: The state before the step.
        progress: The progress of the step. A validation score above all earlier ones makes these parameters the best.
        parameters: The trained parameters by name.
        optimizer: Their optimizer.
        resumable: Whether to copy the parameters and the optimizer's state; the best parameters are copied anyway.

    Returns:
        The state after the step.
    """
    tensors: dict[str, Tensor] = {}
    if resumable:
        tensors = copies(parameters)
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach().clone()
    best, best_step = previous.best, previous.best_step
    score = progress.score
    if score is not None and not math.isnan(score) and (best is None or score > best):
        best, best_step = score, progress.step
        tensors |= copies(parameters, BEST)
    else:
        tensors |= {name: value for name, value in previous.tensors.items() if name.startswith(BEST)}
    return Checkpoint(progress.step, tensors, best, best_step, (*previous.history, progress))


def restore(state: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Copy a checkpoint's values into the parameters and the optimizer."""
    optimizer.state.clear()
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(state.tensors[name])
        prefix = f"optimizer.{name}."
        for key, value in state.tensors.items():
            if not key.startswith(prefix):
                continue
            copy = value.clone().to(parameter.device if value.dim() else value.device)
            # AdamW counts steps in a tensor, Adafactor in a plain number.
            is_number = isinstance(optimizer, Adafactor) and value.dim() == 0
            optimizer.state[parameter][key.removeprefix(prefix)] = copy.item() if is_number else copy


def restore_best(state: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the best parameters into the parameters; without a validation score these stay as they are."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.tensors.get(f"{BEST}{name}", parameter))


def undefined_scores(history: Sequence[Progress]) -> str:
    """A note that no validation score was a number; empty where one was, and without validation."""
    scores = [progress.score for progress in history if progress.score is not None]
    if not scores or not all(map(math.isnan, scores)):
        return ""
    return f"no validation score is a number, so none is the best; the state after step {history[-1].step} is kept"


def write(checkpoints: Sequence[tuple[CheckpointFile, Checkpoint]]) -> None:
    """Write checkpoints as one: none replaces its predecessor before all are on the disk."""
    token = secrets.token_hex(8)
    for file, state in checkpoints:
        facts: dict[str, Any] = {"step": state.step, "best": state.best, "best_step": state.best_step}
        facts |= {"settings": file.settings, "failed": state.failed, "token": token}
        history = json.dumps(list(map(asdict, state.history)))
        file.path.parent.mkdir(parents=True, exist_ok=True)
        path = file.path if len(checkpoints) == 1 else file.path.with_name(STAGED)
        write_tensors(path, state.tensors, {"facts": json.dumps(facts), "history": history})
    if len(checkpoints) > 1:
        for file, _ in checkpoints:
            _rename(file.path.with_name(STAGED), file.path)


def recover(paths: Sequence[Path]) -> None:
    """Finish or undo a joint write that was cut.

    The staged checkpoints of a write count once one of them has replaced its predecessor; else they are deleted.
    """
    staged = [path.with_name(STAGED) for path in paths]
    if not any(map(Path.exists, staged)):
        return
    tokens = {_facts(path).get("token") for path in paths if path.exists()}
    for path, waiting in zip(paths, staged, strict=True):
        if waiting.exists() and _facts(waiting).get("token") in tokens:
            _rename(waiting, path)
        else:
            waiting.unlink(missing_ok=True)


def copies(parameters: Mapping[str, nn.Parameter], prefix: str = "") -> dict[str, Tensor]:
    """Copies of parameters, without their graph; `prefix` begins the names."""
    return {f"{prefix}{name}": value.detach().clone() for name, value in parameters.items()}


def _rename(staged: Path, path: Path) -> None:
    os.replace(staged, path)


def _facts(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(read_tensors(path)[1]["facts"])
    return facts


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The shapes of parameters by name, without those of the optimizer's state and the best parameters."""
    shapes = {}
    for name, tensor in tensors.items():
        if not name.startswith(("optimizer.", BEST)):
            shapes[name] = str(list(tensor.shape))
    return shapes


def _differences(saved: Any, current: Any, where: str = "") -> list[str]:
    """One line for each setting that differs, with its dotted key and both values."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            pairs.append((f"{where}.{key}".strip("."), saved.get(key), current.get(key)))
    elif isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        for index, (before, after) in enumerate(zip(saved, current, strict=True)):
            pairs.append((f"{where}.{index}", before, after))
    else:
        return [] if saved == current else [f"{where} was {_shown(saved)}, is now {_shown(current)}"]
    lines = []
    for key, before, after in pairs:
        lines += _differences(before, after, key)
    return lines


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
