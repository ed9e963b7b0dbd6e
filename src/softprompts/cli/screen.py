"""Tables and JSON on standard output, progress and notes on standard error."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table
from rich.text import Text

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def log(text: str) -> None:
    """Print a line on standard error."""
    err.print(text, markup=False, soft_wrap=True)


def quiet() -> None:
    """Keep transformers' own bars and notes off the screen; its errors stay."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def show_json(value: Any) -> None:
    """Print `value` as JSON; NaN and infinity, which JSON has not, become null."""
    out.print_json(json.dumps(to_jsonable_python(value, inf_nan_mode="null")))


@contextmanager
def progress() -> Iterator[Any]:
    """A ProgressReporter: live bars on a terminal, plain lines elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from softprompts.recipes.run.prepare import ProgressReporter

    terminal = err.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not terminal) as bar:
        bars: dict[str, Any] = {}

        def advance(name: str, done: int, total: int, facts: str, every: int) -> None:
            if terminal:
                if name not in bars:
                    bars[name] = bar.add_task(name, total=total, facts="")
                bar.update(bars[name], completed=done, total=total, facts=facts, visible=done < total)
            elif done % every == 0 or done == total:
                err.print(f"{name} {done}/{total} {facts}".rstrip(), markup=False)

        def on_step(name: str, step: Any) -> None:
            speed = step.tokens / step.seconds if step.seconds else 0.0
            facts = f"loss {step.loss:.3f}  learning rate {step.rate:.2g}  {speed:,.0f} tokens/s"
            facts += "" if terminal else f"  {(step.steps - step.step) * step.seconds:.0f} s left"
            facts += "" if step.score is None else f"  validation {step.score:.3f}"
            advance(f"training {name}".strip(), step.step, step.steps, facts, 20)

        def on_eval(name: str, done: int, total: int) -> None:
            if terminal or done == total:
                advance(f"evaluating {name}", done, total, "rows", total)

        yield ProgressReporter(log, on_step, on_eval)


@contextmanager
def counting(shown: bool, out_file: Any = None) -> Iterator[Callable[[int], None]]:
    """A function that shows the number of answered rows: live on a terminal, else a plain line each thousand rows."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    # Answers that are written to the same terminal show the progress by themselves.
    live = shown and err.is_terminal and (out_file is not None or not out.is_terminal)
    columns = (TextColumn("{task.completed:,.0f} rows answered"), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not live) as bar:
        task = bar.add_task("", total=None)

        def count(number: int) -> None:
            bar.update(task, completed=number)
            if shown and not err.is_terminal and number % 1000 == 0:
                log(f"{number:,} rows answered")

        yield count


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows of cells as a table; what looks like markup in a cell is shown as it is."""
    table = Table(*columns, title=Text(title))
    for row in rows:
        table.add_row(*map(Text, map(str, row)))
    out.print(table)


def show_runs(results: Mapping[str, Any]) -> None:
    """Runs that trained together: a table on a terminal, a line each elsewhere."""
    task_column = ("task",) if len({row["task"] for row in results["runs"]}) > 1 else ()
    rows = []
    for row in results["runs"]:
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        score = f"{row['metric']} {_score(row['after'])}" if row["after"] else "-"
        rows.append(
            (
                row["name"],
                *(row[key] for key in task_column),
                _differences(row),
                loss,
                "failed" if row["failed"] else score,
            )
        )
    columns = ("run", *task_column, "what differs", "last loss", "score (95 % interval)")
    table_or_lines(results["title"], columns, rows)
    groups = []
    for group in results["groups"]:
        mean, sd = f"{group['metric']} {group['mean']:.3f}", f"{group['sd']:.3f}"
        groups.append((*(group[key] for key in task_column), _differences(group), mean, sd, group["n"]))
    if groups:
        columns = (*task_column, "what differs", "mean", "standard deviation", "runs")
        table_or_lines("over the seeds", columns, groups)


def show_arms(results: Mapping[str, Any], more: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """The arms of a comparison on its targets: a table for each size on a terminal, a line each elsewhere.

    Args:
        results: What results.json holds.
        more: Further columns: the cell of each arm, by the name of the column.
    """
    more = more or {}
    for size in results["arms"]:
        rows = []
        for line in size["lines"]:
            scores = [_mean(line["scores"].get(target)) for target in size["targets"]]
            mean = "-" if line["mean"] is None else f"{line['mean']:.3f}"
            further = [column.get(line["arm"], "-") for column in more.values()]
            rows.append((line["arm"], f"{line['trainable']:,}", *further, *scores, mean))
        columns = ("arm", "trainable params", *more, *size["targets"], "mean")
        table_or_lines(f"targets, {size['size']}", columns, rows)


def show_files(**files: Any) -> None:
    """The files that were written: a line each, never broken, however narrow the screen."""
    out.print()
    for name, path in files.items():
        out.print(f"{name:8} {path}", markup=False, soft_wrap=True)


def _mean(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{score['mean']:.3f}" + ("" if score["sd"] is None else f" ± {score['sd']:.3f}")


def _differences(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in row["differs"].items()) or "-"


def table_or_lines(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows of cells as a table on a terminal, as a line each elsewhere."""
    if out.is_terminal:
        show_table(title, columns, rows)
        return
    out.print(f"{title}: {', '.join(columns)}", markup=False, soft_wrap=True)
    for row in rows:
        out.print("  ".join(map(str, row)), markup=False, soft_wrap=True)


def show(page: Mapping[str, Any]) -> None:
    """A run's results as tables."""
    summary = page["summary"]
    classes = []
    for label in page.get("per_class", ()):
        figures = (f"{label[key]:.3f}" for key in ("precision", "recall", "f1"))
        classes.append((label["label"], *figures, label["support"]))
    if classes:
        show_table(f"{page['task']}: per class", ("class", "precision", "recall", "F1", "rows"), classes)
    examples = []
    for example in page.get("examples", ()):
        after = ("" if example["correct"] else "✗ ") + str(example["after"])
        examples.append((example["input"][:70], example["gold"], example["before"] or "-", after))
    if examples:
        show_table("examples from the test rows", ("text", "right answer", "before", "after"), examples)
    if page.get("nearest_words"):
        show_words(page["nearest_words"][:10])
    if summary.get("after"):
        before = f"{_score(summary['before'])} before, " if summary.get("before") else ""
        out.print(
            f"{summary['metric']}: {before}{_score(summary['after'])} after {summary['steps']} steps", markup=False
        )
    share, moved = summary.get("share"), summary.get("moved")
    notes = [] if share is None else [f"{100 * share:.2g} % of the model"]
    if moved is not None and moved < summary["trainable"]:
        notes.append(f"{moved:,} changed")
    note = f" ({', '.join(notes)})" if notes else ""
    out.print(f"trainable params: {summary['trainable']:,}{note}")
    out.print(f"total time: {summary['seconds']:.0f} s")


def show_words(rows: Iterable[Mapping[str, Any]]) -> None:
    """The words nearest to each prompt token."""
    lines = []
    for row in rows:
        lines.append((row["row"], "  ".join(f"{word!r} {cosine:.2f}" for word, cosine in row["words"])))
    show_table("what the prompt resembles", ("prompt token", "nearest words (cosine)"), lines)


def _score(score: dict[str, Any]) -> str:
    text = f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
    return text + (f", {score['illegal']} illegal" if score["illegal"] else "")
