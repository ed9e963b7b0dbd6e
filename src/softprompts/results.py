"""What a run leaves to read: the content of results.json and of the page."""

import platform
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from softprompts import __version__, metrics
from softprompts.config import Run
from softprompts.data import Encoder, Row, Task, classes
from softprompts.evaluate import Answer, Evaluation
from softprompts.prepare import Job
from softprompts.train import Report
from softprompts.words import nearest_words


def prompt_directory(out: Path, task: str, tasks: int) -> Path:
    """Where a run's artefact lies: `prompt`, or `prompt/<task>` where it trained several."""
    return out / "prompt" if tasks == 1 else out / "prompt" / task


def versions() -> dict[str, str]:
    """What the figures were made with."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
    return {"softprompts": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def page_of(
    job: Job,
    index: int,
    before: Evaluation | None,
    after: Evaluation | None,
    history: Sequence[Report],
    seconds: float,
) -> dict[str, Any]:
    """What results.json and the page hold of the job's task number `index`."""
    run, learner, task = job.run, job.learner, job.tasks[index]
    tokens, spent = sum(r.tokens for r in history), sum(r.seconds for r in history)
    rate = tokens / spent if spent else None
    metric = next(iter(after.scores)) if after else None
    page: dict[str, Any] = {
        "format": 1,
        "title": f"{task.name} with {learner.backbone.name}",
        "task": task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": {
            "metric": metric,
            "before": asdict(before.headline) if before else None,
            "after": asdict(after.headline) if after else None,
            "steps": len(history),
            "seconds": round(seconds, 1),
            "trainable": sum(p.numel() for p in learner.parameters().values()) // len(job.tasks),
            "tokens_per_second": rate,
        },
        "curve": [{**asdict(r), "tokens_per_second": r.tokens / r.seconds if r.seconds else None} for r in history],
        "validation": [{"step": r.step, "value": r.score} for r in history if r.score is not None],
        "scores": {k: asdict(v) for k, v in after.scores.items()} if after else {},
        "scores_before": {k: asdict(v) for k, v in before.scores.items()} if before else {},
        "rows": {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)},
        "config": run.model_dump(mode="json"),
        "seeds": {"run": run.seed, "split": run.tasks[index].split.seed},
        "versions": versions(),
        "machine": {
            "device": str(learner.backbone.device),
            "dtype": str(learner.backbone.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "paths": dict(Counter(r.path for r in history)),
        },
        "warnings": list(task.notes),
        "next": next_commands(run, task),
    }
    if after is not None:
        page |= _details(job, index, before, after)
    if learner.site.name in ("input", "decoder"):
        words = nearest_words(learner.backbone, learner.method.fold(task.name))
        page["nearest_words"] = [asdict(row) for row in words]
    return page


def _details(job: Job, index: int, before: Evaluation | None, after: Evaluation) -> dict[str, Any]:
    """Tables per class and example answers."""
    task, encoder = job.tasks[index], job.encoders[index]
    found: dict[str, Any] = {"examples": _examples(task, encoder, before, after)}
    labels = classes(task.format)
    if task.format.kind == "label":
        predictions = [a.value for a in after.answers]
        found["per_class"] = [asdict(c) for c in metrics.per_class(predictions, after.references, labels)]
        matrix = metrics.confusion(predictions, after.references, labels)
        found["confusion"] = {"labels": list(labels), "matrix": matrix.tolist()}
    return found


def _examples(
    task: Task, encoder: Encoder, before: Evaluation | None, after: Evaluation, count: int = 10
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


def _shown(encoder: Encoder, row: Row) -> str:
    return " | ".join(str(row[column]) for column in encoder.format.columns)[:300]


def _said(one: Answer) -> str | None:
    """An answer as people read it; what was written and is no legal answer stands in quotation marks."""
    return _plain(one.value) if one.value is not None or one.text is None else f"no answer: {one.text[:60]!r}"


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return ", ".join(str(v) for v in value) if isinstance(value, list | tuple) else f"{value:g}"


def next_commands(run: Run, task: Task) -> list[str]:
    """What a user may want to type after a run."""
    where = prompt_directory(Path(run.out), task.name, len(run.tasks))
    column = task.format.columns[0]
    texts = [str(row[column]) for row in (*task.test, *task.train)[:100]]
    # A text without quotation marks needs no more than two of them on a command line.
    text = shlex.quote(min(texts, key=lambda one: ("'" in one or "\n" in one, len(one) > 80)))
    return [
        f"softprompts predict {where} {text}",
        f"softprompts evaluate {where}",
        f"softprompts inspect {where}",
    ]
