"""What a run leaves to read: the content of results.json and of the page."""

import itertools
import json
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

from softprompts import __version__
from softprompts.config import Run
from softprompts.data import ExampleTokenizer, Row, Task, classes
from softprompts.evaluation import metrics
from softprompts.evaluation.evaluate import Answer, Evaluation
from softprompts.methods import fold
from softprompts.model.nearest_tokens import nearest_tokens
from softprompts.recipes.run.prepare import PreparedRun
from softprompts.training.checkpoint import Progress, machine_of

TRAINED = {"prompt": "", "backbone": ", all weights trained", "lora": ", trained with LoRA"}
"""What a page's title says about what was trained."""


def prompt_directory(out: Path, task: str, tasks: int) -> Path:
    """Where a run's artifact lies: `prompt`, or `prompt/<task>` where it trained several."""
    return out / "prompt" if tasks == 1 else out / "prompt" / task


def versions() -> dict[str, str]:
    """What the figures were made with."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
    return {"softprompts": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def machine_changes(history: Sequence[Progress]) -> list[str]:
    """A line for each step from which on a run was computed with something else, as after a resume elsewhere."""
    lines = []
    for before, after in itertools.pairwise(report for report in history if report.machine):
        was, now = (dict.fromkeys(report.machine.split(", ")) for report in (before, after))
        new, old = ([fact for fact in one if fact not in other] for one, other in ((now, was), (was, now)))
        lines.append(
            f"from step {after.step} on computed with {', '.join(new)}, before with {', '.join(old)}: the same up to "
            f"rounding, not to the bit"
        )
    return lines


def page_of(
    job: PreparedRun,
    index: int,
    before: Evaluation | None,
    after: Evaluation | None,
    history: Sequence[Progress],
    seconds: float,
) -> dict[str, Any]:
    """What results.json and the page hold of the job's task number `index`."""
    run, backbone, task = job.run, job.model.backbone, job.tasks[index]
    tokens, spent = sum(r.tokens for r in history), sum(r.seconds for r in history)
    rate = tokens / spent if spent else None
    metric = next(iter(after.scores)) if after else None
    page: dict[str, Any] = {
        "format": 1,
        "title": f"{task.name} with {backbone.name}{TRAINED[run.training.target]}",
        "task": task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": {
            "metric": metric,
            "before": asdict(before.headline) if before else None,
            "after": asdict(after.headline) if after else None,
            "steps": len(history),
            "seconds": round(seconds, 1),
            "trainable": job.weights.count if job.weights else _prompt_size(job),
            "share": (job.weights.count if job.weights else _prompt_size(job)) / _size(job),
            "moved": None if job.weights else _moved(job),
            "tokens_per_second": rate,
        },
        "curve": [{**asdict(r), "tokens_per_second": r.tokens / r.seconds if r.seconds else None} for r in history],
        "validation": [{"step": r.step, "value": r.score} for r in history if r.score is not None],
        "scores": {k: asdict(v) for k, v in after.scores.items()} if after else {},
        "scores_before": {k: asdict(v) for k, v in before.scores.items()} if before else {},
        "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        "config": run.model_dump(mode="json", exclude={"runs"}),
        "seeds": {"run": run.seed, "split": run.tasks[index].split.seed},
        "versions": {**versions(), **({"peft": version("peft")} if run.training.target == "lora" else {})},
        "machine": {
            **machine_of((job.weights or job).model.backbone),
            "paths": dict(Counter(r.path for r in history)),
        },
        "warnings": [*task.notes, *machine_changes(history)],
        "next": next_commands(run, task) if job.weights is None else [],
    }
    if after is not None:
        page |= _details(job, index, before, after)
    name, registry = job.prompt(index), job.model.registry
    prompt = None if name is None else fold(registry.method(name))
    if name is not None and prompt is not None and registry.records[name].site.at_embeddings:
        words = nearest_tokens(backbone, prompt)
        page["nearest_words"] = [asdict(row) for row in words]
    return page


def _prompt_size(job: PreparedRun) -> int:
    """Trained numbers a task."""
    return sum(parameter.numel() for parameter in job.model.trainable(job.prompts).values()) // len(job.tasks)


def _size(job: PreparedRun) -> int:
    """Numbers of the backbone, however they are stored."""
    return int(job.model.backbone.model.num_parameters())


def _moved(job: PreparedRun) -> int:
    """Trained numbers a task that training moved: of a table these are the rows of tokens that it met."""
    now = job.model.trainable(job.prompts)
    return sum(int((now[name] != began).sum()) for name, began in job.begin.items()) // len(job.tasks)


def compare(
    run: Run,
    jobs: Mapping[str, PreparedRun],
    pages: Mapping[str, Sequence[Mapping[str, Any]]],
    histories: Mapping[str, Sequence[Progress]],
    failed: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    """What results.json and the page hold of runs that trained together.

    runs: a row for each run and task, with what differs between the runs, the last loss and the headline score;
    groups: for runs that differ by nothing but their seed, mean and standard deviation over the seeds.
    pages, histories and failed are those of each run, by name; a run that failed has no pages.
    """
    differs = _different({name: job.run for name, job in jobs.items()})
    rows = [
        {
            "name": name,
            "task": task.name,
            "differs": differs[name],
            "steps": len(histories[name]),
            "loss": histories[name][-1].loss if histories[name] else None,
            **{key: pages[name][i]["summary"][key] if name in pages else None for key in ("metric", "before", "after")},
            "failed": failed.get(name),
            "directory": job.run.output_dir,
        }
        for name, job in jobs.items()
        for i, task in enumerate(job.tasks)
    ]
    backbone = next(iter(jobs.values())).model.backbone
    return {
        "format": 1,
        "title": f"{len(jobs)} runs with {backbone.name}",
        "task": ", ".join(dict.fromkeys(str(row["task"]) for row in rows)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "runs": rows,
        "groups": _groups(rows),
        "config": run.model_dump(mode="json"),
        "versions": versions(),
        "machine": machine_of(backbone),
        "warnings": [f"run '{name}' failed: {message}" for name, message in failed.items()],
        "next": _next_of_several(jobs, pages),
    }


def _different(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """The settings that are not the same in all runs, as dotted keys, and each run's value."""
    flat = {name: _flat(run.model_dump(mode="json", exclude={"output_dir", "runs"})) for name, run in runs.items()}
    keys = sorted({key for values in flat.values() for key in values})
    different = [key for key in keys if len({json.dumps(values.get(key)) for values in flat.values()}) > 1]
    return {name: {key: values.get(key) for key in different} for name, values in flat.items()}


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation of the headline score over rows that differ by nothing but the seed."""
    together: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["after"] is not None:
            same = {key: value for key, value in row["differs"].items() if key != "seed"}
            together.setdefault(json.dumps([row["task"], same]), []).append(row)
    found = []
    for group in together.values():
        if len(group) < 2:
            continue
        scores = [row["after"]["value"] for row in group]
        first = group[0]
        found.append(
            {
                "task": first["task"],
                "differs": {key: value for key, value in first["differs"].items() if key != "seed"},
                "runs": [row["name"] for row in group],
                "metric": first["metric"],
                "mean": statistics.fmean(scores),
                "sd": statistics.stdev(scores),
                "n": len(scores),
            }
        )
    return found


def _next_of_several(jobs: Mapping[str, PreparedRun], pages: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The commands of the first run that was finished, and a vote of all that can stand in one batch with it."""
    if not pages:
        return []
    name = next(iter(pages))
    lines: list[str] = list(pages[name][0]["next"])
    job, task = jobs[name], jobs[name].tasks[0]
    alike = [
        shlex.quote(str(prompt_directory(Path(other.run.output_dir), task.name, len(other.tasks))))
        for key, other in jobs.items()
        if key in pages
        and other.tasks[0].template == task.template
        and (other.run.prompt.num_virtual_tokens, other.run.prompt.method)
        == (job.run.prompt.num_virtual_tokens, job.run.prompt.method)
    ]
    return [*lines, f"softprompts evaluate {' '.join(alike)}"] if len(alike) > 1 else lines


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values as dotted keys, as a user would set them; the one task of a run is called `task`."""
    if isinstance(values, list) and len(values) == 1 and name == "tasks":
        return _flat(values[0], "task")
    if isinstance(values, list) and name == "tasks":
        return {key: value for i, one in enumerate(values) for key, value in _flat(one, f"tasks.{i}").items()}
    if not isinstance(values, dict) or not values:
        return {name: values}
    return {
        path: value for key, one in values.items() for path, value in _flat(one, f"{name}.{key}".strip(".")).items()
    }


def _details(job: PreparedRun, index: int, before: Evaluation | None, after: Evaluation) -> dict[str, Any]:
    """Tables per class and example answers."""
    task, encoder = job.tasks[index], job.encoders[index]
    found: dict[str, Any] = {"examples": _examples(task, encoder, before, after)}
    labels = classes(task.template)
    if task.template.kind == "label":
        predictions = [a.value for a in after.answers]
        found["per_class"] = [asdict(c) for c in metrics.per_class(predictions, after.references, labels)]
        matrix = metrics.confusion(predictions, after.references, labels)
        found["confusion"] = {"labels": list(labels), "matrix": matrix.tolist()}
    return found


def _examples(
    task: Task, encoder: ExampleTokenizer, before: Evaluation | None, after: Evaluation, count: int = 10
) -> list[dict[str, Any]]:
    """`count` test rows spread over the set, as they were read and answered."""
    picked = [round(i * (len(task.test) - 1) / max(1, count - 1)) for i in range(min(count, len(task.test)))]
    return [
        {
            "input": _shown(encoder, task.test[i]),
            "gold": _plain(after.references[i]),
            "before": _said(before.answers[i]) if before else None,
            "after": _said(after.answers[i]),
            "correct": _plain(after.answers[i].value) == _plain(after.references[i]),
        }
        for i in picked
    ]


def _shown(encoder: ExampleTokenizer, row: Row) -> str:
    return " | ".join(str(row[column]) for column in encoder.template.columns)[:300]


def _said(one: Answer) -> str | None:
    """An answer as people read it; what was written and is no legal answer stands in quotation marks."""
    return _plain(one.value) if one.value is not None or one.text is None else f"no answer: {one.text[:60]!r}"


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return ", ".join(str(v) for v in value) if isinstance(value, list | tuple) else f"{value:g}"


def next_commands(run: Run, task: Task) -> list[str]:
    """What a user may want to type after a run."""
    where = shlex.quote(str(prompt_directory(Path(run.output_dir), task.name, len(run.tasks))))
    lines = [f"softprompts evaluate {where}", f"softprompts inspect {where}"]
    if not task.template.columns:  # the prompt alone makes the answer
        return lines
    column = task.template.columns[0]
    texts = [str(row[column]) for row in (*task.test, *task.train)[:100]]
    # A text without quotation marks needs no more than two of them on a command line.
    text = shlex.quote(min(texts, key=lambda one: ("'" in one or "\n" in one, len(one) > 80)))
    return [f"softprompts predict {where} {text}", *lines]
