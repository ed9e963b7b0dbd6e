"""One self-contained HTML page, and one JSON file, of the results of a run.

The page loads no script, font or image. page.html.jinja beside this file is its template and escapes every text,
page.css is its style sheet, and plots.py draws its plots. This module turns results into the variables of the template.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from softprompts.artifacts.io import write_bytes
from softprompts.errors import ConfigError
from softprompts.evaluation.metrics import METRICS
from softprompts.evaluation.plots import (
    Line,
    Plot,
    format_interval,
    format_number,
    format_score,
    heatmap,
    interval_plot,
    line_plot,
    similarity_plot,
    smooth,
    thin,
)

MAX_PLOT_LABELS = 40
"""Labels of the largest confusion matrix that is drawn; of a larger one a table lists the most frequent confusions."""

MAX_CONFUSIONS = 20
"""Rows of that table."""

FIRST_EXAMPLES = 20
"""Examples that are not folded."""


def write_results(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write `results` as JSON, under a temporary name that is renamed when complete.

    Dataclasses, numpy scalars and arrays, sets and paths become plain values. nan and the infinities, which JSON does
    not have, become null.

    Returns:
        The path.

    Raises:
        TypeError: A value has another type; the message names its key.
    """
    return _write(Path(path), json.dumps(_plain(results, "results"), indent=1, allow_nan=False) + "\n")


def write_page(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write the page of `results` (the content of results.json), under a temporary name renamed when complete.

    Only `title` and `task` are required. The page omits a section whose keys are missing, and ignores unknown keys.

    Returns:
        The path.

    Raises:
        ConfigError: The title or the task is missing, or the results have another format than 1.
    """
    plain = _plain(results, "results")
    for key in ("title", "task"):
        if not plain.get(key):
            raise ConfigError(f"results hold no {key!r}; keys: {', '.join(plain) or 'none'}")
    if plain.get("format", 1) != 1:
        raise ConfigError(f"results of format {plain['format']!r}; this version writes pages of format 1")
    return _write(Path(path), _render(plain))


def _render(results: Mapping[str, Any]) -> str:
    """The page as HTML."""
    import jinja2

    folder = resources.files("softprompts.evaluation")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    return template.render(
        style=style,
        title=results["title"],
        about=" · ".join(map(str, filter(None, (results["task"], results.get("created"))))),
        headline=_headline(results.get("summary") or {}),
        facts=_facts(results),
        warnings=results.get("warnings") or (),
        study_tables=list(map(_study_table, results.get("tables") or [])),
        study_plots=_study_plots(results),
        similarities=_similarities(results),
        runs=_run_table(results),
        seed_means=_seed_means(results),
        training_plots=_training_plots(results),
        intervals=interval_plot(results.get("scores") or {}, results.get("scores_before") or {}),
        scores=_score_table(results),
        confusion_plot=_confusion_plot(results),
        confusions=_confusion_table(results),
        classes=_class_table(results),
        examples=_example_table(_examples(results)[:FIRST_EXAMPLES]),
        more_examples=_example_table(_examples(results)[FIRST_EXAMPLES:]),
        nearest_words=_nearest_words(results),
        commands=results.get("next") or (),
        settings=_settings(results),
    )


def _plain(value: Any, where: str) -> Any:
    """The value as JSON has it; `where` names it in the error."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    elif hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, where) for item in value), key=str)
    raise TypeError(f"{where} is a {type(value).__name__}; results hold strings, numbers, lists and dictionaries")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())
    return path


# The content of tables. The template tells cells apart by `kind`.


@dataclass(frozen=True)
class Number:
    """A number as people read it in `text`, with its exact value for machines; None: a dash."""

    value: float | None
    text: str
    kind: ClassVar[str] = "number"


@dataclass(frozen=True)
class Interval:
    """The bounds of an interval, of which any may be missing."""

    bounds: Sequence[Number]
    kind: ClassVar[str] = "interval"


@dataclass(frozen=True)
class Mean:
    """A mean over runs: the number, its spread (` ± 0.012` or nothing), and how many runs (`3 runs`)."""

    mean: Number
    spread: str
    runs: str
    kind: ClassVar[str] = "mean"


@dataclass(frozen=True)
class Word:
    """A word with a cosine."""

    word: str
    cosine: Number
    kind: ClassVar[str] = "word"


@dataclass(frozen=True)
class Text:
    """A text: as it is, or with the look `code`, `quiet`, `good` or `bad`; `note` is a smaller text below it."""

    text: str
    look: str = ""
    note: str | None = None
    kind: ClassVar[str] = "text"


Cell = Number | Interval | Mean | Word | Text


@dataclass(frozen=True)
class Column:
    """A column of a table; numeric ones are aligned right."""

    name: str
    numeric: bool


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading. A table without rows does not appear."""

    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def cells(self, row: Sequence[Cell]) -> Iterator[tuple[Column, Cell]]:
        """The cells of a row with their columns."""
        return zip(self.columns, row, strict=True)


def make_table(names: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", title: str = "") -> Table:
    """A table of plain values and cells.

    Args:
        names: The names of the columns.
        rows: As many values a row as there are columns; None becomes a dash. A column whose first value is a number
            is numeric.
        caption: A line above the table.
        title: The heading of the table's section, where it has its own section.
    """
    rows = list(rows)
    first = rows[0] if rows else [""] * len(names)
    columns = [Column(name, _is_numeric(value)) for name, value in zip(names, first, strict=True)]
    return Table(title, caption, columns, [list(map(_cell, row)) for row in rows])


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Interval):
        return bool(value.bounds)
    return isinstance(value, (int, float, Number, Mean)) and not isinstance(value, bool)


def _cell(value: Any) -> Cell:
    if isinstance(value, Cell):
        return value
    return _number(value) if value is None or _is_numeric(value) else Text(str(value))


def _number(value: float | None, digits: int | None = None) -> Number:
    """A number with so many decimals; None: as many as it needs."""
    if value is None:
        return Number(None, "–")
    return Number(value, format_number(value) if digits is None else f"{value:.{digits}f}")


def _interval(score: Mapping[str, Any]) -> Interval:
    return Interval([_number(score[key], 3) for key in ("low", "high") if score.get(key) is not None])


# The summary


@dataclass(frozen=True)
class Headline:
    """The headline score after training, before it where that is known, and a sentence about both."""

    before: Number | None
    after: Number
    sentence: str


@dataclass(frozen=True)
class Fact:
    """A figure of the summary."""

    name: str
    number: Number


def _headline(summary: Mapping[str, Any]) -> Headline | None:
    before = summary.get("before") or {}
    after = summary.get("after") or {}
    if not after:
        return None
    metric = summary.get("metric") or "score"
    sentence = f"{metric} on {after.get('n', 0):,} rows{format_interval(after, ' (95 % interval {} to {})')}"
    if before:
        sentence += f"; before training {format_score(before)}"
    if after.get("illegal"):
        sentence += f". {after['illegal']:,} outputs were no legal answer"
    for score in (before, after):
        if score.get("note"):
            sentence += f". {score['note']}"
    return Headline(_number(before.get("value"), 3) if before else None, _number(after.get("value"), 3), f"{sentence}.")


def _facts(results: Mapping[str, Any]) -> list[Fact]:
    summary = results.get("summary") or {}
    rows = results.get("rows") or {}
    trainable = summary.get("trainable")
    moved = summary.get("moved")
    values = {"steps": summary.get("steps"), "trainable": trainable}
    if summary.get("share") is not None:
        values["% of the model's numbers"] = 100 * summary["share"]
    if moved is not None and trainable is not None and moved < trainable:  # of a table only the rows that were read
        values["moved in training"] = moved
    values["tokens per second"] = summary.get("tokens_per_second")
    values |= {f"{part} rows": count for part, count in rows.items()}
    facts = [Fact(name, _number(value)) for name, value in values.items() if value is not None]
    seconds = summary.get("seconds")
    if seconds is not None:
        facts.insert(1, Fact("time in all", Number(seconds, _duration(seconds))))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# The sections


def _study_table(table: Mapping[str, Any]) -> Table:
    """A table of a study: title, columns, and rows whose cells may be {mean, sd, n}."""
    rows = [list(map(_mean_cell, row)) for row in table["rows"]]
    return make_table(table["columns"], rows, title=table["title"])


def _mean_cell(value: Any) -> Any:
    """A cell {mean, sd, n} as people read it; fractions with three decimals."""
    if isinstance(value, Mapping):
        spread = "" if value.get("sd") is None else f" ± {value['sd']:.3f}"
        return Mean(_number(value["mean"], 3), spread, f"{value['n']} run{'s' * (value['n'] != 1)}")
    return _number(value, 3) if isinstance(value, float) else value


def _study_plots(results: Mapping[str, Any]) -> list[Plot]:
    """Line plots of studies; curves are smoothed, and points that were measured one by one are not."""
    plots = []
    for plot in results.get("plots") or []:
        lines = []
        for line in plot["lines"]:
            dots = line.get("dots", False)
            points = line["points"] if dots else smooth(thin(line["points"]))
            lines.append(Line(line["name"], points, line.get("look", "after"), dots))
        plots.append(line_plot(plot["title"], lines, plot.get("axis", "step")))
    return _drawn(plots)


def _similarities(results: Mapping[str, Any]) -> list[Plot]:
    heatmaps = results.get("heatmaps") or []
    return _drawn(similarity_plot(plot["title"], plot["labels"], plot["matrix"]) for plot in heatmaps)


def _drawn(plots: Iterable[Plot | None]) -> list[Plot]:
    return [plot for plot in plots if plot is not None]


def _run_table(results: Mapping[str, Any]) -> Table:
    """The runs that trained together."""
    rows = []
    for run in results.get("runs") or []:
        before = run.get("before") or {}
        after = run.get("after") or {}
        row = [run["name"], run["task"], _differences(run["differs"]), run.get("metric") or "–"]
        row += [_number(run.get("loss"), 3), _number(before.get("value"), 3), _number(after.get("value"), 3)]
        rows.append([*row, _interval(after), Text("failed", "bad") if run.get("failed") else ""])
    columns = ["run", "task", "what differs", "metric", "last loss", "before", "after", "95 % interval", ""]
    return make_table(columns, rows)


def _seed_means(results: Mapping[str, Any]) -> Table:
    """Mean and standard deviation of runs that differ in their seeds only."""
    rows = []
    for group in results.get("groups") or []:
        row = [_differences(group["differs"]), group["task"], group["metric"]]
        rows.append([*row, _number(group["mean"], 3), _number(group["sd"], 3), group["n"]])
    columns = ["what differs", "task", "metric", "mean", "standard deviation", "runs"]
    return make_table(columns, rows, "Over the seeds")


def _differences(differs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in differs.items()) or "–"


def _training_plots(results: Mapping[str, Any]) -> list[Plot]:
    curve = results.get("curve") or []
    metric = (results.get("summary") or {}).get("metric") or "score"
    validation = _points(results.get("validation") or [], "value")
    plots = [
        line_plot("Loss", _raw_and_smoothed(_points(curve, "loss"))),
        line_plot(f"Validation {metric}", [Line(metric, validation, dots=True)]),
        line_plot("Size of the prompt, rms(P) / rms(E)", [Line("ratio", _points(curve, "rms_ratio"))]),
        line_plot("Learning rate", [Line("rate", _points(curve, "rate"))]),
        line_plot("Tokens per second", _raw_and_smoothed(_points(curve, "tokens_per_second"))),
    ]
    measures: dict[str, list[tuple[float, float]]] = {}
    for row in curve:
        values = row.get("measures") or {}
        for name in values:
            measures.setdefault(name, []).extend(_points([{"step": row.get("step"), **values}], name))
    for name, points in measures.items():
        plots.append(line_plot(name.replace("_", " ").capitalize(), [Line(name, thin(points))]))
    return _drawn(plots)


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The values of a key by step."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None and row.get("step") is not None]


def _raw_and_smoothed(points: Sequence[tuple[float, float]]) -> list[Line]:
    return [Line("each step", points, "raw"), Line("smoothed", smooth(thin(points)))]


def _score_table(results: Mapping[str, Any]) -> Table:
    before = results.get("scores_before") or {}
    rows = []
    for name, score in (results.get("scores") or {}).items():
        about = METRICS[name].about if name in METRICS else ""
        row: list[Any] = [Text(name, note=" · ".join(filter(None, (about, score.get("note")))))]
        if before:
            row.append(_number((before.get(name) or {}).get("value"), 3))
        rows.append([*row, _number(score.get("value"), 3), _interval(score), score.get("n"), score.get("illegal")])
    columns = ["metric", *(["before"] if before else []), "after", "95 % interval", "rows", "illegal"]
    return make_table(columns, rows)


def _confusion_plot(results: Mapping[str, Any]) -> Plot | None:
    confusion = results.get("confusion") or {}
    labels = confusion.get("labels") or []
    return heatmap(labels, confusion.get("matrix") or []) if 0 < len(labels) <= MAX_PLOT_LABELS else None


def _confusion_table(results: Mapping[str, Any]) -> Table:
    """The most frequent confusions, where there are too many labels for a plot."""
    confusion = results.get("confusion") or {}
    labels = confusion.get("labels") or []
    rows = []
    if len(labels) > MAX_PLOT_LABELS:
        for gold, counts in enumerate(confusion.get("matrix") or []):
            for predicted, count in enumerate(counts):
                if count and gold != predicted:
                    rows.append((labels[gold], [*labels, "no label"][predicted], count))
    rows.sort(key=lambda row: -row[2])
    return make_table(["gold", "predicted", "rows"], rows[:MAX_CONFUSIONS], "Most frequent confusions")


def _class_table(results: Mapping[str, Any]) -> Table:
    figures = ("precision", "recall", "f1")
    rows = []
    for score in results.get("per_class") or []:
        rows.append([str(score["label"]), *(_number(score[figure], 3) for figure in figures), score["support"]])
    return make_table(["label", *figures, "support"], rows)


def _examples(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    examples: Sequence[Mapping[str, Any]] = results.get("examples") or []
    return examples


def _example_table(examples: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for example in examples:
        row = [example.get("input"), example.get("gold")]
        for key in ("before", "after"):
            row.append(Text("no legal answer", "quiet") if example.get(key) is None else example[key])
        rows.append([*row, Text("✓ right", "good") if example.get("correct") else Text("✗ wrong", "bad")])
    return make_table(["input", "gold", "before", "after", "result"], rows)


def _nearest_words(results: Mapping[str, Any]) -> Table:
    tokens = results.get("nearest_words") or []
    most = max((len(token["words"]) for token in tokens), default=0)
    rows = []
    for token in tokens:
        words = [Word(word, _number(cosine, 2)) for word, cosine in token["words"]]
        rows.append([token["row"], _number(token["norm"], 3), *words, *[""] * (most - len(words))])
    return make_table(["prompt token", "norm", *(f"{rank}." for rank in range(1, most + 1))], rows)


def _settings(results: Mapping[str, Any]) -> list[Table]:
    """Configuration, seeds, machine and versions, a table each."""
    tables = []
    for title in ("Configuration", "Seeds", "Machine", "Versions"):
        settings = results.get("config" if title == "Configuration" else title.lower())
        if settings:
            rows = []
            for name, value in flatten(settings):
                text = str(value) if isinstance(value, (str, int, float)) else json.dumps(value)
                rows.append([name, Text(text, "code")])
            tables.append(make_table(["name", "value"], rows, title))
    return tables


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings with their dotted names."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else key)
    else:
        yield name, value
