"""Stages of long work: each a directory that says what it was done with, and is not done again while that holds."""

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from softprompts import __version__
from softprompts.artifacts import artifact
from softprompts.artifacts.io import read_json, write_json
from softprompts.config import EvaluationConfig, ModelConfig, PromptConfig, Run, Section, TaskConfig, TrainConfig, parse
from softprompts.config.sweep import sweep
from softprompts.errors import ConfigError, TrainingError
from softprompts.recipes.run import run as job
from softprompts.recipes.run.run import ProgressReporter

STAGE_FILE = "stage.json"
"""What a stage was done with: its settings, and the prompts it started from."""

RESULTS = "results.json"

ASIDE_SUFFIX = ".before-"
"""Between a stage's name and a number: the folder of one that was done with other settings."""


def check_output_directory(what: str, out: str) -> None:
    """Raise ConfigError where `what` was started in several processes, and where nothing can be written into `out`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} runs in one process; start it without torchrun")
    job.check_writable(Path(out))


def run_stage(
    title: str, out: Path, told: Mapping[str, Any], screen: ProgressReporter, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The results of a stage, from its directory `out` where it was done with the same things `told`, else made.

    What was begun with the same and interrupted is gone on with by `make`. What was begun otherwise stands aside, in a
    folder beside `out`, until it is asked for again.
    """
    file, done = out / STAGE_FILE, out / RESULTS
    stamp = json.loads(json.dumps(told))  # because that is how the values come back
    changed = done.exists() if not file.exists() else read_json(file) != stamp
    if changed:
        _set_aside(out)
    if not out.exists() and (found := _aside(out, stamp)) is not None:
        found.rename(out)
    if file.exists() and done.exists():
        screen.log(f"{title}: done before, in {out}")
        results: dict[str, Any] = read_json(done)
        return results
    if changed and not file.exists():
        screen.log(f"{title}: settings, or the prompts it starts from, have changed: done anew")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, stamp)
    results = make()
    if not done.exists():
        write_json(done, results)
    return results


def _set_aside(out: Path) -> None:
    """Give the directory `out` a name beside it that nothing has."""
    number = next(n for n in itertools.count(1) if not out.with_name(f"{out.name}{ASIDE_SUFFIX}{n}").exists())
    out.rename(out.with_name(f"{out.name}{ASIDE_SUFFIX}{number}"))


def _aside(out: Path, stamp: Any) -> Path | None:
    """The directory beside `out` that was set aside and says `stamp`."""
    every = sorted(out.parent.glob(f"{glob.escape(out.name)}{ASIDE_SUFFIX}*"))
    return next((one for one in every if (one / STAGE_FILE).exists() and read_json(one / STAGE_FILE) == stamp), None)


def run_group(title: str, run: Run, screen: ProgressReporter, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """The results of a group of runs; `inputs` are directories with the prompts that they start from."""
    each = {name: explicit_settings(one) for name, one in sweep(run).items()}
    told = {"version": __version__, "runs": each, "inputs": {path: artifacts_digest(path) for path in inputs}}

    def make() -> dict[str, Any]:
        count = len(run.runs) or 1
        screen.log(f"{title}: {count} run{'s' * (count > 1)}, {run.training.max_steps} steps")
        return job.run(run, screen)

    return run_stage(title, Path(run.output_dir), told, screen, make)


class Settings(Protocol):
    """What all runs of a plan have in common."""

    model: ModelConfig
    prompt: PromptConfig
    evaluation: EvaluationConfig


def build_run(
    plan: Settings,
    tasks: Sequence[TaskConfig],
    train: TrainConfig,
    out: Path,
    *,
    prompt: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Run:
    """A run of a plan on `tasks`, written to `out`; prompt: what it sets otherwise than the plan's section; runs: those
    that train together, as in a configuration."""
    found: Run = parse(
        {
            "model": plan.model.model_dump(mode="json"),
            "prompt": {**plan.prompt.model_dump(mode="json"), **(prompt or {})},
            "tasks": [task.model_dump(mode="json") for task in tasks],
            "training": train.model_dump(mode="json"),
            "evaluation": plan.evaluation.model_dump(mode="json"),
            "output_dir": str(out),
            "seed": seed,
            "runs": list(runs),
        }
    )
    return found


def explicit_settings(section: Section) -> dict[str, Any]:
    """What a section sets otherwise than by default: a key that a later release adds does not undo what was done."""
    return section.model_dump(mode="json", exclude_defaults=True)


def run_complete_group(title: str, run: Run, screen: ProgressReporter, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """The same of a group of which no run may be missing; raises TrainingError where one failed."""
    results = run_group(title, run, screen, inputs)
    if failed := [f"{row['name']}: {row['failed']}" for row in results["runs"] if row["failed"]]:
        raise TrainingError(f"{title} could not all be trained: {'; '.join(failed)}")
    return results


def read_results(out: Path) -> dict[str, Any]:
    """What a run left in its directory."""
    found: dict[str, Any] = read_json(out / RESULTS)
    return found


def artifacts_digest(path: str) -> str:
    """What the artifacts below a directory hold."""
    found = hashlib.sha256()
    for file in sorted(Path(path).rglob(artifact.TENSORS)):
        found.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    return found.hexdigest()
