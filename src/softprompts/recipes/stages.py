"""Stages of long work: each is a directory that records its settings, and is not done again while they are the same."""

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
"""The file with a stage's settings and the digests of the prompts it started from."""

RESULTS = "results.json"

ASIDE_SUFFIX = ".before-"
"""Separates a stage's name from a number in the folder of a stage that was done with other settings."""


def check_output_directory(title: str, out: str) -> None:
    """Raise ConfigError where `title` was started in several processes, or where `out` cannot be written to."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{title} runs in one process; start it without torchrun")
    job.check_writable(Path(out))


def run_stage(
    title: str,
    out: Path,
    settings: Mapping[str, Any],
    reporter: ProgressReporter,
    make_results: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """The results of a stage: those in its directory where it was done with the same settings, else new ones.

    `make_results` continues a stage that was interrupted. A stage that was done with other settings moves to a folder
    beside `out`, and comes back when its settings are asked for again.

    Args:
        title: The name of the stage for progress.
        out: The directory of the stage.
        settings: Everything that the results depend on, as JSON values.
        reporter: Shows progress.
        make_results: Does the stage.
    """
    stage_file = out / STAGE_FILE
    results_file = out / RESULTS
    stored_settings = json.loads(json.dumps(settings))  # tuples come back as lists
    changed = results_file.exists() if not stage_file.exists() else read_json(stage_file) != stored_settings
    if changed:
        _set_aside(out)
    if not out.exists():
        aside = _find_aside(out, stored_settings)
        if aside is not None:
            aside.rename(out)
    if stage_file.exists() and results_file.exists():
        reporter.log(f"{title}: already done, in {out}")
        results: dict[str, Any] = read_json(results_file)
        return results
    if changed and not stage_file.exists():
        reporter.log(f"{title}: settings or starting prompts have changed; it runs again")
    out.mkdir(parents=True, exist_ok=True)
    write_json(stage_file, stored_settings)
    results = make_results()
    if not results_file.exists():
        write_json(results_file, results)
    return results


def _set_aside(out: Path) -> None:
    """Rename the directory `out` to a free name beside it."""
    for number in itertools.count(1):
        aside = out.with_name(f"{out.name}{ASIDE_SUFFIX}{number}")
        if not aside.exists():
            out.rename(aside)
            return


def _find_aside(out: Path, settings: Any) -> Path | None:
    """The directory beside `out` that was set aside with these settings."""
    for aside in sorted(out.parent.glob(f"{glob.escape(out.name)}{ASIDE_SUFFIX}*")):
        stage_file = aside / STAGE_FILE
        if stage_file.exists() and read_json(stage_file) == settings:
            return aside
    return None


def run_group(title: str, run: Run, reporter: ProgressReporter, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """The results of runs that share a configuration.

    Args:
        title: The name of the group for progress.
        run: The configuration.
        reporter: Shows progress.
        inputs: Directories of the prompts that the runs start from.
    """
    settings = {
        "version": __version__,
        "runs": {name: explicit_settings(single_run) for name, single_run in sweep(run).items()},
        "inputs": {path: artifacts_digest(path) for path in inputs},
    }

    def make_results() -> dict[str, Any]:
        count = len(run.runs) or 1
        reporter.log(f"{title}: {count} run{'s' * (count > 1)}, {run.training.max_steps} steps")
        return job.run(run, reporter)

    return run_stage(title, Path(run.output_dir), settings, reporter, make_results)


class CommonSettings(Protocol):
    """The sections that all runs of a plan share."""

    model: ModelConfig
    prompt: PromptConfig
    evaluation: EvaluationConfig


def build_run(
    plan: CommonSettings,
    tasks: Sequence[TaskConfig],
    train: TrainConfig,
    out: Path,
    *,
    prompt: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Run:
    """The configuration of runs of a plan.

    Args:
        plan: The plan.
        tasks: The tasks of every run.
        train: How they train.
        out: The output directory.
        prompt: Keys of the section `prompt` that differ from the plan's.
        runs: The runs that train together, as in a configuration.
        seed: The seed.
    """
    run: Run = parse(
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
    return run


def explicit_settings(section: Section) -> dict[str, Any]:
    """The settings that differ from their defaults: a key that a later release adds does not invalidate a stage."""
    return section.model_dump(mode="json", exclude_defaults=True)


def run_complete_group(title: str, run: Run, reporter: ProgressReporter, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """The results of runs of which none may fail, as `run_group`.

    Raises:
        TrainingError: A run failed.
    """
    results = run_group(title, run, reporter, inputs)
    failed = [f"{row['name']}: {row['failed']}" for row in results["runs"] if row["failed"]]
    if failed:
        raise TrainingError(f"{title} could not all be trained: {'; '.join(failed)}")
    return results


def read_results(out: Path) -> dict[str, Any]:
    """The results in the directory of a run."""
    results: dict[str, Any] = read_json(out / RESULTS)
    return results


def artifacts_digest(path: str) -> str:
    """A digest of all artifacts below a directory."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob(artifact.TENSORS)):
        digest.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
