"""The plots of a page: matplotlib draws them as inline SVG that takes the page's own font and colors.

The label of every plot, which screen readers read aloud, says the figures that the eye takes from it. No function here
uses pyplot, the caller's matplotlib settings, or a clock: the same data always give the same text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:  # matplotlib takes a second to import, so only drawing imports it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 420, 230  # of a line plot, in pixels; the page scales it a little
CELL = 44  # one side of a cell of the heatmap
MAX_POINTS = 500
_STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten

# Lines and texts drawn in one of these colors take the style sheet's variable of that name.
COLORS = {"ink": "#00000a", "quiet": "#00000b", "edge": "#00000c", "accent": "#00000d", "before": "#00000e"}
LINE_COLORS = {
    f"line{number}": f"#0000{15 + number:02x}" for number in range(1, 9)
}  # of lines that differ in color only
_VARIABLES = {color: f"var(--{name})" for name, color in (COLORS | LINE_COLORS).items()}
_LINK = re.compile(r"^(?:url\()?#([\w.-]+)\)?$")  # in an attribute, to an id
_RC_PARAMS = {
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
    "font.family": "DejaVu Sans",  # matplotlib ships it and measures with it; the style sheet replaces it
    "font.size": 14,
    "axes.labelsize": 14,
    "xtick.labelsize": 14,
    "ytick.labelsize": 14,
}


@dataclass(frozen=True)
class Line:
    """One line of a plot: points (x, y); `dots` marks each point.

    `look` is after, before, raw (pale) or a key of LINE_COLORS.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: str = "after"
    dots: bool = False


@dataclass(frozen=True)
class LegendKey:
    """An entry of a legend: a name, and the look of its line or dot."""

    name: str
    look: str


@dataclass(frozen=True)
class Plot:
    """A plot of a page: its caption and legend, and the SVG element; `is_large` asks for the page's whole width."""

    title: str
    svg: str
    legend: Sequence[LegendKey] = ()
    is_large: bool = False


def format_number(value: float) -> str:
    """Write a number for people: thousands in groups, or four significant digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_interval(score: Mapping[str, Any], template: str) -> str:
    """Put the bounds of a score into `template`; empty where the score has none."""
    low = score.get("low")
    high = score.get("high")
    return "" if low is None or high is None else template.format(f"{low:.3f}", f"{high:.3f}")


def format_score(score: Mapping[str, Any]) -> str:
    """Write a score and, where it has them, its bounds."""
    if score.get("value") is None:
        return "undefined"
    return f"{score['value']:.3f}{format_interval(score, ' ({} to {})')}"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors until at most MAX_POINTS are left: a page of 50,000 steps stays small."""
    if len(points) <= MAX_POINTS:
        return list(points)
    means = []
    for part in np.array_split(np.array(points, dtype=np.float64), MAX_POINTS):
        x, y = part.mean(axis=0)
        means.append((float(x), float(y)))
    return means


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average over a centered window of a fifteenth of the points, cut off at both ends."""
    half = max(1, len(points) // 30)
    ys = [y for _, y in points]
    smoothed = []
    for index, (x, _) in enumerate(points):
        smoothed.append((x, float(np.mean(ys[max(0, index - half) : index + half + 1]))))
    return smoothed


def line_plot(title: str, lines: Sequence[Line], axis: str = "step") -> Plot | None:
    """Draw lines over steps, or over another `axis`, thinned.

    Returns:
        The plot; None where no line has two points.
    """
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return None

    def draw(figure: Figure) -> dict[str, list[str]]:
        axes = figure.add_subplot()
        tips = {}
        for number, line in enumerate(lines):
            name = f"line{number}"
            points = thin(line.points)
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, gid=name, clip_on=False, **_line_style(line))
            if line.dots:
                tips[name] = [f"{axis} {format_number(x)}: {format_number(y)}" for x, y in points]
        axes.margins(x=0.02 if tips else 0)
        _format_axes(axes, axis, lines)
        return tips

    steps, values = zip(*lines[0].points, strict=True)
    label = (
        f"{title} from {axis} {format_number(steps[0])} to {format_number(steps[-1])}: "
        f"first {format_number(values[0])}, last {format_number(values[-1])}, "
        f"lowest {format_number(min(values))}, highest {format_number(max(values))}"
    )
    legend = [LegendKey(line.name, line.look) for line in lines] if len(lines) > 1 else []
    return _plot(title, label, draw, (WIDTH, HEIGHT), legend)


def _line_style(line: Line) -> dict[str, Any]:
    style: dict[str, Any] = {"color": (COLORS | LINE_COLORS).get(line.look, COLORS["accent"])}
    style |= {"linewidth": 1, "alpha": 0.5} if line.look == "raw" else {"linewidth": 2.2}
    return style | ({"marker": "o", "markersize": 7} if line.dots else {})


def _format_axes(axes: Axes, name: str, lines: Sequence[Line]) -> None:
    """Place and format the ticks of a line plot; `name` labels the horizontal axis."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

    low, high = axes.get_ylim()
    if high - low < 1e-6 * abs(high):  # constant but for rounding
        axes.set_ylim(low - abs(low) / 20, high + abs(high) / 20)
    axes.grid(axis="y")
    axes.set_xlabel(name)
    xs, ys = np.concatenate([line.points for line in lines]).T
    whole = bool((xs % 1 == 0).all())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=_STEPS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if whole else "{x:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(
        StrMethodFormatter("{x:,.0f}") if np.abs(ys).max() >= 1000 else ScalarFormatter(useOffset=False)
    )


def interval_plot(scores: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """Draw each metric before and after training as a dot on its interval.

    Returns:
        The plot; None where no score has a value.
    """
    dots_of_metrics: dict[str, dict[str, Mapping[str, Any]]] = {}
    parts = []
    looks = set()
    for name, after in scores.items():
        dots = {}
        for look, score in (("before", before.get(name) or {}), ("after", after)):
            if score.get("value") is not None:
                dots[look] = score
                looks.add(look)
                parts.append(f"{name} {look} {format_score(score)}")
        if dots:
            dots_of_metrics[name] = dots
    if not dots_of_metrics:
        return None
    height = len(parts) + 1.2 * len(dots_of_metrics)  # the name of a metric has a separate line

    def draw(figure: Figure) -> dict[str, list[str]]:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        across = axes.get_yaxis_transform()
        y = 0.1
        for name, dots in dots_of_metrics.items():
            axes.text(0, y + 0.4, _printable(name), transform=across, va="center", weight="bold", color=COLORS["ink"])
            for number, (look, score) in enumerate(dots.items()):
                _draw_interval(axes, y + 1.2 + number, look, score)
            y += len(dots) + 1.2
        axes.set_ylim(height + 0.1, 0)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        return {}

    legend = [LegendKey(look, look) for look in ("before", "after") if look in looks]
    return _plot("95 % intervals", "; ".join(parts), draw, (WIDTH, round(36 + 24 * height)), legend)


def heatmap(labels: Sequence[Any], matrix: Sequence[Sequence[int]]) -> Plot:
    """Draw the confusion matrix: counts, shaded by their share of the row; an empty illegal column is left out."""
    counts = np.array(matrix, dtype=np.int64).reshape(len(labels), -1)
    rows = list(map(str, labels))
    columns = [*rows, "no label"][: counts.shape[1]]
    if len(columns) > len(rows) and not counts[:, -1].any():
        columns = columns[:-1]
        counts = counts[:, :-1]

    def draw(figure: Figure) -> dict[str, list[str]]:
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return _draw_cells(figure, rows, columns, shares, counts.astype(str), "gold {}, predicted {}: {}")

    right = int(np.trace(counts))
    label = f"Confusion matrix of {len(rows)} labels: {right} of {counts.sum()} predictions on the diagonal"
    size = (CELL * len(columns), CELL * len(rows))
    plot = _plot("Gold (rows) and predicted (columns)", label, draw, size, crop=True)
    return replace(plot, is_large=len(rows) > 12)


def similarity_plot(title: str, labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> Plot | None:
    """Draw a matrix of cosines, shaded from 0 to 1.

    Returns:
        The plot; None where there are no labels.
    """
    if not labels:
        return None
    values = np.array(matrix, dtype=np.float64)

    def draw(figure: Figure) -> dict[str, list[str]]:
        return _draw_cells(figure, labels, labels, values.clip(0, 1), np.char.mod("%.2f", values), "{}, {}: {}")

    off_diagonal = values[~np.eye(len(labels), dtype=bool)]
    label = f"{title}, {len(labels)} by {len(labels)}"
    if off_diagonal.size:
        label += f": between {off_diagonal.min():.2f} and {off_diagonal.max():.2f} off the diagonal"
    return _plot(title, label, draw, (CELL * len(labels), CELL * len(labels)), crop=True)


def _draw_interval(axes: Axes, y: float, look: str, score: Mapping[str, Any]) -> None:
    """Draw a score as a dot on its interval, with its value at the right."""
    value = score["value"]
    low = value if score.get("low") is None else score["low"]
    high = value if score.get("high") is None else score["high"]
    color, text_color, weight = ("before", "quiet", "normal") if look == "before" else ("accent", "ink", "bold")
    axes.axhline(y, color=COLORS["edge"], linewidth=1)
    axes.plot([low, high], [y, y], color=COLORS[color], linewidth=4, alpha=0.45, solid_capstyle="round", clip_on=False)
    axes.plot(value, y, "o", color=COLORS[color], markersize=11, markeredgewidth=0, clip_on=False)
    across = axes.get_yaxis_transform()
    axes.text(1.04, y, f"{value:.3f}", transform=across, va="center", color=COLORS[text_color], weight=weight)


def _draw_cells(
    figure: Figure, rows: Sequence[str], columns: Sequence[str], shares: np.ndarray, texts: np.ndarray, tip: str
) -> dict[str, list[str]]:
    """Draw a cell for each row and column, as dark as its share (0 to 1), with its text, and the names outside.

    Returns:
        The tips of the cells: `tip` with the names of row and column and the text.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    axes = figure.add_axes((0, 0, 1, 1))  # the page crops the figure to its content, so labels may lie outside
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), frame_on=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=COLORS["quiet"])
    style: Any = {"rotation": 40, "ha": "left", "va": "baseline", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(len(columns)) + 0.5, list(map(_short, columns)), **style)
    axes.set_yticks(np.arange(len(rows)) + 0.5, list(map(_short, rows)))
    boxes = []
    shades = []
    tips = []
    for row, column in np.ndindex(*shares.shape):
        text = str(texts[row, column])
        boxes.append(Rectangle((column + 0.02, row + 0.02), 0.96, 0.96))
        shades.append(to_rgba(COLORS["accent"], 0.03 + 0.52 * float(shares[row, column])))
        tips.append(tip.format(rows[row], columns[column], text))
        style = {"color": COLORS["ink"], "alpha": 0.45 if text == "0" else 1.0, "fontsize": min(13, 64 / len(text))}
        style |= {"ha": "center", "va": "center_baseline"}
        axes.text(column + 0.5, row + 0.5, text, **style).set_in_layout(False)
    axes.add_collection(PatchCollection(boxes, facecolors=shades, edgecolors="none", gid="cells", clip_on=False))
    return {"cells": tips}


def _printable(text: str) -> str:
    """Put a space for line breaks and characters that XML cannot hold."""
    return "".join(character if character.isprintable() else " " for character in text)


def _short(label: str) -> str:
    label = _printable(label)
    return label if len(label) < 15 else f"{label[:7]}…{label[-6:]}"


def _plot(
    title: str,
    label: str,
    draw: Callable[[Figure], dict[str, list[str]]],
    size: tuple[float, float],
    legend: Sequence[LegendKey] = (),
    crop: bool = False,
) -> Plot:
    """Draw a figure.

    Args:
        title: The caption.
        label: The text that screen readers read.
        draw: Fills the figure; returns the tips of its groups, by their ids.
        size: Width and height in pixels.
        legend: The entries of the legend.
        crop: Whether the figure is cropped to its content.
    """
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    with style.context([{**_RC_PARAMS, "svg.hashsalt": name}], after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's font, not ours, shows the text
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72, layout=None if crop else "constrained")
        tips = draw(figure)
        file = io.StringIO()
        box: Any = "tight" if crop else None
        FigureCanvasSVG(figure).print_figure(
            file, format="svg", metadata={"Date": None}, bbox_inches=box, pad_inches=2 / 72
        )
    return Plot(title, _inline_svg(file.getvalue(), name, _printable(label), tips), legend)


def _inline_svg(svg: str, name: str, label: str, tips: Mapping[str, Sequence[str]]) -> str:
    """Turn a file of matplotlib into an element of a page, without prolog and style.

    Args:
        svg: The content of the file.
        name: Every id begins with it.
        label: The text that screen readers read.
        tips: The texts that the pointer shows on the shapes of a group, by the group's id.
    """
    root = ElementTree.fromstring(svg)
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": label, "style": f"--units: {float(box.split()[2]):g}"}
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        if tips_of_group := tips.get(element.get("id", "")):
            shapes = element.findall(".//{*}use") or element.findall("{*}path")
            for shape, tip in zip(shapes, tips_of_group, strict=True):
                ElementTree.SubElement(shape, "title").text = _printable(tip)
    elements = list(root.iter())
    linked_ids: set[str] = set()
    for element in elements:
        for value in element.attrib.values():
            linked_ids.update(_LINK.findall(value))
    for element in elements:
        _tidy(element, name, linked_ids)
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(element: ElementTree.Element, name: str, linked_ids: set[str]) -> None:
    """Name an element as HTML does, keep only linked ids, take the page's colors, and shorten numbers."""
    element.tag = element.tag.rpartition("}")[2]
    element.text = (element.text or "").strip()
    element.tail = ""
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if attributes.get("id") not in linked_ids:
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
        attributes["style"] = re.sub(
            "#[0-9a-f]{6}", lambda color: _VARIABLES.get(color[0], color[0]), attributes["style"]
        )
    element.attrib = attributes
