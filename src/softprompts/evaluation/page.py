"""One self-contained HTML page (and one JSON file) of what a run found: no script, no font, no image from elsewhere.

The style sheet is page.css beside this file; the plots are those of plots.py.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from softprompts.evaluation.metrics import METRICS
from softprompts.evaluation.plots import (
    Line,
    heatmap,
    interval,
    interval_plot,
    line_plot,
    shown,
    similarities,
    smooth,
    thin,
    with_interval,
)

MOST_LABELS, FIRST_EXAMPLES = 40, 20


@dataclass(frozen=True)
class Markup:
    """HTML that is already safe; every other string is escaped on its way into the page."""

    html: str


def write_results(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write `results` as JSON, under a temporary name that is renamed when complete; returns the path.

    Dataclasses, numpy scalars and arrays, sets and paths become plain values. nan and the infinities, which JSON does
    not have, become null. Raises TypeError, naming the key, for anything else.
    """
    return _replace(Path(path), json.dumps(_plain(results, "results"), indent=1, allow_nan=False) + "\n")


def write_page(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write the page of `results` (what results.json holds), under a temporary name renamed when complete.

    Only `title` and `task` must be there; a section whose keys are missing is left out, unknown keys are ignored.
    Raises ValueError for a missing title or task, or another format than 1.
    """
    plain = _plain(results, "results")
    for key in ("title", "task"):
        if not plain.get(key):
            raise ValueError(f"results hold no {key!r}; keys: {', '.join(plain) or 'none'}")
    if plain.get("format", 1) != 1:
        raise ValueError(f"results of format {plain['format']!r}; this version writes pages of format 1")
    sections = [section(plain) for section in SECTIONS]
    style = resources.files("softprompts.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_safe(plain['title'])}</title>\n<style>\n{style}</style>\n</head>\n"
    )
    return _replace(Path(path), f"{head}<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Lay out rows of cells as an HTML table in a box that scrolls by itself.

    Strings are escaped, None is a dash, Markup goes in as it is; the first cell of a row is its heading, and a column
    whose first cell is a number is aligned right. Every row has as many cells as there are columns.
    """
    rows = list(rows)
    right = [_is_figure(cell) for cell in rows[0]] if rows else [False] * len(columns)
    looks = [' class="figure"' if figure else "" for figure in right]
    head = "".join(f'<th scope="col"{look}>{_safe(name)}</th>' for name, look in zip(columns, looks, strict=True))
    body = []
    for row in rows:
        cells = [f"<td{look}>{_cell(cell)}</td>" for cell, look in zip(row, looks, strict=True)]
        cells[0] = f'<th scope="row"{looks[0]}>{_cell(row[0])}</th>'
        body.append(f"<tr>{''.join(cells)}</tr>\n")
    name = f"<caption>{_safe(caption)}</caption>" if caption else ""
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{_safe(caption or ", ".join(columns))}">'
    return f"{box}<table>{name}<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody></table></div>\n"


def _plain(value: Any, where: str) -> Any:
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
        return [_plain(item, f"{where}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, where) for item in value), key=str)
    raise TypeError(f"{where} is a {type(value).__name__}; results hold strings, numbers, lists and dictionaries")


def _replace(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _safe(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _figure(value: float | None, digits: int | None = None) -> Markup:
    """A number as people read it, with its exact value beside it for machines."""
    if value is None:
        return Markup('<data value="">–</data>')
    return Markup(f'<data value="{value!r}">{shown(value) if digits is None else f"{value:.{digits}f}"}</data>')


def _is_figure(cell: Any) -> bool:
    number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    return number or (isinstance(cell, Markup) and cell.html.startswith("<data"))


def _cell(cell: Any) -> str:
    if isinstance(cell, Markup):
        return cell.html
    return _figure(cell).html if cell is None or _is_figure(cell) else _safe(cell)


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{_safe(title)}</h2>\n{''.join(parts)}</section>\n" if any(parts) else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# The sections of the page, in order: each takes the results and answers "" where there is nothing to show.


def _summary(results: Mapping[str, Any]) -> str:
    found, rows = results.get("summary") or {}, results.get("rows") or {}
    about = " · ".join(str(part) for part in (results["task"], results.get("created")) if part)
    top = f'<header>\n<h1>{_safe(results["title"])}</h1>\n<p class="quiet">{_safe(about)}</p>\n</header>\n'
    before, after, metric = found.get("before") or {}, found.get("after") or {}, found.get("metric") or "score"
    hero = ""
    if after:
        change = f'<span class="before">{_figure(before.get("value"), 3).html} →</span> ' if before else ""
        text = f"{metric} on {after.get('n', 0):,} rows{interval(after, ' (95 % interval {} to {})')}"
        text += f"; before training {with_interval(before)}" if before else ""
        text += f". {after['illegal']:,} outputs were no legal answer" if after.get("illegal") else ""
        text += "".join(f". {one['note']}" for one in (before, after) if one.get("note"))
        hero = (
            f'<p class="hero">{change}<strong>{_figure(after.get("value"), 3).html}</strong></p><p>{_safe(text)}.</p>\n'
        )
    facts = [(name, found.get(name)) for name in ("steps", "trainable")]
    facts += [("% of the model's numbers", 100 * found["share"])] if found.get("share") is not None else []
    facts += [("moved in training", found["moved"])] if _fewer(found.get("moved"), found.get("trainable")) else []
    facts += [("tokens per second", found.get("tokens_per_second"))] + [(f"{name} rows", rows[name]) for name in rows]
    tiles = [(name, _figure(value).html) for name, value in facts if value is not None]
    if found.get("seconds") is not None:
        tiles.insert(1, ("time in all", f'<data value="{found["seconds"]!r}">{_duration(found["seconds"])}</data>'))
    listed = "".join(f"<div><dt>{_safe(name)}</dt><dd>{value}</dd></div>" for name, value in tiles)
    warned = "".join(f"<li>{_safe(warning)}</li>" for warning in results.get("warnings") or ())
    warned = f'<section class="warned"><h2>Notes</h2><ul>{warned}</ul></section>\n' if warned else ""
    summary = (
        f'<section class="summary">{hero}{f"<dl>{listed}</dl>" if tiles else ""}</section>\n' if hero or tiles else ""
    )
    return top + summary + warned


def _fewer(moved: int | None, trainable: int | None) -> bool:
    """Whether training moved only some of the trained numbers, as it does of a table of words."""
    return moved is not None and trainable is not None and moved < trainable


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None and row.get("step") is not None]


def _training(results: Mapping[str, Any]) -> str:
    curve = results.get("curve") or []
    loss, rate, ratio, speed = (_points(curve, key) for key in ("loss", "rate", "rms_ratio", "tokens_per_second"))
    metric = (results.get("summary") or {}).get("metric") or "score"
    tested = _points(results.get("validation") or [], "value")
    plots = line_plot("Loss", [Line("each step", loss, "raw"), Line("smoothed", smooth(thin(loss)))])
    plots += line_plot(f"Validation {metric}", [Line(metric, tested, dots=True)])
    plots += line_plot("Size of the prompt, rms(P) / rms(E)", [Line("ratio", ratio)])
    plots += line_plot("Learning rate", [Line("rate", rate)])
    plots += line_plot("Tokens per second", [Line("each step", speed, "raw"), Line("smoothed", smooth(thin(speed)))])
    said = [{"step": row.get("step"), **(row.get("measures") or {})} for row in curve]
    for name in dict.fromkeys(key for row in said for key in row if key != "step"):
        plots += line_plot(name.replace("_", " ").capitalize(), [Line(name, thin(_points(said, name)))])
    return _section("Training", f'<div class="plots">{plots}</div>\n' if plots else "")


def _scores(results: Mapping[str, Any]) -> str:
    scores, before = results.get("scores") or {}, results.get("scores_before") or {}
    if not scores:
        return ""
    rows = []
    for name, one in scores.items():
        about = " · ".join(part for part in (METRICS[name].about if name in METRICS else "", one.get("note")) if part)
        ends = " to ".join(_figure(one[key], 3).html for key in ("low", "high") if one.get(key) is not None)
        old = [_figure((before.get(name) or {}).get("value"), 3)] if before else []
        first = [Markup(f"{_safe(name)}<small>{_safe(about)}</small>"), *old, _figure(one.get("value"), 3)]
        rows.append([*first, Markup(ends or "–"), one.get("n"), one.get("illegal")])
    columns = ["metric", *(["before"] if before else []), "after", "95 % interval", "rows", "illegal"]
    return _section("Scores", f'<div class="plots">{interval_plot(scores, before)}{table(columns, rows)}</div>\n')


def _classes(results: Mapping[str, Any]) -> str:
    shown = results.get("confusion") or {}
    labels, matrix = shown.get("labels") or [], shown.get("matrix") or []
    plot = ""
    if labels and len(labels) <= MOST_LABELS:
        plot = f'<div class="{"wide" if len(labels) > 12 else "half"}">{heatmap(labels, matrix)}</div>'
    elif labels:  # too many for a picture
        cells = [(i, j, count) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j and count]
        worst = sorted(cells, key=lambda cell: -cell[2])[:20]
        rows = [(labels[i], [*labels, "no label"][j], count) for i, j, count in worst]
        plot = table(["gold", "predicted", "rows"], rows, "Most frequent confusions")
    each, keys = results.get("per_class") or [], ("precision", "recall", "f1")
    lines = [[str(one["label"]), *(_figure(one[key], 3) for key in keys), one["support"]] for one in each]
    parts = plot + (table(["label", *keys, "support"], lines) if lines else "")
    return _section("Labels", f'<div class="plots">{parts}</div>\n' if parts else "")


def _examples(results: Mapping[str, Any]) -> str:
    rows = []
    for one in results.get("examples") or []:
        none = Markup("<em>no legal answer</em>")
        answers = [none if one.get(key) is None else one[key] for key in ("before", "after")]
        mark = Markup('<span class="good">✓ right</span>' if one.get("correct") else '<span class="bad">✗ wrong</span>')
        rows.append([one.get("input"), one.get("gold"), *answers, mark])
    columns = ["input", "gold", "before", "after", "result"]
    more = rows[FIRST_EXAMPLES:]
    shown = table(columns, rows[:FIRST_EXAMPLES], "") if rows else ""
    hidden = f"<details><summary>{len(more)} more</summary>{table(columns, more)}</details>\n" if more else ""
    return _section("Examples", f'<div class="examples">{shown}{hidden}</div>' if rows else "")


def _nearest(results: Mapping[str, Any]) -> str:
    found = results.get("nearest_words") or []
    rows = []
    for one in found:
        pairs = [f"<code>{_safe(word)}</code> {_figure(cosine, 2).html}" for word, cosine in one["words"]]
        rows.append(
            [one["row"], _figure(one["norm"], 3), *(Markup(f'<span class="word">{pair}</span>') for pair in pairs)]
        )
    most = max((len(row) - 2 for row in rows), default=0)
    rows = [row + [""] * (most + 2 - len(row)) for row in rows]
    columns = ["prompt token", "norm", *(f"{at}." for at in range(1, most + 1))]
    note = '<p class="quiet">The words nearest in direction to each prompt token, with the cosine.</p>\n'
    return _section("Nearest words", note + table(columns, rows) if rows else "")


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flat(item, f"{name}.{key}" if name else key)]
    return [(name, value if isinstance(value, (str, int, float)) else json.dumps(value))]


def _run(results: Mapping[str, Any]) -> str:
    parts = []
    for title, key in (
        ("Configuration", "config"),
        ("Seeds", "seeds"),
        ("Machine", "machine"),
        ("Versions", "versions"),
    ):
        if results.get(key):
            rows = [(name, Markup(f"<code>{_safe(value)}</code>")) for name, value in _flat(results[key])]
            parts.append(f"<details><summary>{title}</summary>{table(['name', 'value'], rows, title)}</details>\n")
    return _section("The run", *parts)


def _next(results: Mapping[str, Any]) -> str:
    return _section("Next", *(f"<pre><code>{_safe(command)}</code></pre>\n" for command in results.get("next") or ()))


def _differing(differs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in differs.items()) or "–"


def _compared(results: Mapping[str, Any]) -> str:
    """The table of runs that trained together, and what the seeds of equal runs make of it."""
    rows = []
    for one in results.get("runs") or []:
        after = one.get("after") or {}
        ends = " to ".join(_figure(after[key], 3).html for key in ("low", "high") if after.get(key) is not None)
        about = [one["name"], one["task"], _differing(one["differs"]), one.get("metric") or "–"]
        figures = [_figure(one.get("loss"), 3), _figure((one.get("before") or {}).get("value"), 3)]
        figures += [_figure(after.get("value"), 3), Markup(ends or "–")]
        rows.append([*about, *figures, Markup('<span class="bad">failed</span>' if one.get("failed") else "")])
    columns = ["run", "task", "what differs", "metric", "last loss", "before", "after", "95 % interval", ""]
    groups = []
    for one in results.get("groups") or []:
        facts = [_differing(one["differs"]), one["task"], one["metric"]]
        groups.append([*facts, _figure(one["mean"], 3), _figure(one["sd"], 3), one["n"]])
    names = ["what differs", "task", "metric", "mean", "standard deviation", "runs"]
    seeds = table(names, groups, "Over the seeds") if groups else ""
    return _section("Runs", table(columns, rows) if rows else "", seeds)


def _mean(cell: Any) -> Any:
    """A cell {mean, sd, n} as people read it; fractions to three places."""
    if isinstance(cell, Mapping):
        spread = "" if cell.get("sd") is None else f" ± {cell['sd']:.3f}"
        return Markup(f"{_figure(cell['mean'], 3).html}{spread}<small>{cell['n']} run{'s' * (cell['n'] != 1)}</small>")
    return _figure(cell, 3) if isinstance(cell, float) else cell


def _tables(results: Mapping[str, Any]) -> str:
    """Tables of studies: title, columns, and rows whose cells may be {mean, sd, n}."""
    parts = []
    for one in results.get("tables") or []:
        rows = [[_mean(cell) for cell in row] for row in one["rows"]]
        parts.append(_section(one["title"], table(one["columns"], rows) if rows else ""))
    return "".join(parts)


def _line(one: Mapping[str, Any]) -> Line:
    """A line of a study's plot; curves are smoothed, what was measured at a few points is not."""
    points = one["points"] if one.get("dots") else smooth(thin(one["points"]))
    return Line(one["name"], points, one.get("look", "after"), one.get("dots", False))


def _pictures(results: Mapping[str, Any]) -> str:
    """Line plots and heatmaps of studies."""
    lines = [
        line_plot(one["title"], [_line(each) for each in one["lines"]], one.get("axis", "step"))
        for one in results.get("plots") or []
    ]
    maps = [similarities(one["title"], one["labels"], one["matrix"]) for one in results.get("heatmaps") or []]
    boxes = [f'<div class="plots">{"".join(lines)}</div>\n' if any(lines) else ""]
    boxes += [f'<div class="half">{one}</div>\n' for one in maps if one]
    return _section("Curves and similarities", *boxes)


SECTIONS = (_summary, _tables, _pictures, _compared, _training, _scores, _classes, _examples, _nearest, _next, _run)
