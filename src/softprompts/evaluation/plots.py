"""The plots of a page: drawn by matplotlib, put into HTML as inline SVG that takes the page's own font and colors.

Every plot is a figure with a caption, and its label read aloud carries the figures that the eye would take from it.
Nothing here touches pyplot, the settings of whoever calls, or a clock: the same facts always give the same text.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:  # matplotlib takes a second to import, so only drawing does it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 420, 230  # of a line plot, in pixels; the page scales it a little
CELL = 44  # one side of a cell of the heatmap
MOST_POINTS = 500
_STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten

# What is drawn in one of these colors takes the style sheet's variable of that name.
COLORS = {"ink": "#00000a", "quiet": "#00000b", "edge": "#00000c", "accent": "#00000d", "before": "#00000e"}
MANY = {f"line{number}": f"#0000{15 + number:02x}" for number in range(1, 9)}  # of lines that only color tells apart
_VARIABLES = {color: f"var(--{name})" for name, color in (COLORS | MANY).items()}
_LINK = re.compile(r"^(?:url\()?#([\w.-]+)\)?$")  # in an attribute, to an id
_LOOK = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a label may hold dollars
    "text.color": COLORS["quiet"],
    "axes.labelcolor": COLORS["quiet"],
    "axes.edgecolor": COLORS["edge"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.labelcolor": COLORS["quiet"],
    "ytick.labelcolor": COLORS["quiet"],
    "xtick.color": COLORS["edge"],
    "ytick.color": COLORS["edge"],
    "ytick.major.size": 0,
    "grid.color": COLORS["edge"],
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # matplotlib brings it and measures with it; the style sheet puts the page's instead
    "font.size": 14,
    "axes.labelsize": 14,
    "xtick.labelsize": 14,
    "ytick.labelsize": 14,
}


@dataclass(frozen=True)
class Line:
    """One line of a plot: points (x, y); `dots` marks each point; `look` is after, before, raw (pale) or of MANY."""

    name: str
    points: Sequence[tuple[float, float]]
    look: str = "after"
    dots: bool = False


def shown(value: float) -> str:
    """Write a number for people: thousands in groups, or four significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def interval(one: Mapping[str, Any], shape: str) -> str:
    """Put the bounds of a score into `shape`; nothing where it has none."""
    low, high = one.get("low"), one.get("high")
    return "" if low is None or high is None else shape.format(f"{low:.3f}", f"{high:.3f}")


def with_interval(one: Mapping[str, Any]) -> str:
    """Write a score and, where it has them, its bounds."""
    return "undefined" if one.get("value") is None else f"{one['value']:.3f}{interval(one, ' ({} to {})')}"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors until at most MOST_POINTS are left: a page of 50 000 steps stays small."""
    if len(points) <= MOST_POINTS:
        return list(points)
    means = [part.mean(axis=0) for part in np.array_split(np.array(points, dtype=np.float64), MOST_POINTS)]
    return [(float(x), float(y)) for x, y in means]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average over a centered window of a fifteenth of the points, cut off at both ends."""
    half, ys = max(1, len(points) // 30), [y for _, y in points]
    return [(x, float(np.mean(ys[max(0, at - half) : at + half + 1]))) for at, (x, _) in enumerate(points)]


def line_plot(title: str, lines: Sequence[Line], axis: str = "step") -> str:
    """Draw lines over steps, or what `axis` says, thinned; nothing where no line has two points."""
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return ""

    def draw(figure: Figure) -> dict[str, list[str]]:
        from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

        axes, tips = figure.add_subplot(), {}
        for at, line in enumerate(lines):
            style: dict[str, Any] = {"color": (COLORS | MANY).get(line.look, COLORS["accent"])}
            style |= {"linewidth": 1, "alpha": 0.5} if line.look == "raw" else {"linewidth": 2.2}
            style |= {"marker": "o", "markersize": 7} if line.dots else {}
            xs, ys = zip(*thin(line.points), strict=True)
            axes.plot(xs, ys, gid=f"line{at}", clip_on=False, **style)
            if line.dots:
                tips[f"line{at}"] = [f"{axis} {shown(x)}: {shown(y)}" for x, y in zip(xs, ys, strict=True)]
        axes.margins(x=0.02 if tips else 0)
        low, high = axes.get_ylim()
        if high - low < 1e-6 * abs(high):  # constant but for rounding
            axes.set_ylim(low - abs(low) / 20, high + abs(high) / 20)
        axes.grid(axis="y")
        axes.set_xlabel(axis)
        whole = all(float(x).is_integer() for line in lines for x, _ in line.points)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=_STEPS))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if whole else "{x:g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        large = max(abs(y) for line in lines for _, y in line.points) >= 1000
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}") if large else ScalarFormatter(useOffset=False))
        return tips

    steps, values = zip(*lines[0].points, strict=True)
    said = {"first": values[0], "last": values[-1], "lowest": min(values), "highest": max(values)}
    label = f"{title} from {axis} {shown(steps[0])} to {shown(steps[-1])}: "
    label += ", ".join(f"{name} {shown(value)}" for name, value in said.items())
    legend = [(line.name, line.look) for line in lines] if len(lines) > 1 else []
    return _plot(title, label, draw, (WIDTH, HEIGHT), legend)


def interval_plot(scores: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw each metric before and after as a dot on its interval."""
    pairs = {name: [("before", before.get(name) or {}), ("after", scores[name])] for name in scores}
    pairs = {name: [(look, one) for look, one in pair if one.get("value") is not None] for name, pair in pairs.items()}
    pairs = {name: pair for name, pair in pairs.items() if pair}
    if not pairs:
        return ""
    lines = sum(len(pair) + 1.2 for pair in pairs.values())  # the name of a metric has a line of its own

    def draw(figure: Figure) -> dict[str, list[str]]:
        from matplotlib.ticker import MaxNLocator

        axes, y = figure.add_subplot(), 0.1
        for name, pair in pairs.items():
            across = axes.get_yaxis_transform()
            axes.text(0, y + 0.4, _printable(name), transform=across, va="center", weight="bold", color=COLORS["ink"])
            for at, (look, one) in enumerate(pair):
                _whisker(axes, y + 1.2 + at, look, one)
            y += len(pair) + 1.2
        axes.set_ylim(lines + 0.1, 0)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        return {}

    label = "; ".join(f"{name} {look} {with_interval(one)}" for name, pair in pairs.items() for look, one in pair)
    legend = [(look, look) for look in ("before", "after") if any(look in dict(pair) for pair in pairs.values())]
    return _plot("95 % intervals", label, draw, (WIDTH, round(36 + 24 * lines)), legend)


def heatmap(labels: Sequence[Any], matrix: Sequence[Sequence[int]]) -> str:
    """Draw the confusion matrix: counts, shaded by their share of the row; an empty illegal column is left out."""
    counts = np.array(matrix, dtype=np.int64).reshape(len(labels), -1)
    columns = [*map(str, labels), "no label"][: counts.shape[1]]
    if len(columns) > len(labels) and not counts[:, -1].any():
        columns, counts = columns[:-1], counts[:, :-1]

    def draw(figure: Figure) -> dict[str, list[str]]:
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        texts = [[str(count) for count in row] for row in counts.tolist()]
        tips = [
            f"gold {gold}, predicted {found}: {texts[i][j]}"
            for i, gold in enumerate(map(str, labels))
            for j, found in enumerate(columns)
        ]
        _cells(figure, list(map(str, labels)), columns, shares, texts)
        return {"cells": tips}

    right = int(np.trace(counts))
    label = f"Confusion matrix of {len(labels)} labels: {right} of {counts.sum()} predictions on the diagonal"
    size = (CELL * len(columns), CELL * len(labels))
    return _plot("Gold (rows) and predicted (columns)", label, draw, size, crop=True)


def similarities(title: str, labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Draw a matrix of cosines, shaded from 0 to 1; nothing where there are no labels."""
    if not labels:
        return ""
    values = np.array(matrix, dtype=np.float64)
    texts = [[f"{value:.2f}" for value in row] for row in values.tolist()]

    def draw(figure: Figure) -> dict[str, list[str]]:
        _cells(figure, list(labels), list(labels), values.clip(0, 1), texts)
        return {"cells": [f"{a}, {b}: {texts[i][j]}" for i, a in enumerate(labels) for j, b in enumerate(labels)]}

    others = values[~np.eye(len(labels), dtype=bool)]
    label = f"{title}, {len(labels)} by {len(labels)}"
    label += f": between {others.min():.2f} and {others.max():.2f} off the diagonal" if others.size else ""
    return _plot(title, label, draw, (CELL * len(labels), CELL * len(labels)), crop=True)


def _whisker(axes: Axes, y: float, look: str, one: Mapping[str, Any]) -> None:
    value = one["value"]
    low, high = (value if one.get(key) is None else one[key] for key in ("low", "high"))
    color, text = (COLORS[name] for name in (("before", "quiet") if look == "before" else ("accent", "ink")))
    axes.axhline(y, color=COLORS["edge"], linewidth=1)
    axes.plot([low, high], [y, y], color=color, linewidth=4, alpha=0.45, solid_capstyle="round", clip_on=False)
    axes.plot(value, y, "o", color=color, markersize=11, markeredgewidth=0, clip_on=False)
    weight = "normal" if look == "before" else "bold"
    spot: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "color": text, "weight": weight}
    axes.text(1.04, y, f"{value:.3f}", **spot)


def _cells(
    figure: Figure, rows: Sequence[str], columns: Sequence[str], shares: np.ndarray, texts: Sequence[Sequence[str]]
) -> None:
    """Draw a cell for each row and column, as dark as its share (0 to 1), with its text, and the names outside."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    axes = figure.add_axes((0, 0, 1, 1))  # the page gets what is drawn, so the labels may stand outside
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), frame_on=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=COLORS["quiet"])
    style: Any = {"rotation": 40, "ha": "left", "va": "baseline", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(len(columns)) + 0.5, [_short(name) for name in columns], **style)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_short(name) for name in rows])
    places = list(np.ndindex(*shares.shape))
    boxes = [Rectangle((column + 0.02, row + 0.02), 0.96, 0.96) for row, column in places]
    shades = [to_rgba(COLORS["accent"], 0.03 + 0.52 * float(shares[place])) for place in places]
    axes.add_collection(PatchCollection(boxes, facecolors=shades, edgecolors="none", gid="cells", clip_on=False))
    for row, column in places:
        text = texts[row][column]
        style = {"color": COLORS["ink"], "alpha": 0.45 if text == "0" else 1.0, "fontsize": min(13, 64 / len(text))}
        style |= {"ha": "center", "va": "center_baseline"}
        axes.text(column + 0.5, row + 0.5, text, **style).set_in_layout(False)


def _printable(text: str) -> str:
    """Put a space for what XML cannot hold and for line breaks."""
    return "".join(character if character.isprintable() else " " for character in text)


def _short(label: str) -> str:
    label = _printable(label)
    return label if len(label) < 15 else f"{label[:7]}…{label[-6:]}"


def _plot(
    title: str,
    label: str,
    draw: Callable[[Figure], dict[str, list[str]]],
    size: tuple[float, float],
    legend: Sequence[tuple[str, str]] = (),
    crop: bool = False,
) -> str:
    """Lay out a figure with its caption and legend; `draw` fills it and answers with the tips of its groups."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    with style.context([{**_LOOK, "svg.hashsalt": name}], after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's font, not ours, shows the text
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72, layout=None if crop else "constrained")
        tips, drawn = draw(figure), io.StringIO()
        box: Any = "tight" if crop else None
        FigureCanvasSVG(figure).print_figure(
            drawn, format="svg", metadata={"Date": None}, bbox_inches=box, pad_inches=2 / 72
        )
    keys = "".join(f'<span class="key {look}">{html.escape(text)}</span>' for text, look in legend)
    picture = _inline(drawn.getvalue(), name, _printable(label), tips)
    return (
        f"<figure>\n<figcaption>{html.escape(title)}{keys}</figcaption>\n"
        f'<div class="scroll">{picture}</div>\n</figure>\n'
    )


def _inline(svg: str, name: str, label: str, tips: Mapping[str, Sequence[str]]) -> str:
    """Turn a file of matplotlib's into an element of a page: no prolog, no style of its own, ids that begin with name.

    `tips` are what the pointer shows on the things of a group, by the group's id.
    """
    root = ElementTree.fromstring(svg)
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": label, "style": f"--units: {float(box.split()[2]):g}"}
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        if of_group := tips.get(element.get("id", "")):
            things = element.findall(".//{*}use") or element.findall("{*}path")
            for thing, tip in zip(things, of_group, strict=True):
                ElementTree.SubElement(thing, "title").text = _printable(tip)
    whole = list(root.iter())
    links = {found for element in whole for value in element.attrib.values() for found in _LINK.findall(value)}
    for element in whole:
        _tidy(element, name, links)
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(element: ElementTree.Element, name: str, links: set[str]) -> None:
    """Name an element as HTML does; keep only ids that something links to; take the page's colors; shorten numbers."""
    element.tag = element.tag.rpartition("}")[2]
    element.text, element.tail = (element.text or "").strip(), ""
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if attributes.get("id") not in links:
        attributes.pop("id", None)
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    for key, value in attributes.items():
        attributes[key] = (
            f"{name}-{value}" if key == "id" else _LINK.sub(lambda link: link[0].replace("#", f"#{name}-"), value)
        )
    for key in attributes.keys() & {"d", "x", "y", "width", "height"}:
        short = re.sub(r"-?\d+\.\d+", lambda number: f"{round(float(number[0]), 2):g}", attributes[key])
        attributes[key] = " ".join(short.split())
    if "style" in attributes:
        attributes["style"] = re.sub("#[0-9a-f]{6}", lambda one: _VARIABLES.get(one[0], one[0]), attributes["style"])
    element.attrib = attributes
