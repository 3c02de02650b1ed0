"""The report's figures: small matplotlib panels as inline SVG that take the page's colours and fonts.

Panels are drawn at the width of a phone, so that a page lays several side by side and a phone shows each at full size.
Colours are drawn as stand-ins and replaced by the page's CSS variables: one picture serves light, dark and print. The
same inputs give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from components.register.measured import Measured, ratio
from components.register.report import Curve, Round

SIZE = (4.6, 2.9)
"""Inches of a panel, 72 SVG units each; the page scales a panel to its column."""

INK, MUTED, RULE, ACCENT, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Stand-ins for the page's colours."""

_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    PAPER: "var(--paper)",
}

_STYLE = {
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


def gates(rounds: Sequence[Round], removed: Iterable[int]) -> str:
    """Draw every layer's gate over the steps of all rounds; the removed layers in colour, named where they left."""
    chosen = set(removed)
    curves = {
        layer: [(step, line.gates[layer]) for step, line in enumerate(rounds) if line.gates[layer] is not None]
        for layer in range(len(rounds[0].gates))
    }

    def draw(axes: Axes) -> None:
        for layer, curve in curves.items():
            style = {"color": ACCENT, "zorder": 3} if layer in chosen else {"color": MUTED, "linewidth": 0.9}
            axes.plot(*_columns(curve), **style)
        for step, (before, line) in enumerate(pairwise(rounds)):
            if line.round != before.round:
                axes.axvline(step + 0.5, color=RULE, linewidth=0.7, zorder=1)
        _label(axes, {f"layer {layer}": curves[layer][-1] for layer in chosen if curves[layer]}, ACCENT)

    return _panel(draw, "optimizer step, all rounds", "gate", f"Gates of {len(curves)} layers over {len(rounds)} steps")


def curve(name: str, points: Curve, *, mark: tuple[float, str] | None = None) -> str:
    """Draw a metric over the optimizer steps: every step thin, and where there are many, their running mean thick.

    Args:
        name: the metric's name, the vertical axis' label.
        points: (step, value), finite.
        mark: a step to draw a line at, and what happens there.
    """
    window = len(points) // 20
    smooth = _running_mean(points, window) if window > 1 else []

    def draw(axes: Axes) -> None:
        axes.plot(*_columns(points), **({"color": MUTED, "linewidth": 0.7} if smooth else {"color": ACCENT}))
        axes.plot(*_columns(smooth), color=ACCENT)
        if mark:
            axes.axvline(mark[0], color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
            top = axes.get_xaxis_transform()
            axes.annotate(mark[1], (mark[0], 1), (4, -8), top, textcoords="offset points", color=MUTED)

    return _panel(draw, "optimizer step", name, f"{name} over {len(points)} recorded steps")


def pareto(models: Mapping[str, Measured], text: str) -> str:
    """Draw each model's perplexity on `text` against its parameters, both relative to the dense model; the candidate in colour.

    Models without a perplexity on the text, and all of them where the dense model has none, are left out.
    """
    dense = models["dense"]
    points: dict[str, tuple[float, float]] = {}
    for name, model in models.items():
        quality = ratio(model.perplexity.get(text), dense.perplexity.get(text))
        if quality is not None:
            points[name] = (model.parameters / dense.parameters, quality)

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        for name, point in points.items():
            filled = {"markerfacecolor": ACCENT if name == "candidate" else PAPER}
            axes.plot(*point, "o", markersize=7, markeredgecolor=ACCENT if name == "candidate" else INK, **filled)
        axes.margins(0.3, 0.25)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}×"))
        _label(axes, points, INK)

    return _panel(draw, "parameters, of dense", f"perplexity on {text}, of dense", f"Size and perplexity on {text}")


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours are at least `gap` apart; those that crowd are centred on their mean.

    >>> spread([0.0, 0.1, 5.0], 1.0)
    [-0.45, 0.55, 5.0]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(positions)), key=positions.__getitem__):
        groups.append([index])
        while len(groups) > 1 and _bottom(groups[-1], positions, gap) - _top(groups[-2], positions, gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = list(positions)
    for group in groups:
        for rank, index in enumerate(group):
            placed[index] = round(_bottom(group, positions, gap) + rank * gap, 9)
    return placed


def _bottom(group: Sequence[int], positions: Sequence[float], gap: float) -> float:
    """The lowest position of a group that is centred on its members' mean."""
    return sum(positions[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[int], positions: Sequence[float], gap: float) -> float:
    return _bottom(group, positions, gap) + gap * (len(group) - 1)


def _label(axes: Axes, points: Mapping[str, tuple[float, float]], colour: str) -> None:
    """Name points to their right (to their left in the right half), names near each other moved apart."""
    axes.figure.draw_without_rendering()
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    line = (top - bottom) * 11 / (SIZE[1] * 72 * 0.75)
    for on_right in (False, True):
        side = {name: point for name, point in points.items() if (point[0] > (left + right) / 2) == on_right}
        heights = spread([y for _, y in side.values()], line)
        for (name, (x, y)), height in zip(side.items(), heights, strict=True):
            offset = (height - y) / (top - bottom) * SIZE[1] * 72 * 0.75
            place = (-9 if on_right else 9, offset)
            aligned = {"ha": "right" if on_right else "left", "va": "center_baseline"}
            axes.annotate(name, (x, y), place, textcoords="offset points", color=colour, **aligned)


def _running_mean(points: Curve, window: int) -> Curve:
    """Return the mean of each `window` following values, at the middle one's step."""
    sums = [0.0, *accumulate(value for _, value in points)]
    return [
        (points[end - window // 2 - 1][0], (sums[end] - sums[end - window]) / window)
        for end in range(window, len(points) + 1)
    ]


def _columns(points: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float | None]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def _panel(draw: Callable[[Axes], None], x: str, y: str, alt: str) -> str:
    """Draw one panel; the vertical axis' label stands above it, where it can be read without turning one's head."""
    with mpl.rc_context(_STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", color=MUTED, fontsize=9.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        draw(axes)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _inline(drawn.getvalue(), alt)


def _inline(svg: str, alt: str) -> str:
    """Turn matplotlib's SVG file into an element of a page: the page's colours and font, no name space to look up."""
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
    # A backslash would be read as a group's number by the replacement it is put into.
    return html.escape(alt).replace("\\", "&#92;")
