"""One self-contained HTML page (and one JSON file) of what a run found: no script, no font, no image from elsewhere.

Plots are drawn as inline SVG by small functions, so that they take the page's own colours in light, dark and print.
Text sizes and colours are the style sheet's alone; the drawing functions only place things.
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
from pathlib import Path
from typing import Any

from softprompts.metrics import METRICS

WIDTH, HEIGHT = 480, 270  # of a line plot, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 14, 46
MOST_POINTS, MOST_LABELS, FIRST_EXAMPLES = 500, 40, 20


@dataclass(frozen=True)
class Markup:
    """HTML that is already safe; every other string is escaped on its way into the page."""

    html: str


@dataclass(frozen=True)
class Line:
    """One line of a plot: points (x, y), drawn with the style sheet's class `look`; `dots` marks each point."""

    name: str
    points: Sequence[tuple[float, float]]
    look: str = "after"
    dots: bool = False


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
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_safe(plain['title'])}</title>\n<style>{STYLE}</style>\n</head>\n"
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


def _shown(value: float, digits: int | None = None) -> str:
    """A number for people: thousands in groups, four significant digits, or `digits` behind the point."""
    if digits is not None:
        return f"{value:.{digits}f}"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figure(value: float | None, digits: int | None = None) -> Markup:
    """A number as people read it, with its exact value beside it for machines."""
    if value is None:
        return Markup('<data value="">–</data>')
    return Markup(f'<data value="{value!r}">{_shown(value, digits)}</data>')


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


# Plots: each is a figure with a caption; the label read aloud carries the figures that the eye would take from it.


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, that enclose low and high."""
    span = max(high - low, 1e-6 * abs(high)) or 1.0  # a constant line gets a scale too
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / 4 * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{index * step:.10g}") for index in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, end: float, value: float) -> float:
    return round(start + (value - low) / (high - low) * (end - start), 1)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours until at most MOST_POINTS are left: a page of 50 000 steps stays small."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over a centred window of a fifteenth of the points, cut off at both ends."""
    half, found = max(1, len(points) // 30), []
    for at, (x, _) in enumerate(points):
        window = points[max(0, at - half) : at + half + 1]
        found.append((x, sum(y for _, y in window) / len(window)))
    return found


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None and row.get("step") is not None]


def _frame(title: str, label: str, size: tuple[float, float], body: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    keys = "".join(f'<span class="key {look}">{_safe(name)}</span>' for name, look in legend)
    return (
        f"<figure>\n<figcaption>{_safe(title)}{keys}</figcaption>\n"
        f'<div class="scroll"><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" '
        f'aria-label="{_safe(label)}" style="--units:{size[0]:g}">\n{body}</svg></div>\n</figure>\n'
    )


def _line_plot(title: str, lines: Sequence[Line]) -> str:
    """Draw lines over steps; nothing where no line has two points."""
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return ""
    xs, ys = ([point[at] for line in lines for point in line.points] for at in (0, 1))
    across, up = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    across = [tick for tick in across if min(xs) <= tick <= max(xs)]  # steps fill the width; only y is rounded outwards
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _scale(min(xs), max(xs) + 1e-9, LEFT, right, x), _scale(up[0], up[-1], floor, TOP, y)

    parts = []
    for tick in up:
        y = place(min(xs), tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" class="end">{_shown(tick)}</text>')
    for tick in across:
        parts.append(f'<text x="{place(tick, up[0])[0]}" y="{floor + 17}" class="middle">{_shown(tick)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" class="middle">step</text>')
    for line in lines:
        spots = [place(*point) for point in line.points]
        parts.append(f'<path class="line {line.look}" d="M{"L".join(f"{x} {y}" for x, y in spots)}"/>')
        for (x, y), (step, value) in zip(spots, line.points, strict=True) if line.dots else ():
            dot = f'<circle class="dot {line.look}" cx="{x}" cy="{y}" r="4">'
            parts.append(f"{dot}<title>step {step:g}: {_shown(value)}</title></circle>")
    main = lines[0].points
    values = [value for _, value in main]
    label = (
        f"{title} from step {main[0][0]:g} to {main[-1][0]:g}: first {_shown(values[0])}, last {_shown(values[-1])}, "
        f"lowest {_shown(min(values))}, highest {_shown(max(values))}"
    )
    legend = [(line.name, line.look) for line in lines] if len(lines) > 1 else []
    return _frame(title, label, (WIDTH, HEIGHT), "\n".join(parts) + "\n", legend)


def _interval_plot(scores: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw each metric before and after as a dot on its interval."""
    pairs = {name: [("before", before.get(name) or {}), ("after", scores[name])] for name in scores}
    drawn = [one for pair in pairs.values() for _, one in pair if one.get("value") is not None]
    if not drawn:
        return ""
    edges = [one[key] for one in drawn for key in ("low", "value", "high") if one.get(key) is not None]
    ticks = _ticks(min(edges), max(edges))
    start, end, parts, said, y = 24, WIDTH - 76, [], [], 8
    for name, pair in pairs.items():
        y += 16
        parts.append(f'<text x="{start}" y="{y}" class="name">{_safe(name)}</text>')
        for look, one in pair:
            if one.get("value") is None:
                continue
            y += 24
            low, x, high = (
                _scale(ticks[0], ticks[-1], start, end, one["value"] if one.get(key) is None else one[key])
                for key in ("low", "value", "high")
            )
            parts.append(
                f'<path class="grid" d="M{start} {y}H{end}"/><path class="whisker {look}" d="M{low} {y}H{high}"/>'
            )
            parts.append(f'<circle class="dot {look}" cx="{x}" cy="{y}" r="6"/>')
            parts.append(f'<text x="{WIDTH - 8}" y="{y}" class="end {look}">{one["value"]:.3f}</text>')
            said.append(f"{name} {look} {_with_interval(one)}")
        y += 12
    for tick in ticks:
        x = _scale(ticks[0], ticks[-1], start, end, tick)
        parts.append(
            f'<path class="grid" d="M{x} {y}v6"/><text x="{x}" y="{y + 20}" class="middle">{_shown(tick)}</text>'
        )
    legend = [(look, look) for look in ("before", "after") if any(dict(pair)[look] for pair in pairs.values())]
    return _frame("95 % intervals", "; ".join(said), (WIDTH, y + 34), "\n".join(parts) + "\n", legend)


def _heatmap(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> str:
    """Draw the confusion matrix: counts, shaded by their share of the row; an empty illegal column is left out."""
    columns = [*labels, "no label"][: max((len(row) for row in matrix), default=0)]
    if len(columns) > len(labels) and not any(row[len(labels)] for row in matrix):
        columns = columns[: len(labels)]
    short = [label if len(label) < 15 else f"{label[:7]}…{label[-6:]}" for label in map(str, columns)]
    side, left = 46, 34 + 8 * max(map(len, short))
    top, parts = round(30 + 5.2 * max(map(len, short))), []
    for at, name in enumerate(short):
        x = left + side * at + side / 2 + 4
        parts.append(f'<text transform="translate({x} {top - 8}) rotate(-40)">{_safe(name)}</text>')
    for i, row in enumerate(matrix):
        y, total = top + side * i, sum(row) or 1
        parts.append(f'<text x="{left - 8}" y="{y + side / 2}" class="end">{_safe(short[i])}</text>')
        for j, count in enumerate(row[: len(columns)]):
            x, shade = left + side * j, round(0.02 + 0.53 * count / total, 3)
            title = f"gold {_safe(labels[i])}, predicted {_safe(columns[j])}: {count}"
            box = f'x="{x}" y="{y}" width="{side - 2}" height="{side - 2}" rx="4" fill-opacity="{shade}"'
            place = f'x="{x + side / 2 - 1}" y="{y + side / 2 - 1}" class="count{"" if count else " none"}"'
            parts.append(f'<g><title>{title}</title><rect class="heat" {box}/><text {place}>{count}</text></g>')
    right = sum(row[at] for at, row in enumerate(matrix))
    label = f"Confusion matrix of {len(labels)} labels: {right} of {sum(map(sum, matrix))} predictions on the diagonal"
    size = (left + side * len(columns) + 6 * len(short[-1]), top + side * len(matrix))
    return _frame("Gold (rows) and predicted (columns)", label, size, "\n".join(parts) + "\n")


# The sections of the page, in order: each takes the results and answers "" where there is nothing to show.


def _interval(one: Mapping[str, Any], shape: str) -> str:
    low, high = one.get("low"), one.get("high")
    return "" if low is None or high is None else shape.format(f"{low:.3f}", f"{high:.3f}")


def _with_interval(one: Mapping[str, Any]) -> str:
    return "undefined" if one.get("value") is None else f"{one['value']:.3f}{_interval(one, ' ({} to {})')}"


def _summary(results: Mapping[str, Any]) -> str:
    found, rows = results.get("summary") or {}, results.get("rows") or {}
    about = " · ".join(str(part) for part in (results["task"], results.get("created")) if part)
    top = f'<header>\n<h1>{_safe(results["title"])}</h1>\n<p class="quiet">{_safe(about)}</p>\n</header>\n'
    before, after, metric = found.get("before") or {}, found.get("after") or {}, found.get("metric") or "score"
    hero = ""
    if after:
        change = f'<span class="before">{_figure(before.get("value"), 3).html} →</span> ' if before else ""
        text = f"{metric} on {after.get('n', 0):,} rows{_interval(after, ' (95 % interval {} to {})')}"
        text += f"; before training {_with_interval(before)}" if before else ""
        text += f". {after['illegal']:,} outputs were no legal answer" if after.get("illegal") else ""
        text += "".join(f". {one['note']}" for one in (before, after) if one.get("note"))
        hero = (
            f'<p class="hero">{change}<strong>{_figure(after.get("value"), 3).html}</strong></p><p>{_safe(text)}.</p>\n'
        )
    facts = [("steps", found.get("steps")), ("trainable", found.get("trainable"))]
    facts += [("tokens per second", found.get("tokens_per_second"))] + [(f"{name} rows", rows[name]) for name in rows]
    tiles = [(name, _figure(value).html) for name, value in facts if value is not None]
    if found.get("seconds") is not None:
        tiles.insert(1, ("training time", f'<data value="{found["seconds"]!r}">{_duration(found["seconds"])}</data>'))
    listed = "".join(f"<div><dt>{_safe(name)}</dt><dd>{value}</dd></div>" for name, value in tiles)
    warned = "".join(f"<li>{_safe(warning)}</li>" for warning in results.get("warnings") or ())
    warned = f'<section class="warned"><h2>Warnings</h2><ul>{warned}</ul></section>\n' if warned else ""
    summary = (
        f'<section class="summary">{hero}{f"<dl>{listed}</dl>" if tiles else ""}</section>\n' if hero or tiles else ""
    )
    return top + summary + warned


def _training(results: Mapping[str, Any]) -> str:
    curve = results.get("curve") or []
    loss, rate, ratio = (_points(curve, key) for key in ("loss", "rate", "rms_ratio"))
    metric = (results.get("summary") or {}).get("metric") or "score"
    loss, tested = _thin(loss), _points(results.get("validation") or [], "value")
    plots = _line_plot("Loss", [Line("each step", loss, "raw"), Line("smoothed", _smooth(loss))])
    plots += _line_plot(f"Validation {metric}", [Line(metric, tested, dots=True)])
    plots += _line_plot("Size of the prompt, rms(P) / rms(E)", [Line("ratio", _thin(ratio))])
    plots += _line_plot("Learning rate", [Line("rate", _thin(rate))])
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
    return _section("Scores", f'<div class="plots">{_interval_plot(scores, before)}{table(columns, rows)}</div>\n')


def _classes(results: Mapping[str, Any]) -> str:
    shown = results.get("confusion") or {}
    labels, matrix = shown.get("labels") or [], shown.get("matrix") or []
    plot = ""
    if labels and len(labels) <= MOST_LABELS:
        plot = f'<div class="{"wide" if len(labels) > 12 else "half"}">{_heatmap(labels, matrix)}</div>'
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
    for title, key in (("Configuration", "config"), ("Seeds", "seeds"), ("Versions", "versions")):
        if results.get(key):
            rows = [(name, Markup(f"<code>{_safe(value)}</code>")) for name, value in _flat(results[key])]
            parts.append(f"<details><summary>{title}</summary>{table(['name', 'value'], rows, title)}</details>\n")
    return _section("The run", *parts)


def _next(results: Mapping[str, Any]) -> str:
    return _section("Next", *(f"<pre><code>{_safe(command)}</code></pre>\n" for command in results.get("next") or ()))


SECTIONS = (_summary, _training, _scores, _classes, _examples, _nearest, _next, _run)

STYLE = """
:root { color-scheme: light; --ground: #f6f7f9; --panel: #fff; --ink: #1b2129; --quiet: #59636e; --edge: #dfe3e8;
  --after: #1f5fbf; --before: #737d88; --good: #1a6e3c; --bad: #b3261e; --warned: #fff6df; --warned-edge: #e5c15b; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ground: #12151a; --panel: #1a1f26; --ink: #e6e9ed; --quiet: #a0aab5; --edge:
    #313944; --after: #7db0ff; --before: #98a3af; --good: #6fce95; --bad: #ff8f87; --warned: #2e2817; --warned-edge:
    #7d6a2b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: clamp(1rem, 3vw, 2.5rem) clamp(0.75rem, 3vw, 2rem) 3rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 0.75rem; }
p { margin: 0.25rem 0 0.75rem; overflow-wrap: anywhere; }
section { background: var(--panel); border: 1px solid var(--edge); border-radius: 12px; margin-top: 1.25rem;
  padding: clamp(0.75rem, 2.5vw, 1.5rem); }
.warned { background: var(--warned); border-color: var(--warned-edge); }
.warned ul { margin: 0; padding-left: 1.2rem; } .warned li { overflow-wrap: anywhere; }
.quiet { color: var(--quiet); }
.hero { font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.1; font-variant-numeric: tabular-nums; margin: 0; }
.hero strong { color: var(--after); font-size: 1.5em; }
.hero .before { color: var(--before); white-space: nowrap; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.2rem, 1fr)); gap: 0.75rem 1.25rem; margin: 1rem
  0 0; }
dt { color: var(--quiet); font-size: 0.85rem; }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem; }
.plots > * { min-width: 0; }
.wide { grid-column: 1 / -1; }
figure { margin: 0 0 0.5rem; min-width: 0; break-inside: avoid; }
figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 0.35rem; }
.key { font-weight: 400; color: var(--quiet); margin-left: 1rem; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 1.1em; height: 0.25em; border-radius: 2px; margin-right:
  0.4em; vertical-align: middle; background: var(--after); }
.key.before::before { background: var(--before); }
.key.raw::before { opacity: 0.35; }
svg { display: block; width: 100%; min-width: calc(var(--units) * 0.68px); max-width: calc(var(--units) * 1.2px); }
svg text { font-size: 13px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; dominant-baseline: central; }
svg .name { fill: var(--ink); font-weight: 600; } svg .grid { stroke: var(--edge); fill: none; }
svg .line { fill: none; stroke: var(--after); stroke-width: 2.2; stroke-linejoin: round; }
svg .line.raw { stroke-width: 1; opacity: 0.4; } svg .dot { fill: var(--after); }
svg .whisker { stroke: var(--after); stroke-width: 4; stroke-linecap: round; opacity: 0.45; }
svg .whisker.before { stroke: var(--before); } svg .dot.before { fill: var(--before); }
svg text.after { fill: var(--ink); font-weight: 600; } svg .heat { fill: var(--after); }
svg .count { text-anchor: middle; dominant-baseline: central; fill: var(--ink); }
svg .count.none { opacity: 0.45; }
.scroll { overflow-x: auto; max-width: 100%; } .scroll:focus-visible { outline: 2px solid var(--after); }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
caption { text-align: left; font-weight: 600; } details caption { display: none; }
th, td { text-align: left; padding: 0.4rem 0.6rem 0.4rem 0; border-bottom: 1px solid var(--edge); vertical-align:
  top; }
thead th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.word { white-space: nowrap; }
small { display: block; min-width: 7.5rem; color: var(--quiet); font-weight: 400; max-width: 28rem; }
em { color: var(--quiet); }
.examples table { min-width: 38rem; }
.examples tbody th { width: 50%; overflow-wrap: anywhere; font-weight: 400; }
.good { color: var(--good); white-space: nowrap; }
.bad { color: var(--bad); white-space: nowrap; }
code { font: 0.9em/1.5 ui-monospace, monospace; }
pre { margin: 0 0 0.5rem; padding: 0.6rem 0.8rem; overflow-x: auto; background: var(--ground); border-radius: 8px; }
summary { cursor: pointer; padding: 0.35rem 0; font-weight: 600; }
@media (max-width: 600px) {
  svg text { font-size: 16px; } }
@media print {
  body { background: none; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  section { border: 0; padding: 0; } h2, figcaption { break-after: avoid; } tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; } }
"""
