"""What the command shows: tables and JSON on standard output, progress and notes on standard error."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def say(text: str) -> None:
    err.print(text, markup=False, soft_wrap=True)


def quiet() -> None:
    """Keep transformers' own bars and notes off the screen; its errors stay."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value


def show_json(value: Any) -> None:
    """Print `value` as JSON."""
    out.print_json(json.dumps(finite(value)))


@contextmanager
def progress() -> Iterator[Any]:
    """A Screen for jobs: a live bar on a terminal, plain lines elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from softprompts.recipes.run.run import ProgressReporter

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

        def step(name: str, r: Any) -> None:
            speed = r.tokens / r.seconds if r.seconds else 0.0
            left = (r.steps - r.step) * r.seconds
            facts = f"loss {r.loss:.3f}  rate {r.rate:.2g}  {speed:,.0f} tokens/s"
            facts += "" if terminal else f"  {left:.0f} s left"
            facts += "" if r.score is None else f"  validation {r.score:.3f}"
            advance(f"training {name}".strip(), r.step, r.steps, facts, 20)

        def judged(name: str, done: int, total: int) -> None:
            if terminal or done == total:
                advance(f"evaluating {name}", done, total, "rows", total)

        yield ProgressReporter(say, step, judged)


@contextmanager
def counting(shown: bool, done: int, out_file: Any = None) -> Iterator[Callable[[], None]]:
    """What counts one answered row more, after `done`: live on a terminal, else a plain line each thousand rows."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    # Answers that are written to the same terminal show by themselves how far they are.
    live = shown and err.is_terminal and (out_file is not None or not out.is_terminal)
    columns = (TextColumn("{task.completed:,.0f} rows answered"), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not live) as bar:
        task, rows = bar.add_task("", total=None, completed=done), itertools.count(done + 1)
        if shown and done:
            say(f"{done:,} rows were answered before")

        def count() -> None:
            number = next(rows)
            bar.update(task, completed=number)
            if shown and not err.is_terminal and number % 1000 == 0:
                say(f"{number:,} rows answered")

        yield count


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows of cells as a table; what looks like markup in a cell is shown as it is."""
    table = Table(*columns, title=Text(title))
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    out.print(table)


def show_runs(results: Mapping[str, Any]) -> None:
    """Runs that trained together: a table on a terminal, a line each elsewhere."""
    several = len({row["task"] for row in results["runs"]}) > 1
    columns = ("run", *(("task",) if several else ()), "what differs", "last loss", "score (95 % interval)")
    rows = []
    for row in results["runs"]:
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        score = "failed" if row["failed"] else f"{row['metric']} {_score(row['after'])}" if row["after"] else "-"
        rows.append((row["name"], *((row["task"],) if several else ()), _differs(row), loss, score))
    table_or_lines(results["title"], columns, rows)
    groups = [
        (*((one["task"],) if several else ()), _differs(one), f"{one['metric']} {one['mean']:.3f}", f"{one['sd']:.3f}",
         one["n"])
        for one in results["groups"]
    ]  # fmt: skip
    if groups:
        columns = (*(("task",) if several else ()), "what differs", "mean", "standard deviation", "runs")
        table_or_lines("over the seeds", columns, groups)


def show_arms(results: Mapping[str, Any], more: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """The arms of a study on its targets: a table for each size on a terminal, a line each elsewhere.

    more: further columns, with what each arm has there.
    """
    more = more or {}
    for one in results["arms"]:
        rows = []
        for line in one["lines"]:
            scores = [line["scores"].get(target) for target in one["targets"]]
            mean = "-" if line["mean"] is None else f"{line['mean']:.3f}"
            further = [column.get(line["arm"], "-") for column in more.values()]
            rows.append((line["arm"], f"{line['trainable']:,}", *further, *map(_mean, scores), mean))
        table_or_lines(f"targets, {one['size']}", ("arm", "trained numbers", *more, *one["targets"], "mean"), rows)


def show_files(**files: Any) -> None:
    """Where everything was written: a line each, never broken, however narrow the screen."""
    out.print()
    for name, path in files.items():
        out.print(f"{name:8} {path}", markup=False, soft_wrap=True)


def show_claims(results: Mapping[str, Any]) -> None:
    """What a study says of a paper's claims."""
    for one in results["claims"].values():
        out.print(one["words"], markup=False, soft_wrap=True)


def show_comparison(results: Mapping[str, Any]) -> None:
    """The arms of a study on its tasks with their step times, then how far each is from prompt tuning."""
    times = {arm: f"{one['ms']:.0f}" for arm, one in results["speed"].items()}
    show_arms(results, {"step, ms": times} if times else None)
    show_claims(results)


def _mean(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{score['mean']:.3f}" + ("" if score["sd"] is None else f" ± {score['sd']:.3f}")


def _differs(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in row["differs"].items()) or "-"


def table_or_lines(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows of cells as a table on a terminal, as a line each elsewhere."""
    if out.is_terminal:
        show_table(title, columns, rows)
        return
    out.print(f"{title}: {', '.join(columns)}", markup=False, soft_wrap=True)
    for row in rows:
        out.print("  ".join(map(str, row)), markup=False, soft_wrap=True)


def show(page: dict[str, Any]) -> None:
    """A run's results as tables."""
    summary = page["summary"]
    classes = [
        (c["label"], f"{c['precision']:.3f}", f"{c['recall']:.3f}", f"{c['f1']:.3f}", c["support"])
        for c in page.get("per_class", ())
    ]
    if classes:
        show_table(f"{page['task']}: per class", ("class", "precision", "recall", "F1", "rows"), classes)
    examples = [
        (e["input"][:70], e["gold"], e["before"] or "-", ("" if e["correct"] else "✗ ") + str(e["after"]))
        for e in page.get("examples", ())
    ]
    if examples:
        show_table("examples from the held-out rows", ("text", "right answer", "before", "after"), examples)
    if page.get("nearest_words"):
        show_words(page["nearest_words"][:10])
    if summary.get("after"):
        before = f"{_score(summary['before'])} before, " if summary.get("before") else ""
        out.print(
            f"{summary['metric']}: {before}{_score(summary['after'])} after {summary['steps']} steps", markup=False
        )
    moved = summary.get("moved")
    told = [f"{100 * summary['share']:.2g} % of the model's"] if summary.get("share") is not None else []
    told += [f"{moved:,} moved"] if moved is not None and moved < summary["trainable"] else []
    some = f" ({', '.join(told)})" if told else ""
    out.print(f"{summary['trainable']:,} trained numbers{some}, {summary['seconds']:.0f} s in all")


def show_words(rows: Iterable[Mapping[str, Any]]) -> None:
    """The words nearest to each prompt row."""
    lines = [(row["row"], "  ".join(f"{word!r} {cosine:.2f}" for word, cosine in row["words"])) for row in rows]
    show_table("what the prompt resembles", ("prompt row", "nearest words (cosine)"), lines)


def _score(score: dict[str, Any]) -> str:
    text = f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
    return text + (f", {score['illegal']} illegal" if score["illegal"] else "")
