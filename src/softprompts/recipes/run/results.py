"""The content of results.json and report.html: of a run, and of runs that trained together."""

import itertools
import json
import math
import platform
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from softprompts import __version__
from softprompts.config import Run
from softprompts.data import ExampleTokenizer, Row, Task, classes
from softprompts.evaluation import metrics, page
from softprompts.evaluation.evaluate import Answer, Evaluation
from softprompts.methods import fold
from softprompts.model.nearest_tokens import nearest_tokens
from softprompts.recipes.run.prepare import PreparedRun
from softprompts.training.checkpoint import machine_of, undefined_scores
from softprompts.types import Progress

TRAINED = {"prompt": "", "backbone": ", all weights trained", "lora": ", trained with LoRA"}
"""The end of a page's title, by what was trained."""


def prompt_directory(out: Path, task: str, tasks: int) -> Path:
    """The directory of a run's artifact: `prompt`, or `prompt/TASK` where the run has several tasks."""
    return out / "prompt" if tasks == 1 else out / "prompt" / task


def versions() -> dict[str, str]:
    """The versions of softprompts, Python and the libraries on which results depend."""
    libraries = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
    numbers = {name: version(name) for name in libraries}
    return {"softprompts": __version__, "python": platform.python_version(), **numbers}


def header(title: str, task: str) -> dict[str, Any]:
    """What results.json begins with."""
    return {"format": 1, "title": title, "task": task, "created": datetime.now(UTC).isoformat(timespec="seconds")}


def machine_changes(history: Sequence[Progress]) -> list[str]:
    """A line for each step from which on the machine or its kernels differ, as after a resume elsewhere."""
    lines = []
    for before, after in itertools.pairwise(progress for progress in history if progress.machine):
        old_facts, new_facts = before.machine.split(", "), after.machine.split(", ")
        new = [fact for fact in new_facts if fact not in old_facts]
        old = [fact for fact in old_facts if fact not in new_facts]
        lines.append(
            f"from step {after.step} on with {', '.join(new)}, before with {', '.join(old)}: equal up to "
            f"rounding, not to the bit"
        )
    return lines


def page_of(
    prepared: PreparedRun,
    index: int,
    before: Evaluation | None,
    after: Evaluation | None,
    history: Sequence[Progress],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and report.html for a task of a run.

    Args:
        prepared: The run after its training.
        index: The number of the task.
        before: The evaluation of the stock model.
        after: The evaluation of what was trained.
        history: The progress of every step.
        seconds: The time of the whole run.
    """
    run, backbone, task = prepared.run, prepared.model.backbone, prepared.tasks[index]
    weights = prepared.weights
    trainable = _parameters_per_task(prepared) if weights is None else weights.count
    library_versions = versions()
    if run.training.target == "lora":
        library_versions["peft"] = version("peft")
    machine = machine_of(backbone if weights is None else weights.backbone)
    content: dict[str, Any] = {
        **header(f"{task.name} with {backbone.name}{TRAINED[run.training.target]}", task.name),
        "summary": {
            "metric": next(iter(after.scores)) if after else None,
            "before": asdict(before.headline) if before else None,
            "after": asdict(after.headline) if after else None,
            "steps": len(history),
            "seconds": round(seconds, 1),
            "trainable": trainable,
            # The backbone's parameters count as numbers, however they are stored.
            "share": trainable / int(backbone.model.num_parameters()),
            "moved": _moved_per_task(prepared) if weights is None else None,
            "tokens_per_second": tokens_per_second(history),
        },
        "curve": list(map(_curve_row, history)),
        "validation": validation_curve(history),
        "scores": metrics.plain_scores(after.scores) if after else {},
        "scores_before": metrics.plain_scores(before.scores) if before else {},
        "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        "config": run.model_dump(mode="json", exclude={"runs"}),
        "seeds": {"run": run.seed, "split": run.tasks[index].split.seed},
        "versions": library_versions,
        "machine": {**machine, "paths": dict(Counter(progress.path for progress in history))},
        "warnings": [*task.notes, *machine_changes(history), *filter(None, [undefined_scores(history)])],
        "next": next_commands(run, task) if weights is None else [],
    }
    if after is not None:
        content |= _details(task, prepared.encoders[index], before, after)
    prompt_name, registry = prepared.prompt(index), prepared.model.registry
    if prompt_name is not None and registry.records[prompt_name].site.at_embeddings:
        prompt = fold(registry.method(prompt_name))
        if prompt is not None:
            content["nearest_words"] = list(map(asdict, nearest_tokens(backbone, prompt)))
    return content


def tokens_per_second(history: Sequence[Progress]) -> float | None:
    """The speed over all steps; None where no step took time."""
    seconds = sum(progress.seconds for progress in history)
    return sum(progress.tokens for progress in history) / seconds if seconds else None


def validation_curve(history: Sequence[Progress]) -> list[dict[str, Any]]:
    """The steps with a validation score, and the score."""
    return [{"step": row.step, "value": row.score} for row in history if row.score is not None]


def best_validation(curve: Sequence[Mapping[str, Any]]) -> float:
    """The best score of a `validation_curve`; minus infinity where none is a number: NaN, which JSON has as null."""
    scores = [point["value"] for point in curve]
    numbers = [float(score) for score in scores if score is not None and not math.isnan(score)]
    return max(numbers, default=-math.inf)


def _curve_row(progress: Progress) -> dict[str, Any]:
    return {**asdict(progress), "tokens_per_second": tokens_per_second([progress])}


def _parameters_per_task(prepared: PreparedRun) -> int:
    """The number of trained numbers for each task."""
    parameters = prepared.model.trainable(prepared.prompts)
    return sum(map(torch.numel, parameters.values())) // len(prepared.tasks)


def _moved_per_task(prepared: PreparedRun) -> int:
    """The trained numbers for each task that differ from their start: of a table, the rows of tokens in the data."""
    parameters = prepared.model.trainable(prepared.prompts)
    moved = 0
    for name, initial in prepared.initial_parameters.items():
        moved += int((parameters[name] != initial).sum())
    return moved // len(prepared.tasks)


def compare(
    run: Run,
    prepared: Mapping[str, PreparedRun],
    pages: Mapping[str, Sequence[Mapping[str, Any]]],
    histories: Mapping[str, Sequence[Progress]],
    failed: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    """The content of results.json and report.html for runs that trained together.

    Args:
        run: The configuration with the list of runs.
        prepared: The runs by name.
        pages: The page of each task of each run that did not fail.
        histories: The progress of every step of each run.
        failed: The message of each run that failed.
        seconds: The time of all runs.

    Returns:
        Under `runs` a row for each run and task: what differs between the runs, the last loss and the headline score.
        Under `groups` mean and standard deviation over runs that differ in nothing but their seed.
    """
    differences = _differences({name: prepared_run.run for name, prepared_run in prepared.items()})
    rows: list[dict[str, Any]] = []
    for name, prepared_run in prepared.items():
        for index, task in enumerate(prepared_run.tasks):
            summary = pages[name][index]["summary"] if name in pages else {}
            rows.append(
                {
                    "name": name,
                    "task": task.name,
                    "differs": differences[name],
                    "steps": len(histories[name]),
                    "loss": histories[name][-1].loss if histories[name] else None,
                    "metric": summary.get("metric"),
                    "before": summary.get("before"),
                    "after": summary.get("after"),
                    "failed": failed.get(name),
                    "directory": prepared_run.run.output_dir,
                }
            )
    backbone = next(iter(prepared.values())).model.backbone
    return {
        **header(f"{len(prepared)} runs with {backbone.name}", ", ".join(dict.fromkeys(row["task"] for row in rows))),
        "seconds": round(seconds, 1),
        "runs": rows,
        "groups": _seed_groups(rows),
        "config": run.model_dump(mode="json"),
        "versions": versions(),
        "machine": machine_of(backbone),
        "warnings": [f"run '{name}' failed: {message}" for name, message in failed.items()],
        "next": _next_commands_of_runs(prepared, pages),
    }


def _differences(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """The settings that differ between the runs, as dotted keys, with each run's value."""
    settings = {name: _flat_settings(run) for name, run in runs.items()}
    differences: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for key in sorted(set().union(*settings.values())):
        values = [settings_of_run.get(key) for settings_of_run in settings.values()]
        if len(set(map(json.dumps, values))) > 1:
            for name, value in zip(runs, values, strict=True):
                differences[name][key] = value
    return differences


def _flat_settings(run: Run) -> dict[str, Any]:
    """The settings of a run by the dotted keys with which a user sets them; the only task of a run is called `task`."""
    settings = run.model_dump(mode="json", exclude={"output_dir", "runs"})
    tasks = settings.pop("tasks")
    for index, task in enumerate(tasks):
        settings["task" if len(tasks) == 1 else f"tasks.{index}"] = task
    return dict(page.flatten(settings))


def _seed_groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation of the headline score over rows that differ in nothing but the seed."""
    by_settings: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["after"] is not None:
            by_settings.setdefault(json.dumps([row["task"], _without_seed(row)]), []).append(row)
    groups = []
    for group in by_settings.values():
        if len(group) > 1:
            scores = [row["after"]["value"] for row in group]
            groups.append(
                {
                    "task": group[0]["task"],
                    "differs": _without_seed(group[0]),
                    "runs": [row["name"] for row in group],
                    "metric": group[0]["metric"],
                    "mean": statistics.fmean(scores),
                    "sd": statistics.stdev(scores),
                    "n": len(scores),
                }
            )
    return groups


def _without_seed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["differs"].items() if key != "seed"}


def _next_commands_of_runs(
    prepared: Mapping[str, PreparedRun], pages: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """The commands for the first finished run, and a vote of all runs that can be in one batch with it."""
    if not pages:
        return []
    first = next(iter(pages))
    commands: list[str] = list(pages[first][0]["next"])
    run, task = prepared[first].run, prepared[first].tasks[0]
    directories = []
    for name in pages:
        other, other_task = prepared[name].run, prepared[name].tasks[0]
        same_length = other.prompt.num_virtual_tokens == run.prompt.num_virtual_tokens
        same_method = other.prompt.method == run.prompt.method
        if same_length and same_method and other_task.template == task.template:
            directory = prompt_directory(Path(other.output_dir), task.name, len(other.tasks))
            directories.append(shlex.quote(str(directory)))
    return [*commands, f"softprompts evaluate {' '.join(directories)}"] if len(directories) > 1 else commands


def _details(task: Task, encoder: ExampleTokenizer, before: Evaluation | None, after: Evaluation) -> dict[str, Any]:
    """The tables of classes, and example answers."""
    details: dict[str, Any] = {"examples": _examples(task, encoder, before, after)}
    if task.template.kind == "label":
        predictions = [answer.value for answer in after.answers]
        details |= metrics.class_tables(predictions, after.references, classes(task.template))
    return details


def _examples(
    task: Task, encoder: ExampleTokenizer, before: Evaluation | None, after: Evaluation, count: int = 10
) -> list[dict[str, Any]]:
    """Up to `count` different test rows, spread evenly over the set, with their answers."""
    examples = []
    for index in evenly_spaced(len(task.test), count):
        answer, reference = after.answers[index], _as_text(after.references[index])
        examples.append(
            {
                "input": _input_text(encoder, task.test[index]),
                "gold": reference,
                "before": _answer_text(before.answers[index]) if before else None,
                "after": _answer_text(answer),
                "correct": _as_text(answer.value) == reference,
            }
        )
    return examples


def evenly_spaced(size: int, count: int) -> list[int]:
    """Up to `count` different indices below `size`, from the first to the last in even steps."""
    count = min(count, size)
    return [round(number * (size - 1) / max(1, count - 1)) for number in range(count)]


def _input_text(encoder: ExampleTokenizer, row: Row) -> str:
    return " | ".join(str(row[column]) for column in encoder.template.columns)[:300]


def _answer_text(answer: Answer) -> str | None:
    """An answer as people read it; a generated text that is no legal answer is quoted."""
    if answer.value is None and answer.text is not None:
        return f"no answer: {answer.text[:60]!r}"
    return _as_text(answer.value)


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else f"{value:g}"


def next_commands(run: Run, task: Task) -> list[str]:
    """Commands that a user may want after a run."""
    directory = shlex.quote(str(prompt_directory(Path(run.output_dir), task.name, len(run.tasks))))
    commands = [f"softprompts evaluate {directory}", f"softprompts inspect {directory}"]
    if not task.template.columns:  # the prompt alone makes the answer
        return commands
    column = task.template.columns[0]
    texts = [str(row[column]) for row in (*task.test, *task.train)[:100]]
    # A text without quotation marks needs only two of them on a command line.
    text = min(texts, key=lambda candidate: ("'" in candidate or "\n" in candidate, len(candidate) > 80))
    return [f"softprompts predict {directory} {shlex.quote(text)}", *commands]
