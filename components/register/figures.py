"""The report's figures: small matplotlib panels as inline SVG that take the page's colours and fonts.

Panels have the width of a phone, so that a page shows several side by side and a phone shows each at full size. Colours are
drawn as placeholders and replaced by the CSS variables of the page: one picture serves light mode, dark mode and print. The
same inputs give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, cycle
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from components.lib.report_parts import Line, Lines, Mark, Points
from components.register.measured import Measured, ratio
from components.register.report import Curve

SIZE = (4.6, 2.9)
"""Inches of a panel, 72 SVG units each; the page scales a panel to its column."""

PLOT_HEIGHT = 0.75
"""The part of a panel's height that the axes take, about; used to convert points to data units."""

INK, MUTED, RULE, ACCENT, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Placeholders for the page's colours."""

_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    PAPER: "var(--paper)",
}

_COLOURS = {INK: "#1f2328", MUTED: "#656d76", RULE: "#d0d7de", ACCENT: "#1a7f37", PAPER: "#ffffff"}
"""The colours of a picture that stands alone."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "espalier",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,
    "lines.linewidth": 1.7,
}


def lines(part: Lines) -> str:
    """Draw the lines of a part.

    With names at the ends, the lines that stand out have the accent colour, a dot and their name at their last point, and
    the others are thin. With a legend, the lines differ by colour and dashes.
    """

    def draw(axes: Axes) -> None:
        ends = part.names == "ends"
        for line, look in zip(part.lines, cycle(_LOOKS), strict=False):
            axes.plot(*_columns(line.points), label=line.name, **(_weight(line) if ends else look))
            if ends and line.stands_out:
                axes.plot(*_columns(line.points[-1:]), "o", color=ACCENT, markersize=4, zorder=3)
        for mark in part.marks:
            _mark(axes, mark)
        (_name_at_ends if ends else _legend)(axes, part)

    return _panel(draw, part.x, part.y, part.summary)


_LOOKS: list[dict[str, Any]] = [
    {"color": ACCENT, "linestyle": "solid"},
    {"color": INK, "linestyle": (0, (5, 2))},
    {"color": MUTED, "linestyle": (0, (1, 1.5))},
    {"color": ACCENT, "linestyle": (0, (5, 2, 1, 2))},
    {"color": INK, "linestyle": (0, (1, 1.5))},
    {"color": MUTED, "linestyle": "solid"},
]


def _weight(line: Line) -> dict[str, Any]:
    return {"color": ACCENT, "zorder": 3} if line.stands_out else {"color": MUTED, "linewidth": 0.9}


def _name_at_ends(axes: Axes, part: Lines) -> None:
    """Leave a sixth of the width free for the names of the lines that stand out, and write them there."""
    last = max((line.points[-1][0] for line in part.lines if line.points), default=1)
    axes.set_xlim(0, 1.2 * last)
    _label(axes, {line.name: line.points[-1] for line in part.lines if line.stands_out and line.points}, left_of=1)


def _legend(axes: Axes, part: Lines) -> None:
    """Name the lines below the words of the marks: lines that end together have no room for names at their ends."""
    axes.set_ylim(0, 1.18 * axes.get_ylim()[1])  # room for the words of the marks
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.8))


def curve(points: Curve, name: str, *, mark: Mark | None = None) -> str:
    """Draw a metric over the optimizer steps: every step as a thin line and, from 24 steps on, their running mean as a thick one.

    Args:
        points: (step, value), finite.
        name: the label of the vertical axis.
        mark: a step to draw a vertical line at.
    """
    window = len(points) // 12
    smooth = _running_mean(points, window) if window > 1 else []

    def draw(axes: Axes) -> None:
        thin: dict[str, Any] = {"color": MUTED, "linewidth": 0.7, "alpha": 0.6}
        axes.plot(*_columns(points), **(thin if smooth else {"color": ACCENT, "marker": "o", "markersize": 3}))
        axes.plot(*_columns(smooth), color=ACCENT)
        if mark:
            _mark(axes, mark)

    return _panel(draw, "optimizer step", name, f"{name} over {len(points)} recorded steps")


def pareto(models: Mapping[str, Measured], text: str) -> str:
    """Draw each model's perplexity on `text` against its parameters, both relative to the dense model; the candidate in colour.

    Models without a perplexity on the text are left out; all are, if the dense model has none.
    """
    return _panel(*_pareto(models, text), f"Size and perplexity on {text}")


def pareto_file(models: Mapping[str, Measured], text: str) -> str:
    """Draw `pareto` as an SVG file in colours of its own, for a page that is not ours."""
    drawn = _drawn(*_pareto(models, text))
    for standin, colour in _COLOURS.items():
        drawn = drawn.replace(standin, colour)
    return drawn


def _pareto(models: Mapping[str, Measured], text: str) -> tuple[Callable[[Axes], None], str, str]:
    dense = models["dense"]
    points: dict[str, tuple[float, float]] = {}
    for name, model in models.items():
        quality = ratio(model.perplexity.get(text), dense.perplexity.get(text))
        if quality is not None:
            points[name] = (model.parameters / dense.parameters, quality)

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        for name, point in points.items():
            filled: dict[str, Any] = {"markerfacecolor": ACCENT if name == "candidate" else PAPER}
            axes.plot(*point, "o", markersize=7, markeredgecolor=ACCENT if name == "candidate" else INK, **filled)
        axes.margins(0.3, 0.25)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}×"))
        _label(axes, points)

    return draw, "parameters, of dense", f"perplexity on {text}, of dense"


Interval = tuple[float, float, float]
"""A median, the lowest and the highest value."""


def tradeoff(
    groups: Mapping[str, Mapping[str, tuple[Interval, Interval]]],
    best: Collection[str],
    *,
    x: str,
    y: str,
    summary: str,
) -> str:
    """Draw points with their ranges, those of a group on one line, and dense at (1, 1).

    Args:
        groups: for each name in the legend, the points' (x, y) by their labels, relative to the dense model.
        best: labels of the points to fill: no other is better.
        x: the label of the horizontal axis.
        y: the label above the vertical axis.
        summary: the picture in words.
    """

    def draw(axes: Axes) -> None:
        """Draw every group with its line, its ranges and its labels."""
        axes.plot(1, 1, "D", markersize=6, color=INK)
        labels = {"dense": (1.0, 1.0)}
        for (group, points), look in zip(groups.items(), cycle(_LOOKS), strict=False):
            placed = {name: (across[0], up[0]) for name, (across, up) in points.items()}
            line = sorted(placed.values())
            axes.plot(*_columns(line), linewidth=1, label=group, color=look["color"], linestyle=look["linestyle"])
            for name, (across, up) in points.items():
                axes.plot(across[1:], (up[0], up[0]), linewidth=0.8, color=look["color"])
                axes.plot((across[0], across[0]), up[1:], linewidth=0.8, color=look["color"])
                face = look["color"] if name in best else PAPER
                axes.plot(*placed[name], "o", markersize=6, markeredgecolor=look["color"], markerfacecolor=face)
            labels |= placed
        axes.margins(0.2, 0.2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        _label(axes, labels)
        axes.legend(frameon=False, fontsize=8.5, loc="best")

    return _panel(draw, x, y, summary)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours are at least `gap` apart; a crowded group is centred on its mean."""
    groups: list[list[int]] = []
    for index in sorted(range(len(positions)), key=positions.__getitem__):
        groups.append([index])
        while len(groups) > 1 and _bottom(groups[-1], positions, gap) - _top(groups[-2], positions, gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = list(positions)
    for group in groups:
        for rank, index in enumerate(group):
            placed[index] = _bottom(group, positions, gap) + rank * gap
    return placed


def _bottom(group: Sequence[int], positions: Sequence[float], gap: float) -> float:
    """Return the lowest position of a group that is centred on the mean of its members."""
    return sum(positions[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[int], positions: Sequence[float], gap: float) -> float:
    return _bottom(group, positions, gap) + gap * (len(group) - 1)


def _label(axes: Axes, points: Mapping[str, tuple[float, float]], left_of: float = 0.5) -> None:
    """Write the names of points beside them, and move names that overlap apart.

    Args:
        axes: the points are drawn here already, and the limits are final.
        points: (x, y) by name.
        left_of: the name of a point beyond this part of the width is at its left, else at its right.
    """
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    unit = (top - bottom) / (SIZE[1] * 72 * PLOT_HEIGHT)
    for near in _columns_of(points, (right - left) / 5):
        heights = spread([points[name][1] for name in near], 11 * unit)
        beyond = max(points[name][0] for name in near) - left > left_of * (right - left)
        aligned: dict[str, Any] = {"ha": "right" if beyond else "left", "va": "center_baseline"}
        for name, height in zip(near, heights, strict=True):
            offset = (-8 if beyond else 8, (height - points[name][1]) / unit)
            axes.annotate(name, points[name], offset, textcoords="offset points", **aligned)


def _mark(axes: Axes, mark: Mark) -> None:
    """Draw a vertical line, and write its words at its top."""
    if not mark.words:
        axes.axvline(mark.x, color=RULE, linewidth=0.7, zorder=1)
        return
    axes.axvline(mark.x, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.annotate(mark.words, (mark.x, 1), (4, -8), axes.get_xaxis_transform(), textcoords="offset points", color=MUTED)


def _columns_of(points: Mapping[str, tuple[float, float]], width: float) -> list[list[str]]:
    """Group names whose points are one above the other: each within `width` of the one to its left."""
    groups: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name][0]):
        if groups and points[name][0] - points[groups[-1][-1]][0] < width:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _running_mean(points: Curve, window: int) -> Curve:
    """Return the mean of each `window` following values, at the middle one's step."""
    sums = [0.0, *accumulate(value for _, value in points)]
    return [
        (points[end - window // 2 - 1][0], (sums[end] - sums[end - window]) / window)
        for end in range(window, len(points) + 1)
    ]


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _panel(draw: Callable[[Axes], None], x: str, y: str, alt: str) -> str:
    """Draw one panel as an element of the report's page."""
    return _inline(_drawn(draw, x, y), alt)


def _drawn(draw: Callable[[Axes], None], x: str, y: str) -> str:
    """Draw one panel; the label of the vertical axis is written horizontally above it, to be read more easily."""
    with mpl.rc_context(_STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", color=MUTED, fontsize=9.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        draw(axes)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return drawn.getvalue()


def _inline(svg: str, alt: str) -> str:
    """Turn matplotlib's SVG file into an element of a page: the page's colours and font, no XML name space."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| transform="rotate\(-0 [^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{_quoted(alt)}">',
        svg,
        count=1,
    )
    svg = re.sub(r"(\d+px|font-family:) ('[^;\"]*?|)sans-serif", r"\1 inherit", svg)
    for standin, css in _CSS.items():
        svg = svg.replace(standin, css)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _quoted(alt: str) -> str:
    # The text becomes a replacement of re.sub, which reads a backslash as the number of a group.
    return html.escape(alt).replace("\\", "&#92;")
